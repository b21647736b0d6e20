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
#include "ops/quantize_rows.h"

namespace lacewing {
namespace {

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
  const float* values;    // [head_dim][N]; with minima: [N][pad16(head_dim)]
  const int8_t* codes;    // of integer codecs: [pad4(head_dim)/4][N][4]; i16 [N][pad64(head_dim)]
  const float* scales;    // [N]
  const int32_t* powers;  // [N][16], with minima: S::mul_i16 makes 8 bits of products
  const int32_t* sums;    // [N], of codes
};

// Weights of a batch's queries over a span.
struct Weights {
  const float* values;   // [N][kSpan]; integer codecs:
  const uint8_t* codes;  // [N][kSpan], as `weight_codes` orders them
  const float* scales;   // [N][kSpanBlocks], of codes
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

// Queries as the keys of the blocks from block b of the span on want them, whose channels have
// scales and minima: codes of query times scale, and sums of query times minimum.
template <int N, int Blocks>
struct BlockQueries {
  alignas(64) int8_t codes[Blocks][N][kMaxHeadDim];
  float minima[(Blocks * N + 7) / 8 * 8];  // [Blocks][N]
};

template <class S, class Kv, int N, int Blocks>
inline void add_minima(const Queries& queries, const Span& span, int b, int64_t head_dim,
                       float* to) {
  alignas(64) float rows[(Blocks * N + 7) / 8 * 8][16];
  const int64_t pitch = pad_to(head_dim, 16);
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i) {
    typename S::F32x16 sums[N];
    for (int q = 0; q < N; ++q) sums[q] = S::zero();
    for (int64_t c = 0; c < pitch; c += 16) {
      const auto minima = Kv::template channel_minima<S>(span.block[b + i], head_dim, c);
#pragma GCC unroll 12
      for (int q = 0; q < N; ++q)
        sums[q] = S::fma(S::load(queries.values + q * pitch + c), minima, sums[q]);
    }
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) S::store(rows[i * N + q], sums[q]);
  }
  for (int i = 0; i < Blocks * N; i += 8) S::sum_rows(to + i, rows[i]);
}

template <class S, class Kv, int N, int Blocks>
inline void scale_queries(const Queries& queries, const Span& span, int b, int64_t head_dim,
                          BlockQueries<N, Blocks>& to) {
  const int64_t wide = 2 * pad_to(head_dim, 64);  // bytes
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i) {
    const uint8_t* scales = Kv::channel_scales(span.block[b + i]);
    const auto* query = reinterpret_cast<const uint8_t*>(queries.codes);
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q, query += wide) {
      const auto power = S::set1_i16(static_cast<int16_t>(queries.powers[q * 16 + b + i]));
      const auto scaled = [&](int64_t c) {
        return S::mul_i16(S::mul_i16(S::load_u8(query + c), S::load_u8(scales + c)), power);
      };
      for (int64_t c = 0; c < wide; c += 128)
        S::store_u8(reinterpret_cast<uint8_t*>(to.codes[i][q]) + c / 2,
                    S::join_i16(scaled(c), scaled(c + 64)));
    }
  }
  add_minima<S, Kv, N, Blocks>(queries, span, b, head_dim, to.minima);
}

// As `score_floats`, from exact integer sums: (float(sum) * key's scale) * query's scale, or, with
// minima, fma(float(sum), query's scale, minimum).
template <class S, class Kv, int N, int Blocks, bool Prefetch>
inline void score_codes(const Queries& queries, const Span& span, int b, int64_t head_dim,
                        float* score) {
  using Dot = typename S::template Dot<Kv::kMinima ? 0 : 128, Kv::kMinima ? 15 : 255>;
  const int64_t steps = pad_to(head_dim, 4) / 4;
  if constexpr (Prefetch)
    if (b % 2 == 0)
      for (int64_t i = 0; i < Kv::block_bytes(head_dim); i += 64)
        S::prefetch_t1(span.next[b / 2] + i);
  [[maybe_unused]] BlockQueries<N, Kv::kMinima ? Blocks : 0> own;
  if constexpr (Kv::kMinima) scale_queries<S, Kv, N, Blocks>(queries, span, b, head_dim, own);
  const auto sum_of = [&](int q) { return Kv::kMinima ? 0 : queries.sums[q]; };
  typename Dot::Acc sums[Blocks][N];
  decltype(Kv::keys(nullptr, 0)) keys[Blocks];
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i) {
    keys[i] = Kv::keys(span.block[b + i], head_dim);
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) sums[i][q] = Dot::init(sum_of(q));
  }
  constexpr int kTogether = decltype(Kv::keys(nullptr, 0))::kTogether;
