// Which blocks a query row attends, guessed from the labels of the keys (formats/labels.h). Scores
// of labels are exact integers and the float steps have one order, so every ISA chooses alike.
#pragma once

#include "core/kernels.h"
#include "formats/labels.h"
#include "ops/attention_codes.h"
#include "ops/attention_kernels.h"
#include "ops/largest.h"

namespace lacewing {
namespace {

// Largest scores of N heads in each block of a label block, among the first `tokens` of every
// block, a multiple of `Tokens`: [head][16 blocks], `pitch` apart. `next`: the label block that
// will be wanted next.
template <class S, int N, int Tokens, bool Prefetch>
inline void largest_scores(const uint8_t* labels, const uint8_t* next, int64_t tokens,
                           const int8_t* query, const int32_t* sums, int64_t groups, float* score,
                           int64_t pitch) {
  using Dot = typename S::template Dot<128, 255>;
  typename S::I32x16 largest[N];
#pragma GCC unroll 4
  for (int q = 0; q < N; ++q) largest[q] = S::set1_i32(INT32_MIN);
  for (int64_t t = 0; t < tokens; t += Tokens) {
    typename Dot::Acc dot[Tokens][N];
#pragma GCC unroll 4
    for (int i = 0; i < Tokens; ++i)
#pragma GCC unroll 4
      for (int q = 0; q < N; ++q) dot[i][q] = Dot::init(sums[q]);
    const int8_t* x = query;
    const uint8_t* ahead = next + t * groups * 64;  // in the order of the address
    for (int64_t g = 0; g < groups; ++g, x += 4 * N, ahead += 64 * Tokens) {
#pragma GCC unroll 4
      for (int i = 0; i < Tokens; ++i) {
        const auto codes = S::load_u8(Labels::codes(labels, g, t + i));
        if constexpr (Prefetch) S::prefetch_t0(ahead + 64 * i);
#pragma GCC unroll 4
        for (int q = 0; q < N; ++q) Dot::step(dot[i][q], codes, x + 4 * q);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Tokens; ++i)
#pragma GCC unroll 4
      for (int q = 0; q < N; ++q)
        largest[q] = S::max_i32(largest[q], Dot::finish(dot[i][q], sums[q]));
  }
#pragma GCC unroll 4
  for (int q = 0; q < N; ++q) S::store(score + q * pitch, S::from_i32(largest[q]));
}

// One query row's choice at work.
template <class S>
class Selection {
 public:
  explicit Selection(const SelectArgs& a)
      : a_(a),
        blocks_(a.last / kBlock + 1),
        pitch_(pad_to(blocks_, 16)),
        importance_(static_cast<float*>(a.scratch)),
        score_(importance_ + pitch_),
        factor_(score_ + a.group_heads * pitch_),
        sum_(reinterpret_cast<int32_t*>(factor_ + a.group_heads)),
        codes_(reinterpret_cast<int8_t*>(sum_ + a.group_heads)) {}

  int64_t choose() {
    if (blocks_ <= a_.budget) {
      for (int64_t b = 0; b < blocks_; ++b) a_.chosen[b] = static_cast<int32_t>(b);
      return blocks_;
    }
    load_queries();
    for (int64_t at = 0; at < blocks_; at += 16) score_blocks(at);
    score_last_block();
    for (int64_t j = 0; j < a_.group_heads; ++j) add_importance(j);
    keep_largest(importance_, blocks_, a_.sinks, a_.recent, a_.budget, score_, a_.chosen);
    return a_.budget;
  }

 private:
  // Calls f with the size of each batch of heads, as a constant, and its first head.
  template <class F>
  void for_batches(F f) const {
    int64_t j = 0;
    for (; j + 4 <= a_.group_heads; j += 4) f.template operator()<4>(j);
    if (a_.group_heads & 2) f.template operator()<2>(j), j += 2;
    if (a_.group_heads & 1) f.template operator()<1>(j);
  }

  const int8_t* codes_of(int64_t head) const { return codes_ + head * a_.count; }

  // Query labels q_c * scale_c as int8 [r/4][heads of the batch][4], and what a softmax in base 2
  // multiplies their integer scores by.
  void load_queries() {
    for_batches([&]<int N>(int64_t first) {
      for (int i = 0; i < N; ++i) {
        const int64_t j = first + i;
        float label[kMaxLabelChannels];
        for (int64_t c = 0; c < a_.count; ++c)
          label[c] = a_.q[j * a_.head_dim + a_.channels[c]] * a_.channel_scales[c];
        int8_t* to = codes_ + first * a_.count + 4 * i;
        const float step = query_codes<S>(label, a_.count, N, to, sum_ + j);
        const float factor = step * a_.scale * 1.44269504f;
        factor_[j] = factor < 3.402823466e38f ? factor : 3.402823466e38f;
      }
    });
  }

  const uint8_t* labels_at(int64_t block) const {
    return a_.labels + a_.label_table[block / 16] * label_bytes(a_.count);
  }

  // The first batch of heads reads the labels from memory, the others find them in L1.
  void score_blocks(int64_t at) {
    const uint8_t* labels = labels_at(at);
    const uint8_t* next = labels_at(at + 16 < blocks_ ? at + 16 : at);
    const int64_t groups = a_.count / 4;
    for_batches([&]<int N>(int64_t j) {
      const auto run = j ? largest_scores<S, N, kAtOnce<S, N>, false>
                         : largest_scores<S, N, kAtOnce<S, N>, true>;
      run(labels, next, kBlock, codes_of(j), sum_ + j, groups, score_ + j * pitch_ + at, pitch_);
    });
  }

  // Only tokens up to the row count; blocks past the last one have no score.
  void score_last_block() {
    const int64_t at = (blocks_ - 1) / 16 * 16, tokens = a_.last % kBlock + 1;
    for_batches([&]<int N>(int64_t j) {
      float largest[N * 16];
      largest_scores<S, N, 1, false>(labels_at(at), nullptr, tokens, codes_of(j), sum_ + j,
                                     a_.count / 4, largest, 16);
      for (int q = 0; q < N; ++q) {
        float* score = score_ + (j + q) * pitch_;
        score[blocks_ - 1] = largest[q * 16 + blocks_ - 1 - at];
        for (int64_t b = blocks_; b < pitch_; ++b) score[b] = -__builtin_inff();
      }
    });
  }

  // Of one head: 2^(factor (score - max)) / their sum, lane by lane and then over the lanes.
  void add_importance(int64_t j) {
    float* score = score_ + j * pitch_;
    auto largest = S::load(score), sum = S::zero();
    for (int64_t b = 16; b < pitch_; b += 16) largest = S::max(largest, S::load(score + b));
    const auto max = S::set1(S::hmax(largest)), factor = S::set1(factor_[j]);
    for (int64_t b = 0; b < pitch_; b += 16) {
      const auto e = exp2_negative<S>(S::mul(S::sub(S::load(score + b), max), factor));
      sum = S::add(sum, e);
      S::store(score + b, e);
    }
    const auto inverse = S::set1(1.0f / S::sum(sum));
    for (int64_t b = 0; b < pitch_; b += 16) {
      const auto others = j ? S::load(importance_ + b) : S::zero();
      S::store(importance_ + b, S::fma(S::load(score + b), inverse, others));
    }
  }

  const SelectArgs& a_;
  const int64_t blocks_, pitch_;
  float *importance_, *score_;  // [pitch], [heads][pitch]
  float* factor_;               // [heads]
  int32_t* sum_;                // [heads], of codes
  int8_t* codes_;               // [heads][r]
};

template <class S>
int64_t select_blocks(const SelectArgs& a) {
  return Selection<S>(a).choose();
}

}  // namespace
}  // namespace lacewing
