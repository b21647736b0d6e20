// Merging a finished prompt's keys and values (Elastic Cache, arXiv 2407.17678). The most important
// tokens are anchors; the cache entry of an anchor becomes the mean of its own and of those of the
// tokens that are nearest to it, all weighted alike. As in the authors' program, tokens that are
// kept for their place (the first and the last) take no others in. Unlike there, importance is of a
// KV head, not of a layer, and counts the last queries only.
//
// Every sum is one chain in one stated order: scores over head_dim, importance over queries (rows,
// then heads), means over tokens. A softmax sums its weights lane by lane, then over the lanes.
#pragma once

#include "core/kernels.h"
#include "formats/kv.h"
#include "ops/elementwise.h"
#include "ops/largest.h"
#include "ops/math.h"

namespace lacewing {
namespace {

// One prompt's merging at work.
template <class S, class Kv>
class Merging {
 public:
  explicit Merging(const MergeArgs& a)
      : a_(a), columns_(pad_to(a.tokens, kBlock)), exponent_(a.scale * 1.44269504f) {
    const int64_t pitch = pad_to(a.head_dim, 16);
    keys_ = static_cast<float*>(a.scratch);
    score_ = keys_ + pitch * columns_;
    importance_ = score_ + kMergeQueries * columns_;
    k_ = importance_ + columns_, v_ = k_ + pitch;
    k_sum_ = v_ + pitch, v_sum_ = k_sum_ + pitch;
    kept_ = reinterpret_cast<int32_t*>(v_sum_ + pitch);
  }

  void merge() {
    widen_keys();
    for (int64_t t = 0; t < columns_; t += 16) S::store(importance_ + t, S::zero());
    for (int64_t u = 0; u < a_.rows * a_.group_heads; u += kMergeQueries) add_importance(u);
    keep_largest(importance_, a_.tokens, kMergeFirst, kMergeLast, a_.keep, score_, kept_);
    int64_t next = kMergeFirst;  // the first token that no anchor has taken
    for (int64_t i = 0; i < a_.keep; ++i) {
      if (i < kMergeFirst || i >= a_.keep - kMergeLast) {
        write_mean(i, kept_[i], kept_[i] + 1);
      } else {
        const int64_t stop = bucket_stop(i);
        write_mean(i, next, stop);
        next = stop;
      }
    }
  }

 private:
  void load(int64_t t) {
    const uint8_t* block = a_.cache + a_.block_table[t / kBlock] * Kv::block_bytes(a_.head_dim);
    Kv::template load<S>(block, t % kBlock, k_, v_, a_.head_dim);
  }

  // Keys as [block][head_dim][16].
  void widen_keys() {
    for (int64_t t = 0; t < columns_; ++t) {
      if (t < a_.tokens) load(t);
      float* to = keys_ + t / kBlock * kBlock * a_.head_dim + t % kBlock;
      for (int64_t d = 0; d < a_.head_dim; ++d) to[d * kBlock] = t < a_.tokens ? k_[d] : 0.0f;
    }
  }

  // Of queries u..u + kMergeQueries - 1, numbered by row, then head.
  void add_importance(int64_t u) {
    const int64_t left = a_.rows * a_.group_heads - u;
    const int64_t queries = left < kMergeQueries ? left : kMergeQueries;
    const float* q[kMergeQueries];
    for (int64_t i = 0; i < kMergeQueries; ++i) {
      const int64_t n = u + (i < queries ? i : queries - 1);
      q[i] = a_.q + n / a_.group_heads * a_.q_stride + n % a_.group_heads * a_.head_dim;
    }
    for (int64_t t = 0; t < columns_; t += kBlock) score_block(q, t);
    for (int64_t i = 0; i < queries; ++i)
      add_weights(score_ + i * columns_, a_.tokens - a_.rows + (u + i) / a_.group_heads);
  }

  void score_block(const float* const* q, int64_t t) {
    const float* keys = keys_ + t * a_.head_dim;
    typename S::F32x16 sums[kMergeQueries];
#pragma GCC unroll 8
    for (int i = 0; i < kMergeQueries; ++i) sums[i] = S::zero();
    for (int64_t d = 0; d < a_.head_dim; ++d) {
      const auto key = S::load(keys + d * kBlock);
#pragma GCC unroll 8
      for (int i = 0; i < kMergeQueries; ++i) sums[i] = S::fma(S::set1(q[i][d]), key, sums[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kMergeQueries; ++i) S::store(score_ + i * columns_ + t, sums[i]);
  }

  // Softmax over the positions up to `last`.
  void add_weights(float* score, int64_t last) {
    for (int64_t t = last + 1; t < columns_; ++t) score[t] = -__builtin_inff();
    auto largest = S::load(score), sum = S::zero();
    for (int64_t t = 16; t < columns_; t += 16) largest = S::max(S::load(score + t), largest);
    const auto max = S::set1(S::hmax(largest)), factor = S::set1(exponent_);
    for (int64_t t = 0; t < columns_; t += 16) {
      const auto e = exp2_negative<S>(S::mul(S::sub(S::load(score + t), max), factor));
      sum = S::add(sum, e);
      S::store(score + t, e);
    }
    const float total = S::sum(sum);  // 0 if a query is not finite: it says nothing then
    const auto inverse = S::set1(total > 0.0f ? 1.0f / total : 0.0f);
    for (int64_t t = 0; t < columns_; t += 16) {
      const auto others = S::load(importance_ + t);
      S::store(importance_ + t, S::fma(S::load(score + t), inverse, others));
    }
  }

  // Behind the last token that is nearer to anchor i than to the next one, or as near.
  int64_t bucket_stop(int64_t i) const {
    if (i + 1 == a_.keep - kMergeLast) return a_.tokens - kMergeLast;
    return (int64_t{kept_[i]} + kept_[i + 1]) / 2 + 1;
  }

  // The mean of tokens [begin, end) becomes token `to`.
  void write_mean(int64_t to, int64_t begin, int64_t end) {
    for (int64_t d = 0; d < a_.head_dim; ++d) k_sum_[d] = v_sum_[d] = 0.0f;
    for (int64_t t = begin; t < end; ++t) {
      load(t);
      add<S>(k_, a_.head_dim, k_sum_);
      add<S>(v_, a_.head_dim, v_sum_);
    }
    const float count = static_cast<float>(end - begin);
    for (int64_t d = 0; d < a_.head_dim; ++d) k_sum_[d] /= count, v_sum_[d] /= count;
    uint8_t* block = a_.out + a_.out_table[to / kBlock] * Kv::block_bytes(a_.head_dim);
    Kv::template store<S>(k_sum_, v_sum_, block, to % kBlock, a_.head_dim);
  }

  const MergeArgs& a_;
  const int64_t columns_;  // tokens, and what fills up their last block
  const float exponent_;   // e^(scale x) = 2^(exponent x)
  float *keys_, *score_, *importance_;
  float *k_, *v_, *k_sum_, *v_sum_;
  int32_t* kept_;
};

template <class S, class Kv>
void merge(const MergeArgs& a) {
  Merging<S, Kv>(a).merge();
}

}  // namespace
}  // namespace lacewing
