// Attention of query rows against a paged KV cache of any codec: online softmax, no horizontal dot
// products, the same arithmetic for decoding and for prompts.
//
// Queries (row i, head j of the KV head's group) are numbered u = i * group_heads + j. A tile of
// them walks the tokens together, in batches whose sums fit the registers. A few queries read the
// cache's blocks as they are and prefetch; for many, each span of a float codec is first widened to
// f32 in L2, of a sparse one expanded. Integer codecs multiply integers: queries become int8,
// weights 0..128. What is computed for one query depends on its own tokens only, never on its
// neighbours:
//   - positions are cut at multiples of kSpan (one softmax update each) and kSegment (segments are
//     independent of each other and merged in order, so they can be given to several threads);
//   - a token outside a query's range has score -inf, weight 0, and leaves every sum as it is
//     (the cache holds finite values only); sums that may differ in the sign of a zero are
//     normalized by adding +0 at the end.
#pragma once

#include <type_traits>

#include "ops/attention_codes.h"
#include "ops/attention_kernels.h"

namespace lacewing {
namespace {

constexpr float kNoScore = -3.402823466e38f;  // lower than any score, but finite
constexpr int kMaxTile = 96;                  // queries
constexpr int kDirect = 8;                    // so many queries read the cache's blocks as they are

// Partial results over some tokens: sum_t e^(s_t - max) v_t and its weight, by slot of the tile.
struct Partial {
  float* max;     // [batches][16]
  float* weight;  // [slots][16]: lane sums of e^(s_t - max), tokens by lane
  float* value;   // [slots][pad16(head_dim)]
};

struct Batch {
  int slot, size;       // slots past the tile's last query repeat it
  int64_t first, stop;  // tokens that some query of it attends
};

// Calls f with a batch's size as a constant.
template <class S, bool Direct, class F>
LW_INLINE void with_size(int n, F f) {
  constexpr int kWide = S::kAttentionBatch;
  const auto call = [&]<int N>() {
    if constexpr (N <= kWide && (Direct ? N <= kDirect : N == kWide || N == kWide / 2))
      f.template operator()<N>();
  };
  switch (n) {
    case 1:
      return call.template operator()<1>();
    case 2:
      return call.template operator()<2>();
    case 3:
      return call.template operator()<3>();
    case 4:
      return call.template operator()<4>();
    case 6:
      return call.template operator()<6>();
    case 8:
      return call.template operator()<8>();
    case 12:
      return call.template operator()<12>();
  }
}

// The smallest size of a batch that takes `left` queries, or the largest there is.
template <class S>
int batch_size(int64_t left, bool direct) {
  constexpr int kWide = S::kAttentionBatch;
  if (!direct) return left <= kWide / 2 ? kWide / 2 : kWide;
  constexpr int kSizes[] = {1, 2, 3, 4, 6, 8};
  for (int n : kSizes)
    if (n <= kWide && left <= n) return n;
  return kWide;
}

// A tile of queries at work.
template <class S, class Kv>
class Tile {
 public:
  // Queries that fit into the scratch.
  static int64_t limit(int64_t head_dim) {
    const int64_t pitch = pad_to(head_dim, 16);
    const int64_t shared = sizeof(Shared) + 64 + kSpanBlocks * F32Kv::block_bytes(head_dim);
    const int64_t floats = query_floats(head_dim) + 2 * pitch + 32 + 2 * 16;
    const int64_t each = floats * static_cast<int64_t>(sizeof(float));
    const int64_t fit = (static_cast<int64_t>(kAttentionScratch) - shared) / each / 12 * 12;
    return fit < kMaxTile ? fit : kMaxTile;
  }

