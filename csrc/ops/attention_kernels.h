// The inner loops of attention, over blocks of a KV codec. Outputs are sums in one stated order:
// a score is one chain over head_dim, a value one chain over tokens, so how many queries, blocks
// or columns are taken at once changes no bit.
#pragma once

#include "core/kernels.h"
#include "formats/kv.h"
#include "formats/kv_int4.h"
#include "formats/kv_sparse.h"
#include "ops/attention_codes.h"
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
  const float* values;  // [head_dim][N]; with minima: [N][pad16(head_dim)]; else integer codecs:
  const int8_t* codes;  // [pad4(head_dim)/4][N][4]
  const float* scales;  // [N]
  const int32_t* sums;  // [N], of codes
};

// Weights of a batch's queries over a span.
struct Weights {
  const float* values;   // [N][kSpan]; integer codecs:
  const uint8_t* codes;  // [N][kSpan][2], as S::WideDot prepares them
  const float* scales;   // [N], of codes
  const float* minima;   // [N]: weights times the minima of the values
  const float* rescale;  // [N]: what the sums over older tokens are multiplied by
};

// What a pass over the columns of the values prefetches beside block b: its part of what the scores
// have left.
struct Ahead {
  const uint8_t* const* next;
  int64_t pass, passes, lines;  // of a block
  int64_t share;                // lines

  Ahead(const Span& span, int64_t column, int64_t columns, int64_t pitch, int64_t block_bytes)
      : next(span.next + kScorePairs),
        pass(column / columns),
        passes(2 * (pitch / columns)),
        lines(block_bytes / 64),
        share((lines + passes - 1) / passes) {}

