// The inner loops of attention, over blocks of a KV codec. Outputs are sums in one stated order:
// a score is one chain over head_dim, a value one chain over tokens, so how many queries, blocks
// or columns are taken at once changes no bit.
#pragma once

#include "core/kernels.h"
#include "formats/kv.h"
#include "ops/elementwise.h"
#include "ops/limits.h"
#include "ops/math.h"

namespace lacewing {
namespace {

constexpr int64_t kSpan = 128;  // tokens of one softmax update
constexpr int kSpanBlocks = kSpan / kBlock;

// Blocks (of scores) or registers of columns (of values) that N queries take at once.
template <class S, int N>
constexpr int kAtOnce = 4 * N <= S::kAttentionSums   ? 4
                        : 2 * N <= S::kAttentionSums ? 2
                                                     : 1;

// Reading the cache's blocks as they are, every line of the next span is asked for in the order of
// its address (which is what the hardware's own prefetcher follows), to L2: scores of two blocks
// ask for one block of the next span, so that they take its first half, and values the second.
constexpr int kScorePairs = kSpanBlocks / 2;

// The blocks of one span, and those that will be wanted next (the same ones if nothing is).
struct Span {
  int64_t begin, end;  // tokens
  int blocks;
  const uint8_t* block[kSpanBlocks];
  const uint8_t* next[kSpanBlocks];
};

// Queries of a batch as the scores want them: transposed, so that all offsets are constants.
struct Queries {
  const float* values;  // [head_dim][N]; integer codecs:
  const int8_t* codes;  // [pad4(head_dim)/4][N][4]
  const float* scales;  // [N]
  const int32_t* sums;  // [N], of codes
};

// score[q][column..] of N queries against `Blocks` blocks from block b of the span on.
template <class S, class Kv, int N, int Blocks, bool Prefetch>
inline void score_floats(const Queries& queries, const Span& span, int b, int64_t head_dim,
                         float* score) {
  typename S::F32x16 sums[Blocks][N];
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i)
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) sums[i][q] = S::zero();
  const float* x = queries.values;
  constexpr int kLines = 2 / Kv::kLineRows;  // of two blocks and one input
  const uint8_t* ahead = span.next[b / 2];
  for (int64_t d = 0; d < head_dim; ++d, x += N) {
    typename S::F32x16 keys[Blocks];
#pragma GCC unroll 4
    for (int i = 0; i < Blocks; ++i) keys[i] = Kv::template key<S>(span.block[b + i], d);
    if constexpr (Prefetch) {
#pragma GCC unroll 2
      for (int i = 0; i < kLines; ++i) S::prefetch_t1(ahead + 64 * i);
      ahead += 64 * kLines;
    }
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) {
      const auto query = S::set1(x[q]);
#pragma GCC unroll 4
      for (int i = 0; i < Blocks; ++i) sums[i][q] = S::fma(query, keys[i], sums[i][q]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i)
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) S::store(score + q * kSpan + (b + i) * kBlock, sums[i][q]);
}

// As `score_floats`, from exact integer sums: (float(sum) * key's scale) * query's scale.
template <class S, class Kv, int N, int Blocks, bool Prefetch>
inline void score_codes(const Queries& queries, const Span& span, int b, int64_t head_dim,
                        float* score) {
  using Dot = typename S::template Dot<128, 255>;
  typename Dot::Acc sums[Blocks][N];
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i)
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) sums[i][q] = Dot::init(queries.sums[q]);
  const int8_t* x = queries.codes;
  const int64_t keys = Kv::keys_at(head_dim), steps = pad_to(head_dim, 4) / 4;
  const uint8_t* ahead = span.next[b / 2];
  for (int64_t d = 0; d < steps; ++d, x += 4 * N) {
#pragma GCC unroll 4
    for (int i = 0; i < Blocks; ++i) {
      const auto codes = S::load_u8(span.block[b + i] + keys + d * 64);
#pragma GCC unroll 12
      for (int q = 0; q < N; ++q) Dot::step(sums[i][q], codes, x + 4 * q);
    }
    if constexpr (Prefetch) {
      S::prefetch_t1(ahead + d * 128);
      S::prefetch_t1(ahead + d * 128 + 64);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i) {
    const auto scales = Kv::template key_scales<S>(span.block[b + i]);
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) {
      const auto dot = S::from_i32(Dot::finish(sums[i][q], queries.sums[q]));
      S::store(score + q * kSpan + (b + i) * kBlock,
               S::mul(S::mul(dot, scales), S::set1(queries.scales[q])));
    }
  }
}

