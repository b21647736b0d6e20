// Attention of query rows against a paged f16 cache: online softmax, no horizontal dot products.
//
// Queries (row i, head j of the KV head's group) are numbered u = i * group_heads + j and taken
// kQueries at a time, so that every loaded piece of K and V serves all of them. What is computed
// for one query depends on its own tokens only, never on its neighbours:
//   - positions are cut at multiples of kSpan (one softmax update each) and kSegment (segments are
//     independent of each other and merged in order, so they could be given to several threads);
//   - a token outside a query's range has score -inf, weight 0, and leaves every sum as it is
//     (the cache holds finite values only); sums that may differ in the sign of a zero are
//     normalized by adding +0 at the end.
#pragma once

#include "core/kernels.h"
#include "ops/elementwise.h"
#include "ops/limits.h"
#include "ops/math.h"

namespace lacewing {
namespace {

constexpr int kQueries = 6;                   // 12 of AVX2's 16 registers are accumulators
constexpr int64_t kSpan = 128;                // tokens of one softmax update
constexpr int64_t kSegment = 512;             // tokens of one independent partial result
constexpr float kNoScore = -3.402823466e38f;  // lower than any score, but finite

// With few queries (decoding) several blocks at once hide the latency of the additions ...
template <class S, int N>
constexpr int kAtOnce = 4 * N <= S::kFloatSums   ? 4
                        : 2 * N <= S::kFloatSums ? 2
                                                 : 1;
// ... and the cache comes from far away.
template <int N>
constexpr bool kStreams = N <= 4;

// Partial results of kQueries queries over some tokens: sum_t e^(s_t - max) v_t and its weight.
struct Partial {
  float max[16];
  float weight[kQueries][16];  // lane sums of e^(s_t - max), tokens by lane
  float value[kQueries][kMaxHeadDim];
};

struct AttentionScratch {
  float query[kQueries][kMaxHeadDim + 8];  // + 8: copies of one lane lie in different cache banks
  float score[kQueries][kSpan];
  float rescale[16];
  int64_t first[kQueries], last[kQueries];  // tokens attended by each query
  Partial segment, total;
};
static_assert(sizeof(AttentionScratch) <= 256 * 1024);

// Scores of N queries against `Blocks` cache blocks: lanes are tokens, one chain over head_dim.
// While it runs it asks for as many bytes of each `ahead` (null: nothing).
template <class S, int N, int Blocks>
inline void score_blocks(AttentionScratch& s, const uint16_t* const* keys,
                         const uint16_t* const* ahead, int64_t head_dim, int64_t column) {
  typename S::F32x16 sums[Blocks][N];
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q) sums[b][q] = S::zero();
  for (int64_t d = 0; d < head_dim; ++d) {
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      const auto key = S::load_f16(keys[b] + d * kBlock);
#pragma GCC unroll 8
      for (int q = 0; q < N; ++q) sums[b][q] = S::fma(S::set1(s.query[q][d]), key, sums[b][q]);
    }
    if constexpr (kStreams<N>)  // every line once: keys on even d, values on odd d
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b)
        S::prefetch_t0(ahead[2 * b + (d & 1)] + (d & ~int64_t{1}) * kBlock);
  }
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q) S::store(s.score[q] + column + b * kBlock, sums[b][q]);
}

// `Blocks` blocks from block b of the sequence on; the keys kAhead blocks further on and the values
// of these blocks will be wanted soon.
template <class S, int N, int Blocks>
inline void score_from(const AttentionArgs& a, AttentionScratch& s, int64_t b, int64_t last_block,
                       int64_t column) {
  constexpr int64_t kAhead = 4;
  const int64_t head_block = a.head_dim * kBlock, stride = a.n_kv_heads * head_block;
  const int64_t head = a.kv_head * head_block;
  const uint16_t *keys[Blocks], *ahead[2 * Blocks];
  for (int i = 0; i < Blocks; ++i) {
    const int64_t next = b + i + kAhead < last_block ? b + i + kAhead : last_block;
    keys[i] = a.k + head + a.block_table[b + i] * stride;
    ahead[2 * i] = a.k + head + a.block_table[next] * stride;
    ahead[2 * i + 1] = a.v + head + a.block_table[b + i] * stride;
  }
  score_blocks<S, N, Blocks>(s, keys, ahead, a.head_dim, column);
}