  Tile(const AttentionArgs& a, int64_t u0, int64_t queries)
      : a_(a),
        s_(*static_cast<Shared*>(a.scratch)),
        u0_(u0),
        queries_(queries),
        exponent_(a.scale * 1.44269504f) {
    direct_ = queries <= kDirect;
    pitch_ = pad_to(a.head_dim, 16);
    query_pitch_ = query_floats(a.head_dim);
    cut_batches();
    float* at = reinterpret_cast<float*>(&s_ + 1);
    query_ = at;
    segment_ = place(query_ + slots_ * query_pitch_);
    total_ = place(segment_.value + slots_ * pitch_);
    wide_ = reinterpret_cast<uint8_t*>(total_.value + slots_ * pitch_);
  }

  void attend(float* earlier) {
    gather(total_);
    if (earlier) merge(total_, place(earlier));
    store_outputs(total_);
  }

  void attend_partial(float* partial) { gather(place(partial)); }

  // Floats of the tile's partial results.
  int64_t partial_size() const { return batches_ * 16 + slots_ * (16 + pitch_); }

  // Segments [first, stop) of the sequence into their places in `partials`.
  void attend_part(int64_t first, int64_t stop, float* partials) {
    load_queries();
    for (int64_t i = first; i < stop; ++i) {
      const int64_t begin = i * kSegment > first_ ? i * kSegment : first_;
      if (begin < segment_end(i * kSegment))
        attend_segment(partial(partials, i), begin, segment_end(i * kSegment));
    }
  }

  void merge_parts(float* partials) {
    join_parts(partials);
    store_outputs(partial(partials, first_ / kSegment));
  }

  void join_parts(float* partials) {
    const int64_t first = first_ / kSegment, stop = (stop_ + kSegment - 1) / kSegment;
    const Partial total = partial(partials, first);
    for (int64_t i = first + 1; i < stop; ++i) merge(total, partial(partials, i));
  }

 private:
  struct Shared {
    alignas(64) float score[12][kSpan];
    alignas(64) uint8_t codes[12][kSpan];  // of weights
    float value_scale[kSpan], value_zero[kSpan], key_unit[16];
    float weight_scale[12][kSpanBlocks];
    float rescale[16], weight_minimum[16];
    alignas(64) int32_t powers[12][16];
    float scale[12];
    float query_scale[kMaxTile + 12];
    int32_t query_sum[kMaxTile + 12];
    int64_t first[kMaxTile + 12], last[kMaxTile + 12];  // tokens attended, by slot
    Batch batches[kMaxTile];
  };

  // Of one query: floats or codes; both, the codes of all behind the floats of all, with minima.
  static int64_t query_floats(int64_t head_dim) {
    return pad_to(head_dim, 16) + (Kv::kMinima ? pad_to(head_dim, 64) / 2 : 0);
  }

  int64_t segment_end(int64_t begin) const {
    const int64_t next = (begin / kSegment + 1) * kSegment;
    return next < stop_ ? next : stop_;
  }

  Partial place(float* p) const { return {p, p + batches_ * 16, p + batches_ * 16 + slots_ * 16}; }
  Partial partial(float* partials, int64_t i) const {
    return place(partials + i * partial_floats(a_.head_dim));
  }

  // ---- queries

  void cut_batches() {
    first_ = INT64_MAX, stop_ = 0;
    for (int64_t q = 0; q < queries_; q += s_.batches[batches_ - 1].size) {
      Batch& batch = s_.batches[batches_++];
      batch = {static_cast<int>(q), batch_size<S>(queries_ - q, direct_), INT64_MAX, 0};
      for (int i = 0; i < batch.size; ++i) {
        const int64_t last = a_.last + (a_.causal ? row_of(q + i) : 0);
        const int64_t first = last - a_.window + 1;
        s_.last[q + i] = last;
        s_.first[q + i] = a_.window > 0 && first > 0 ? first : 0;
        if (s_.first[q + i] < batch.first) batch.first = s_.first[q + i];
        if (last + 1 > batch.stop) batch.stop = last + 1;
      }
      slots_ = batch.slot + batch.size;
      if (batch.first < first_) first_ = batch.first;
      if (batch.stop > stop_) stop_ = batch.stop;
    }
    first_ = first_ / kBlock * kBlock;
  }