template <class S, class Kv, int N, bool Prefetch>
inline void score_span(const Queries& queries, const Span& span, int blocks, int64_t head_dim,
                       float* score) {
  constexpr int kBlocks = Prefetch && kAtOnce<S, N> > 2 ? 2 : kAtOnce<S, N>;
  int b = 0;
  for (; b + kBlocks <= blocks; b += kBlocks)
    if constexpr (Kv::kInteger)
      score_codes<S, Kv, N, kBlocks, Prefetch>(queries, span, b, head_dim, score);
    else
      score_floats<S, Kv, N, kBlocks, Prefetch>(queries, span, b, head_dim, score);
  for (; b < blocks; ++b)
    if constexpr (Kv::kInteger)
      score_codes<S, Kv, N, 1, Prefetch>(queries, span, b, head_dim, score);
    else
      score_floats<S, Kv, N, 1, Prefetch>(queries, span, b, head_dim, score);
}

// value[q] = value[q] * rescale[q] + sum_t weight[q][t] v_t, tokens in order, for `Chunks` x 16
// columns from `column` on.
template <class S, class Kv, int N, int Chunks, bool Prefetch>
inline void add_columns(const float* weight, const float* rescale, const Span& span, int blocks,
                        int64_t head_dim, int64_t column, float* value) {
  const int64_t row_bytes = Kv::value_pitch(head_dim), pitch = pad_to(head_dim, 16);
  const int64_t values = Kv::values_at(head_dim);
  // Prefetching: every pass over the columns takes its part of what the scores have left.
  constexpr int kLineChunks = Kv::kInteger ? 4 : Kv::kLineRows;  // chunks in 64 bytes
  constexpr int kLines = Chunks / kLineChunks;                   // of one token
  const int64_t passes = 2 * (pitch / (16 * Chunks)), pass = column / (16 * Chunks);
  const int64_t share = Kv::block_bytes(head_dim) / passes / 64 * 64;
  typename S::F32x16 sums[Chunks][N];
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q)
      sums[c][q] = S::mul(S::load(value + q * pitch + column + 16 * c), S::set1(rescale[q]));
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* row = span.block[b] + values;
    const int64_t part = pass * kSpanBlocks + b;
    const uint8_t* ahead = span.next[kScorePairs + part / passes] + part % passes * share;
    if (Prefetch && kLines > 0) S::prefetch_t1(ahead + kLines * kBlock * 64);
    const float* w = weight + b * kBlock;
    for (int t = 0; t < kBlock; ++t, row += row_bytes, ahead += 64 * kLines) {
      typename S::F32x16 v[Chunks];
#pragma GCC unroll 4
      for (int c = 0; c < Chunks; ++c) {
        v[c] = Kv::template value<S>(row, column + 16 * c);
        if (Prefetch && c < kLines) S::prefetch_t1(ahead + 64 * c);
      }
#pragma GCC unroll 12
      for (int q = 0; q < N; ++q) {
        const auto each = S::set1(w[q * kSpan + t]);
#pragma GCC unroll 4
        for (int c = 0; c < Chunks; ++c) sums[c][q] = S::fma(each, v[c], sums[c][q]);
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) S::store(value + q * pitch + column + 16 * c, sums[c][q]);
}

template <class S, class Kv, int N, bool Prefetch>
inline void add_values(const float* weight, const float* rescale, const Span& span, int blocks,
                       int64_t head_dim, float* value) {
  constexpr int kChunks = kAtOnce<S, N>;
  const int64_t columns = pad_to(head_dim, 16);
  int64_t c = 0;
  for (; c + 16 * kChunks <= columns; c += 16 * kChunks)
    add_columns<S, Kv, N, kChunks, Prefetch>(weight, rescale, span, blocks, head_dim, c, value);
  for (; c < columns; c += 16)
    add_columns<S, Kv, N, 1, Prefetch>(weight, rescale, span, blocks, head_dim, c, value);
}

// The span's blocks as f32 in `memory` (integer codecs: the values only, without their scales).
template <class S, class Kv>
inline Span expand_span(const Span& span, int64_t head_dim, uint8_t* memory) {
  Span wide = span;
  const int64_t bytes = F32Kv::block_bytes(head_dim);
  for (int b = 0; b < span.blocks; ++b) {
    auto* keys = reinterpret_cast<float*>(memory + b * bytes);
    auto* values = reinterpret_cast<float*>(memory + b * bytes + F32Kv::values_at(head_dim));
    wide.block[b] = wide.next[b] = memory + b * bytes;
    if constexpr (!Kv::kInteger)
      for (int64_t d = 0; d < head_dim; ++d)
        S::store(keys + d * kBlock, Kv::template key<S>(span.block[b], d));
    const uint8_t* row = span.block[b] + Kv::values_at(head_dim);
    for (int t = 0; t < kBlock; ++t, row += Kv::value_pitch(head_dim))
      for (int64_t c = 0; c < head_dim; c += 16, values += 16)
        S::store(values, Kv::template value<S>(row, c));
  }
  return wide;
}

}  // namespace
}  // namespace lacewing