template <class S, int N>
inline void score_span(const AttentionArgs& a, AttentionScratch& s, int64_t begin, int64_t end) {
  constexpr int kBlocks = kAtOnce<S, N>;
  const int64_t last_block = s.last[N - 1] / kBlock;
  int64_t t = begin;
  for (; t + (kBlocks - 1) * kBlock < end; t += kBlocks * kBlock)
    score_from<S, N, kBlocks>(a, s, t / kBlock, last_block, t - begin);
  for (; t < end; t += kBlock) score_from<S, N, 1>(a, s, t / kBlock, last_block, t - begin);
}

// Tokens of the span [begin, end) outside of [first, last] of query q get no weight.
template <class S>
inline void mask_scores(AttentionScratch& s, int q, int64_t begin, int64_t padded_end) {
  float* score = s.score[q];
  for (int64_t t = begin; t < s.first[q] && t < padded_end; ++t)
    score[t - begin] = -__builtin_inff();
  for (int64_t t = s.last[q] + 1 > begin ? s.last[q] + 1 : begin; t < padded_end; ++t)
    score[t - begin] = -__builtin_inff();
}

// Scores become weights e^(scale (score - max)); s.rescale is what older sums must be multiplied
// by.
template <class S>
inline void weigh_span(AttentionScratch& s, Partial& part, int n, float scale, int64_t begin,
                       int64_t end) {
  const int64_t columns = (end - begin + kBlock - 1) / kBlock * kBlock;
  const auto old = S::load(part.max), factor = S::set1(scale);
  for (int q = 0; q < n; ++q) {
    mask_scores<S>(s, q, begin, begin + columns);
    auto largest = S::set1(part.max[q]);
    for (int64_t t = 0; t < columns; t += 16) largest = S::max(S::load(s.score[q] + t), largest);
    part.max[q] = S::hmax(largest);
  }
  S::store(s.rescale, exp<S>(S::mul(S::sub(old, S::load(part.max)), factor)));
  for (int q = 0; q < n; ++q) {
    const auto max = S::set1(part.max[q]);
    auto weight = S::mul(S::load(part.weight[q]), S::set1(s.rescale[q]));
    for (int64_t t = 0; t < columns; t += 16) {
      const auto e = exp<S>(S::mul(S::sub(S::load(s.score[q] + t), max), factor));
      S::store(s.score[q] + t, e);
      weight = S::add(weight, e);
    }
    S::store(part.weight[q], weight);
  }
}