  int64_t number_of(int64_t slot) const { return u0_ + (slot < queries_ ? slot : queries_ - 1); }
  int64_t row_of(int64_t slot) const { return number_of(slot) / a_.group_heads; }
  int64_t head_of(int64_t slot) const { return number_of(slot) % a_.group_heads; }

  void load_queries() {
    for (int b = 0; b < batches_; ++b) {
      const Batch& batch = s_.batches[b];
      for (int i = 0; i < batch.size; ++i) {
        const int64_t slot = batch.slot + i;
        const float* from = a_.q + row_of(slot) * a_.q_stride + head_of(slot) * a_.head_dim;
        if constexpr (Kv::kMinima) {
          float* to = query_ + batch.slot * query_pitch_ + i * pitch_;
          for (int64_t d = 0; d < pitch_; ++d) to[d] = d < a_.head_dim ? from[d] * exponent_ : 0.0f;
          auto* codes = reinterpret_cast<int16_t*>(codes_of(batch));
          s_.query_scale[slot] =
              exponent_ *
              wide_query_codes<S>(from, a_.head_dim, codes + i * pad_to(a_.head_dim, 64));
        } else if constexpr (Kv::kInteger) {
          s_.query_scale[slot] =
              exponent_ * query_codes<S>(from, a_.head_dim, batch.size, codes_of(batch) + 4 * i,
                                         s_.query_sum + slot);
        } else {
          float* to = query_ + batch.slot * query_pitch_ + i;
          for (int64_t d = 0; d < a_.head_dim; ++d) to[d * batch.size] = from[d] * exponent_;
          if (a_.head_dim % 2) to[a_.head_dim * batch.size] = 0.0f;  // keys may lie in pairs
        }
      }
    }
  }

  int8_t* codes_of(const Batch& batch) const {
    float* to = query_ + batch.slot * query_pitch_ + (Kv::kMinima ? batch.size * pitch_ : 0);
    return reinterpret_cast<int8_t*>(to);
  }

  // ---- tokens

  void reset(const Partial& part) {
    for (int b = 0; b < batches_; ++b) S::store(part.max + 16 * b, S::set1(kNoScore));
    for (int64_t i = 0; i < slots_ * 16; i += 16) S::store(part.weight + i, S::zero());
    for (int64_t i = 0; i < slots_ * pitch_; i += 16) S::store(part.value + i, S::zero());
  }

  // Everything the tile's queries attend.
  void gather(const Partial& total) {
    load_queries();
    for (int64_t begin = first_; begin < stop_;) {
      const int64_t end = segment_end(begin);
      // Merging into nothing changes no bit: the first segment can start the total.
      const Partial& part = begin == first_ ? total : segment_;
      attend_segment(part, begin, end);
      if (begin != first_) merge(total, part);
      begin = end;
    }
  }

  // The tokens [begin, end) of one segment.
  void attend_segment(const Partial& part, int64_t begin, int64_t end) {
    reset(part);
    while (begin < end) {
      const int64_t next = (begin / kSpan + 1) * kSpan;
      const Span span = span_of(begin, next < end ? next : end);
      if (direct_)
        attend_span<true, Kv>(part, span);
      else if constexpr (std::is_void_v<typename Kv::Expanded>)
        attend_span<false, Kv>(part, span);
      else
        attend_span<false, typename Kv::Expanded>(part,
                                                  expand_span<S, Kv>(span, a_.head_dim, wide_));
      begin = span.end;
    }
  }