#pragma GCC unroll 4
  for (int64_t d = 0; d < steps; d += kTogether) {
#pragma GCC unroll 2
    for (int64_t e = d; e < d + kTogether; ++e) {
#pragma GCC unroll 4
      for (int i = 0; i < Blocks; ++i) {
        const int8_t* x = Kv::kMinima ? own.codes[i][0] + 4 * e : queries.codes + 4 * N * e;
        const auto codes = keys[i].template next<S>(static_cast<int>(e - d));
#pragma GCC unroll 12
        for (int q = 0; q < N; ++q)
          Dot::step(sums[i][q], codes, x + q * (Kv::kMinima ? kMaxHeadDim : 4));
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Blocks; ++i) {
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q) {
      const auto dot = S::from_i32(Dot::finish(sums[i][q], sum_of(q)));
      float* to = score + q * kSpan + (b + i) * kBlock;
      if constexpr (Kv::kMinima) {
        S::store(to, S::fma(dot, S::set1(queries.scales[q]), S::set1(own.minima[i * N + q])));
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

// As `add_floats`, from exact integer sums over every block: fma(float(sum), scale, value), then
// plus the weighted minima, if there are any.
// `from`: where every block's codes of these columns begin; moved on to those of the next ones.
template <class S, class Kv, int N, int Chunks, bool Prefetch, class Values>
inline void add_codes(const Weights& weights, const Span& span, int blocks, int64_t head_dim,
                      int64_t column, Values* from, float* value) {
  const int64_t pitch = pad_to(head_dim, 16);
  const Ahead ahead(span, column, 16 * Chunks, pitch, Kv::block_bytes(head_dim));
  typename S::F32x16 sums[Chunks][N];
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 12
    for (int q = 0; q < N; ++q)
      sums[c][q] =
          S::mul(S::load(value + q * pitch + column + 16 * c), S::set1(weights.rescale[q]));
  for (int b = 0; b < blocks; ++b) {
    if constexpr (Prefetch) ahead.prefetch<S>(b);
    const uint8_t* x = weights.codes + b / 4 * 64 + b % 4 * 4;
    typename S::I32x16 products[Chunks][N];
#pragma GCC unroll 4
    for (int t = 0; t < kBlock / 4; ++t, x += 16) {
#pragma GCC unroll 4
      for (int c = 0; c < Chunks; ++c) {
        const auto v = from[b].template next<S>(t, c);
#pragma GCC unroll 12
        for (int q = 0; q < N; ++q)
          products[c][q] = S::add_products(t ? products[c][q] : S::set1_i32(0), x + q * kSpan, v);
      }
    }
    from[b].skip(Chunks);
#pragma GCC unroll 4
    for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 12
      for (int q = 0; q < N; ++q)
        sums[c][q] = S::fma(S::from_i32(products[c][q]),
                            S::set1(weights.scales[q * kSpanBlocks + b]), sums[c][q]);
  }
#pragma GCC unroll 12
  for (int q = 0; q < N; ++q) {
#pragma GCC unroll 4
    for (int c = 0; c < Chunks; ++c) {
      if constexpr (Kv::kMinima) sums[c][q] = S::add(sums[c][q], S::set1(weights.minima[q]));
      S::store(value + q * pitch + column + 16 * c, sums[c][q]);
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
    passes.template operator()<kAtOnce<S, 2 * N>>([&]<int Chunks>(int64_t c) {
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