// value = value * rescale + sum_t weight_t v_t, tokens in order, for `Chunks` x 16 of head_dim.
template <class S, int N, int Chunks>
inline void add_values(const AttentionArgs& a, AttentionScratch& s, Partial& part, int64_t begin,
                       int64_t end, int64_t column) {
  const int64_t head_block = a.head_dim * kBlock, stride = a.n_kv_heads * head_block;
  const uint16_t* base = a.v + a.kv_head * head_block + column;
  const int64_t blocks = (end - begin + kBlock - 1) / kBlock;
  const int32_t* table = a.block_table + begin / kBlock;
  typename S::F32x16 sums[Chunks][N];
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q)
      sums[c][q] = S::mul(S::load(part.value[q] + column + 16 * c), S::set1(s.rescale[q]));
  for (int64_t b = 0; b < blocks; ++b) {
    const uint16_t* values = base + table[b] * stride;
    for (int t = 0; t < kBlock; ++t) {
#pragma GCC unroll 4
      for (int c = 0; c < Chunks; ++c) {
        const auto value = S::load_f16(values + t * a.head_dim + 16 * c);
#pragma GCC unroll 8
        for (int q = 0; q < N; ++q)
          sums[c][q] = S::fma(S::set1(s.score[q][b * kBlock + t]), value, sums[c][q]);
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q) S::store(part.value[q] + column + 16 * c, sums[c][q]);
}

template <class S, int N>
inline void add_span_values(const AttentionArgs& a, AttentionScratch& s, Partial& part,
                            int64_t begin, int64_t end) {
  constexpr int kChunks = kAtOnce<S, N>;
  int64_t column = 0;
  for (; column + 16 * kChunks <= a.head_dim; column += 16 * kChunks)
    add_values<S, N, kChunks>(a, s, part, begin, end, column);
  for (; column < a.head_dim; column += 16) add_values<S, N, 1>(a, s, part, begin, end, column);
}

template <class S>
inline void reset(Partial& part, int n, int64_t head_dim) {
  S::store(part.max, S::set1(kNoScore));
  for (int q = 0; q < n; ++q) {
    S::store(part.weight[q], S::zero());
    for (int64_t d = 0; d < head_dim; d += 16) S::store(part.value[q] + d, S::zero());
  }
}

// total = total + segment, both brought to the larger maximum.
template <class S>
inline void merge(Partial& total, const Partial& part, int n, int64_t head_dim, float scale) {
  float old_factor[16], new_factor[16];
  const auto factor = S::set1(scale);
  const auto old = S::load(total.max), fresh = S::load(part.max), max = S::max(old, fresh);
  S::store(old_factor, exp<S>(S::mul(S::sub(old, max), factor)));
  S::store(new_factor, exp<S>(S::mul(S::sub(fresh, max), factor)));
  S::store(total.max, max);
  const auto join = [&](float* t, const float* p, int q) {
    const auto kept = S::mul(S::load(t), S::set1(old_factor[q]));
    S::store(t, S::fma(S::load(p), S::set1(new_factor[q]), kept));
  };
  for (int q = 0; q < n; ++q) {
    join(total.weight[q], part.weight[q], q);
    for (int64_t d = 0; d < head_dim; d += 16) join(total.value[q] + d, part.value[q] + d, q);
  }
}

template <class S>
inline void copy_queries(const AttentionArgs& a, AttentionScratch& s, int64_t u0, int n) {
  for (int q = 0; q < n; ++q) {
    const int64_t row = (u0 + q) / a.group_heads, head = (u0 + q) % a.group_heads;
    const float* from = a.q + row * a.q_stride + head * a.head_dim;
    for_chunks(a.head_dim, [&](int64_t d, int64_t lanes) {
      store_lanes<S>(s.query[q] + d, load_lanes<S>(from + d, lanes), lanes);
    });
    s.last[q] = a.last + row;
    const int64_t first = s.last[q] - a.window + 1;
    s.first[q] = a.window > 0 && first > 0 ? first : 0;
  }
}

template <class S>
inline void store_outputs(const AttentionArgs& a, AttentionScratch& s, int64_t u0, int n) {
  for (int q = 0; q < n; ++q) {
    const int64_t row = (u0 + q) / a.group_heads, head = (u0 + q) % a.group_heads;
    float* y = a.out + row * a.out_stride + head * a.head_dim;
    const auto weight = S::set1(S::sum(S::load(s.total.weight[q])));
    const float* value = s.total.value[q];
    for_chunks(a.head_dim, [=](int64_t d, int64_t lanes) {
      const auto mean = S::add(S::div(S::load(value + d), weight), S::zero());
      store_lanes<S>(y + d, mean, lanes);
    });
  }
}

// The tokens [begin, end) of one segment into `part`.
template <class S, int N>
inline void attend_segment(const AttentionArgs& a, AttentionScratch& s, Partial& part,
                           int64_t begin, int64_t end) {
  reset<S>(part, N, a.head_dim);
  while (begin < end) {
    const int64_t next_span = (begin / kSpan + 1) * kSpan;
    const int64_t span_end = next_span < end ? next_span : end;
    score_span<S, N>(a, s, begin, span_end);
    weigh_span<S>(s, part, N, a.scale, begin, span_end);
    add_span_values<S, N>(a, s, part, begin, span_end);
    begin = span_end;
  }
}

// Queries u0..u0 + N.
template <class S, int N>
inline void attend(const AttentionArgs& a, int64_t u0) {
  auto& s = *static_cast<AttentionScratch*>(a.scratch);
  copy_queries<S>(a, s, u0, N);
  const int64_t first = s.first[0] / kBlock * kBlock, stop = s.last[N - 1] + 1;
  for (int64_t begin = first; begin < stop;) {
    const int64_t next = (begin / kSegment + 1) * kSegment;
    const int64_t end = next < stop ? next : stop;
    // Merging into nothing changes no bit: the first segment can start the total.
    Partial& part = begin == first ? s.total : s.segment;
    attend_segment<S, N>(a, s, part, begin, end);
    if (begin != first) merge<S>(s.total, part, N, a.head_dim, a.scale);
    begin = end;
  }
  store_outputs<S>(a, s, u0, N);
}

// Reads up to 30 bytes past the last V block if head_dim is no multiple of 16.
template <class S>
void attention(const AttentionArgs& a) {
  static_assert(kQueries == 6);
  const int64_t queries = a.rows * a.group_heads;
  int64_t u = 0;
  for (; u + 6 <= queries; u += 6) attend<S, 6>(a, u);
  switch (queries - u) {
    case 5:
      return attend<S, 5>(a, u);
    case 4:
      return attend<S, 4>(a, u);
    case 3:
      return attend<S, 3>(a, u);
    case 2:
      return attend<S, 2>(a, u);
    case 1:
      return attend<S, 1>(a, u);
  }
}

}  // namespace
}  // namespace lacewing