  Span span_of(int64_t begin, int64_t end) {
    Span span{begin, end, static_cast<int>((end - begin + kBlock - 1) / kBlock), {}, {}};
    const int64_t bytes = Kv::block_bytes(a_.head_dim);
    const int64_t first = begin / kBlock, last = (stop_ - 1) / kBlock;
    for (int b = 0; b < kSpanBlocks; ++b) {
      const int64_t next = first + span.blocks + b < last ? first + span.blocks + b : last;
      span.next[b] = a_.cache + a_.block_table[next] * bytes;
    }
    for (int b = 0; b < span.blocks; ++b) {
      span.block[b] = a_.cache + a_.block_table[first + b] * bytes;
      if constexpr (Kv::kInteger)
        S::store(s_.value_scale + b * kBlock, Kv::template value_scales<S>(span.block[b]));
      if constexpr (Kv::kMinima)
        S::store(s_.value_zero + b * kBlock, Kv::template value_zeros<S>(span.block[b]));
      if constexpr (Kv::kMinima) s_.key_unit[b] = Kv::channel_unit(span.block[b]);
    }
    return span;
  }

  template <bool Direct, class SpanKv>
  void attend_span(const Partial& part, const Span& span) {
    for (int b = 0; b < batches_; ++b) attend_batch<Direct, SpanKv>(part, b, span);
  }

  template <bool Direct, class SpanKv>
  void attend_batch(const Partial& part, int index, const Span& span) {
    const Batch& batch = s_.batches[index];
    const int64_t end = batch.stop < span.end ? batch.stop : span.end;
    if (end <= span.begin || batch.first >= span.end) return;
    const int blocks = static_cast<int>((end - span.begin + kBlock - 1) / kBlock);
    float* score = s_.score[0];
    float* value = part.value + batch.slot * pitch_;
    const Queries queries{query_ + batch.slot * query_pitch_, codes_of(batch),
                          Kv::kMinima ? s_.scale : s_.query_scale + batch.slot, s_.powers[0],
                          s_.query_sum + batch.slot};
    const Weights weights{score, s_.codes[0], s_.weight_scale[0], s_.weight_minimum, s_.rescale};
    if constexpr (Kv::kMinima) bound_queries(batch, span);
    with_size<S, Direct>(batch.size, [&]<int N>() {
      score_span<S, SpanKv, N, Direct>(queries, span, blocks, a_.head_dim, score);
      weigh(part, index, N, span.begin, blocks * kBlock);
      add_values<S, SpanKv, N, Direct>(weights, span, blocks, a_.head_dim, value);
    });
  }

  // Scales for 8-bit codes of the queries times the scales of channels, from the largest scales in
  // those of the span's blocks that a query attends.
  void bound_queries(const Batch& batch, const Span& span) {
    alignas(64) uint8_t largest[2 * kMaxHeadDim];
    const int64_t wide = 2 * pad_to(a_.head_dim, 64);
    const auto* query = reinterpret_cast<const uint8_t*>(codes_of(batch));
    Unit top{};
    for (int q = 0, from = 0, to = 0; q < batch.size; ++q, query += wide) {
      const int64_t first = s_.first[batch.slot + q] - span.begin;
      const int64_t stop = s_.last[batch.slot + q] + 1 - span.begin;
      const int begin = first > 0 ? static_cast<int>(first / kBlock) : 0;
      const int64_t blocks = (stop + kBlock - 1) / kBlock;
      const int end = blocks < span.blocks ? static_cast<int>(blocks) : span.blocks;
      if (q == 0 || begin != from || end != to)
        top = largest_scales(span, begin, end, wide, largest);
      from = begin, to = end;
      auto bits = S::set1_i16(0);
      for (int64_t c = 0; c < wide; c += 64)
        bits =
            S::or_u8(bits, S::abs_i16(S::mul_i16(S::load_u8(query + c), S::load_u8(largest + c))));
      const int width = S::width_i16(bits), kept = width > 7 ? width : 7;
      s_.scale[q] =
          s_.query_scale[batch.slot + q] * top.value * static_cast<float>(1 << (kept + 9));
      const float power = static_cast<float>(1 << (21 - kept)) * top.inverse;
      S::store_i32(s_.powers[q], shares_of_unit(power));
    }
  }