  template <class S>
  LW_INLINE void prefetch(int b) const {
    const int64_t part = pass * kSpanBlocks + b;
    const uint8_t* from = next[part / passes] + part % passes * share * 64;
    for (int64_t i = 0; i < share; ++i) S::prefetch_t1(from + 64 * i);
  }
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
  constexpr int kRows = Kv::kRows, kLines = 2 * Kv::kRowsBytes / 64;  // of two blocks
  const uint8_t* ahead = span.next[b / 2];
  for (int64_t d = 0; d < head_dim; d += kRows, x += kRows * N) {
    if constexpr (Prefetch) {
#pragma GCC unroll 2
      for (int i = 0; i < kLines; ++i) S::prefetch_t1(ahead + 64 * i);
      ahead += 64 * kLines;
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      typename S::F32x16 keys[Blocks];
#pragma GCC unroll 4
      for (int i = 0; i < Blocks; ++i) keys[i] = Kv::template key<S>(span.block[b + i], d, r);
#pragma GCC unroll 12
      for (int q = 0; q < N; ++q) {
        const auto query = S::set1(x[r * N + q]);
#pragma GCC unroll 4
        for (int i = 0; i < Blocks; ++i) sums[i][q] = S::fma(query, keys[i], sums[i][q]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i)
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) S::store(score + q * kSpan + (b + i) * kBlock, sums[i][q]);
}

// Queries as the keys of one block want them, whose channels have scales and minima: times the
// scales and rounded anew; a code stands for code - 8, so its middle joins the minimum.
template <int N>
struct BlockQueries {
  alignas(64) int8_t codes[N * kMaxHeadDim];
  alignas(64) float scaled[kMaxHeadDim];  // one query before it is rounded
  float scales[N], minima[N];
  int32_t sums[N];
};

template <class S, class Kv, int N>
inline void scale_queries(const Queries& queries, const uint8_t* block, int64_t head_dim,
                          BlockQueries<N>& to) {
  const int64_t pitch = pad_to(head_dim, 16);
  for (int q = 0; q < N; ++q) {
    auto minimum = S::zero();
    for (int64_t c = 0; c < pitch; c += 16) {
      const auto query = S::load(queries.values + q * pitch + c);
      const auto scales = Kv::template channel_scales<S>(block, c);
      const auto minima = Kv::template channel_minima<S>(block, head_dim, c);
      S::store(to.scaled + c, S::mul(query, scales));
      minimum = S::fma(query, S::fma(scales, S::set1(8.0f), minima), minimum);
    }
    to.scales[q] = query_codes<S>(to.scaled, head_dim, N, to.codes + 4 * q, to.sums + q);
    to.minima[q] = S::sum(minimum);
  }
}

// As `score_floats`, from exact integer sums: (float(sum) * key's scale) * query's scale, or, with
// minima, fma(float(sum), scale of the block's query, minimum).
template <class S, class Kv, int N, int Blocks, bool Prefetch>
inline void score_codes(const Queries& queries, const Span& span, int b, int64_t head_dim,
                        float* score) {
  using Dot = typename S::template Dot<Kv::kMinima ? 8 : 128, Kv::kMinima ? 15 : 255>;
  const int64_t steps = pad_to(head_dim, 4) / 4;
  if constexpr (Prefetch)
    if (b % 2 == 0)
      for (int64_t i = 0; i < Kv::block_bytes(head_dim); i += 64)
        S::prefetch_t1(span.next[b / 2] + i);
  [[maybe_unused]] BlockQueries<Kv::kMinima ? N : 1> own[Kv::kMinima ? Blocks : 1];
  const auto sum_of = [&](int i, int q) { return Kv::kMinima ? own[i].sums[q] : queries.sums[q]; };
  typename Dot::Acc sums[Blocks][N];
  decltype(Kv::keys(nullptr, 0)) keys[Blocks];
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i) {
    keys[i] = Kv::keys(span.block[b + i], head_dim);
    if constexpr (Kv::kMinima) scale_queries<S, Kv>(queries, span.block[b + i], head_dim, own[i]);
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) sums[i][q] = Dot::init(sum_of(i, q));
  }
#pragma GCC unroll 4
  for (int64_t d = 0; d < steps; ++d) {
#pragma GCC unroll 4
    for (int i = 0; i < Blocks; ++i) {
      const int8_t* x = (Kv::kMinima ? own[i].codes : queries.codes) + d * 4 * N;
      const auto codes = keys[i].template next<S>();
#pragma GCC unroll 12
      for (int q = 0; q < N; ++q) Dot::step(sums[i][q], codes, x + 4 * q);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i) {
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) {
      const auto dot = S::from_i32(Dot::finish(sums[i][q], sum_of(i, q)));
      float* to = score + q * kSpan + (b + i) * kBlock;
      if constexpr (Kv::kMinima) {
        S::store(to, S::fma(dot, S::set1(own[i].scales[q]), S::set1(own[i].minima[q])));
      } else {
        const auto scales = Kv::template key_scales<S>(span.block[b + i]);
        S::store(to, S::mul(S::mul(dot, scales), S::set1(queries.scales[q])));
      }
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

// value[q] = value[q] * rescale + sum_t weight[q][t] v_t, tokens in order, for `Chunks` x 16
// columns from `column` on.
template <class S, class Kv, int N, int Chunks, bool Prefetch>
inline void add_floats(const Weights& weights, const Span& span, int blocks, int64_t head_dim,
                       int64_t column, float* value) {
  const int64_t row_bytes = Kv::value_pitch(head_dim), pitch = pad_to(head_dim, 16);
  const int64_t values = Kv::values_at(head_dim);
  constexpr int kRows = Kv::kRows;
  const Ahead ahead(span, column, 16 * Chunks, pitch, Kv::block_bytes(head_dim));
  typename S::F32x16 sums[Chunks][N];
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q)
      sums[c][q] =
          S::mul(S::load(value + q * pitch + column + 16 * c), S::set1(weights.rescale[q]));
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* row = span.block[b] + values;
    if constexpr (Prefetch) ahead.prefetch<S>(b);
    const float* w = weights.values + b * kBlock;
    for (int t = 0; t < kBlock; t += kRows, row += row_bytes) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        typename S::F32x16 v[Chunks];
#pragma GCC unroll 4
        for (int c = 0; c < Chunks; ++c) v[c] = Kv::template value<S>(row, column + 16 * c, r);
#pragma GCC unroll 12
        for (int q = 0; q < N; ++q) {
          const auto each = S::set1(w[q * kSpan + t + r]);
#pragma GCC unroll 4
          for (int c = 0; c < Chunks; ++c) sums[c][q] = S::fma(each, v[c], sums[c][q]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) S::store(value + q * pitch + column + 16 * c, sums[c][q]);
}

// As `add_floats`, from exact integer sums over the span: fma(float(sum), scale, value * rescale),
// plus the weighted minima, if there are any.
// `from`: where every block's codes of these columns begin; moved on to those of the next ones.
template <class S, class Kv, int N, int Chunks, bool Prefetch, class Values>
inline void add_codes(const Weights& weights, const Span& span, int blocks, int64_t head_dim,
                      int64_t column, Values* from, float* value) {
  using Dot = typename S::WideDot;
  const int64_t pitch = pad_to(head_dim, 16);
  const Ahead ahead(span, column, 16 * Chunks, pitch, Kv::block_bytes(head_dim));
  typename Dot::Acc sums[Chunks][N];
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) sums[c][q] = Dot::init();
  for (int b = 0; b < blocks; ++b) {
    if constexpr (Prefetch) ahead.prefetch<S>(b);
    const uint8_t* x = weights.codes + b * kBlock * 2;
#pragma GCC unroll 4
    for (int t = 0; t < kBlock / 4; ++t, x += 8) {
#pragma GCC unroll 4
      for (int c = 0; c < Chunks; ++c) {
        const auto v = from[b].template next<S>(t, c);
#pragma GCC unroll 12
        for (int q = 0; q < N; ++q) Dot::step(sums[c][q], v, x + q * kSpan * 2);
      }
    }
    from[b].skip(Chunks);
  }
#pragma GCC unroll 12
  for (int q = 0; q < N; ++q) {
    const auto scale = S::set1(weights.scales[q]), rescale = S::set1(weights.rescale[q]);
#pragma GCC unroll 4
    for (int c = 0; c < Chunks; ++c) {
      float* to = value + q * pitch + column + 16 * c;
      const auto sum = S::from_i32(Dot::finish(sums[c][q]));
      auto all = S::fma(sum, scale, S::mul(S::load(to), rescale));
      if constexpr (Kv::kMinima) all = S::add(all, S::set1(weights.minima[q]));
      S::store(to, all);
    }
  }
}

template <class S, class Kv, int N, bool Prefetch>
inline void add_values(const Weights& weights, const Span& span, int blocks, int64_t head_dim,
                       float* value) {
  const auto passes = [=]<int Chunks>(auto add) {
    int64_t c = 0, columns = pad_to(head_dim, 16);
    for (; c + 16 * Chunks <= columns; c += 16 * Chunks) add.template operator()<Chunks>(c);
    for (; c < columns; c += 16) add.template operator()<1>(c);
  };
  if constexpr (Kv::kInteger) {
    decltype(Kv::values(nullptr, 0)) from[kSpanBlocks];
    for (int b = 0; b < blocks; ++b) from[b] = Kv::values(span.block[b], head_dim);
    passes.template operator()<kAtOnce<S, N * S::WideDot::kSums>>([&]<int Chunks>(int64_t c) {
      add_codes<S, Kv, N, Chunks, Prefetch>(weights, span, blocks, head_dim, c, from, value);
    });
  } else {
    passes.template operator()<kAtOnce<S, N>>([&]<int Chunks>(int64_t c) {
      add_floats<S, Kv, N, Chunks, Prefetch>(weights, span, blocks, head_dim, c, value);
    });
  }
}

// A block of a float codec as f32, of a sparse one as the block that it was sealed from.
template <class S, class Kv>
inline void expand_block(const uint8_t* block, int64_t head_dim, uint8_t* to) {
  if constexpr (Kv::kInteger) {
    Kv::template expand<S>(block, to, head_dim);
  } else {
    auto* keys = reinterpret_cast<float*>(to);
    auto* values = reinterpret_cast<float*>(to + F32Kv::values_at(head_dim));
    for (int64_t d = 0; d < head_dim; ++d)
      S::store(keys + d * kBlock, Kv::template key<S>(block, d, d % Kv::kRows));
    const uint8_t* from = block + Kv::values_at(head_dim);
    for (int t = 0; t < kBlock; ++t) {
      const uint8_t* tokens = from + t / Kv::kRows * Kv::value_pitch(head_dim);
      for (int64_t c = 0; c < head_dim; c += 16, values += 16)
        S::store(values, Kv::template value<S>(tokens, c, t % Kv::kRows));
    }
  }
}

// The span's blocks, expanded, in `memory`.
template <class S, class Kv>
inline Span expand_span(const Span& span, int64_t head_dim, uint8_t* memory) {
  Span wide = span;
  const int64_t bytes = Kv::Expanded::block_bytes(head_dim);
  for (int b = 0; b < span.blocks; ++b) {
    expand_block<S, Kv>(span.block[b], head_dim, memory + b * bytes);
    wide.block[b] = wide.next[b] = memory + b * bytes;
  }
  return wide;
}

}  // namespace
}  // namespace lacewing