  struct Unit {
    float value, inverse;
  };
  // Half of the channels' largest scales in some blocks of the span, in the unit that is returned.
  Unit largest_scales(const Span& span, int begin, int end, int64_t wide, uint8_t* largest) const {
    float unit = 0.0f;
    for (int b = begin; b < end; ++b) unit = s_.key_unit[b] > unit ? s_.key_unit[b] : unit;
    const float inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
    int32_t shares[16];
    S::store_i32(shares, shares_of_unit(16384.0f * inverse));
    for (int64_t c = 0; c < wide; c += 64) {
      auto top = S::set1_i16(0);
      for (int b = begin; b < end; ++b) {
        const auto scales = S::load_u8(Kv::channel_scales(span.block[b]) + c);
        top = S::max_i16(top, S::mul_i16(scales, S::set1_i16(static_cast<int16_t>(shares[b]))));
      }
      S::store_u8(largest + c, top);
    }
    return {unit, inverse};
  }
  // The units of the span's blocks, times a factor; at most 2^14.
  typename S::I32x16 shares_of_unit(float factor) const {
    const auto share = S::mul(S::load(s_.key_unit), S::set1(factor));
    return S::to_i32(S::min(share, S::set1(16384.0f)));
  }

  // Tokens of the span outside of the slot's range get no weight.
  void mask(float* score, int64_t slot, int64_t begin, int64_t columns) {
    const int64_t first = s_.first[slot] - begin, stop = s_.last[slot] + 1 - begin;
    for (int64_t t = 0; t < first && t < columns; ++t) score[t] = -__builtin_inff();
    for (int64_t t = stop > 0 ? stop : 0; t < columns; ++t) score[t] = -__builtin_inff();
  }

  // Scores become weights 2^(score - max), for integer codecs codes of weight times the value's
  // scale; s_.rescale is what older sums must be multiplied by.
  void weigh(const Partial& part, int index, int size, int64_t begin, int64_t columns) {
    const int64_t slot = s_.batches[index].slot;
    float* maxima = part.max + 16 * index;
    const auto old = S::load(maxima);
    for (int q = 0; q < size; ++q) {
      float* score = s_.score[q];
      mask(score, slot + q, begin, columns);
      auto largest = S::set1(maxima[q]);
      for (int64_t t = 0; t < columns; t += 16) largest = S::max(S::load(score + t), largest);
      maxima[q] = S::hmax(largest);
    }
    S::store(s_.rescale, exp2_negative<S>(S::sub(old, S::load(maxima))));
    for (int q = 0; q < size; ++q) {
      float* score = s_.score[q];
      const auto max = S::set1(maxima[q]);
      float* sum = part.weight + 16 * (slot + q);
      auto weight = S::mul(S::load(sum), S::set1(s_.rescale[q]));
      [[maybe_unused]] auto minimum = S::zero();
      for (int64_t t = 0; t < columns; t += 16) {
        auto e = exp2_negative<S>(S::sub(S::load(score + t), max));
        weight = S::add(weight, e);
        if constexpr (Kv::kInteger) e = S::mul(e, S::load(s_.value_scale + t));
        if constexpr (Kv::kMinima) minimum = S::fma(e, S::load(s_.value_zero + t), minimum);
        S::store(score + t, e);
      }
      S::store(sum, weight);
      if constexpr (Kv::kMinima) s_.weight_minimum[q] = S::sum(minimum);
      if constexpr (Kv::kInteger) S::hmax_rows(s_.weight_scale[q], score);
    }
    if constexpr (Kv::kInteger) weight_codes<S>(s_.score[0], size, s_.weight_scale[0], s_.codes[0]);
  }

  // total = total + part, both brought to the larger maximum.
  void merge(const Partial& total, const Partial& part) {
    float old_factor[16], new_factor[16];
    const auto join = [&](float* t, const float* p, int q) {
      const auto kept = S::mul(S::load(t), S::set1(old_factor[q]));
      S::store(t, S::fma(S::load(p), S::set1(new_factor[q]), kept));
    };
    for (int b = 0; b < batches_; ++b) {
      float *t = total.max + 16 * b, *p = part.max + 16 * b;
      const auto old = S::load(t), fresh = S::load(p), max = S::max(old, fresh);
      S::store(old_factor, exp2_negative<S>(S::sub(old, max)));
      S::store(new_factor, exp2_negative<S>(S::sub(fresh, max)));
      S::store(t, max);
      for (int q = 0; q < s_.batches[b].size; ++q) {
        const int64_t slot = s_.batches[b].slot + q;
        join(total.weight + slot * 16, part.weight + slot * 16, q);
        for (int64_t d = slot * pitch_; d < (slot + 1) * pitch_; d += 16)
          join(total.value + d, part.value + d, q);
      }
    }
  }

  void store_outputs(const Partial& total) {
    for (int64_t slot = 0; slot < queries_; ++slot) {
      float* y = a_.out + row_of(slot) * a_.out_stride + head_of(slot) * a_.head_dim;
      const auto weight = S::set1(S::sum(S::load(total.weight + slot * 16)));
      const float* value = total.value + slot * pitch_;
      for_chunks(a_.head_dim, [=](int64_t d, int64_t lanes) {
        const auto mean = S::add(S::div(S::load(value + d), weight), S::zero());
        store_lanes<S>(y + d, mean, lanes);
      });
    }
  }

  const AttentionArgs& a_;
  Shared& s_;
  const int64_t u0_, queries_;
  const float exponent_;  // of queries, so that e^(scale score) becomes 2^score
  int64_t pitch_ = 0, query_pitch_ = 0, slots_ = 0;
  int64_t first_ = 0, stop_ = 0;  // tokens that some query attends; first_ begins a block
  int batches_ = 0;
  bool direct_ = false;
  float* query_;
  Partial segment_, total_;
  uint8_t* wide_;
};

// Calls f with every tile of the rows, and where its partial results begin.
template <class S, class Kv, class F>
void for_tiles(const AttentionArgs& a, F f) {
  const int64_t queries = a.rows * a.group_heads, limit = Tile<S, Kv>::limit(a.head_dim);
  int64_t partial = 0;
  for (int64_t u = 0; u < queries; u += limit) {
    Tile<S, Kv> tile(a, u, queries - u < limit ? queries - u : limit);
    f(tile, partial);
    partial += tile.partial_size();
  }
}

template <class S, class Kv>
void attention(const AttentionArgs& a) {
  for_tiles<S, Kv>(a, [&](Tile<S, Kv>& tile, int64_t partial) {
    tile.attend(a.earlier ? a.earlier + partial : nullptr);
  });
}

template <class S, class Kv>
void attend_partial(const AttentionArgs& a, float* partial) {
  for_tiles<S, Kv>(a, [&](Tile<S, Kv>& tile, int64_t at) { tile.attend_partial(partial + at); });
}

template <class S, class Kv>
void attend_segments(const AttentionArgs& a, int64_t first, int64_t stop, float* partials) {
  Tile<S, Kv>(a, 0, a.rows * a.group_heads).attend_part(first, stop, partials);
}

template <class S, class Kv>
void merge_segments(const AttentionArgs& a, float* partials) {
  Tile<S, Kv>(a, 0, a.rows * a.group_heads).merge_parts(partials);
}

template <class S, class Kv>
void join_segments(const AttentionArgs& a, float* partials) {
  Tile<S, Kv>(a, 0, a.rows * a.group_heads).join_parts(partials);
}

}  // namespace
}  // namespace lacewing
