// Unstructured sparse formats: parts `stream` uint8 and `offsets` int64 [strips + 1].
// A strip is one record per 64 inputs, back to back:
//   32 B   scales f16 [16] (integer formats)
//   128 B  bitmaps: 16 x little-endian uint64, bit 4*o+i of block b: the weight is there
//          bf16: 32 x little-endian uint32, bit 2*o+i of block b
//   values bf16: two bytes each, in block and bit order
//          w8: one byte each
//          w4: blocks 0..7 in the low nibbles, blocks 8..15 in the high nibbles of the same bytes
//   padded to an even length
// Loads of 64 bytes may run past a strip's end: 64 spare bytes follow the last one.
#pragma once

#include "formats/traits.h"

namespace lacewing {
namespace {

inline constexpr int kBitmapBytes = 128;

// What the streams share. A decoder of one also tells kHead, the bytes of a record before its
// values, and values(record), how many bytes those are (for the check of hostile bytes).
template <int Head>
struct Stream {
  static constexpr int kPad = 64;
  static constexpr bool kSparse = true;
  static constexpr bool kRowScale = false;
  static constexpr int kParts = 2;
  static constexpr const char* kPartNames[kMaxParts] = {"stream", "offsets"};
  static constexpr int kTileBytes[kMaxParts] = {0, 0};
  static constexpr int kHead = Head;
  static constexpr int64_t kMaxLines = 36;  // of a record with nothing left out

  static LW_INLINE const uint8_t* begin(const PackedTensor& w, int64_t strip) {
    return w.parts[0] + load_u64(w.parts[1] + 8 * strip);
  }
  // Cache lines per record, on average over the strip. Every line is prefetched once, in a run when
  // a record begins. Prefetching beside each expanded block asked for every line twice at half of
  // the weights: 5-10 % slower there (22 % for 4 bits at 70 % zeros).
  static LW_INLINE int64_t lines(const PackedTensor& w, int64_t strip) {
    const int64_t bytes = begin(w, strip + 1) - begin(w, strip);
    const int64_t count = (bytes * kPad / round_up(w.k, kPad) + 63) / 64;
    return count < kMaxLines ? count : kMaxLines;  // a strip may claim any length
  }
  template <class S>
  static LW_INLINE void prefetch_record(const uint8_t* record, int64_t lines) {
    if constexpr (S::kPrefetch)
      for (int64_t i = 0; i < lines; ++i) prefetch_stream<S>(record + 64 * i);
  }
  // Set bits of the record's bitmaps that begin at byte `at`, over `bytes` bytes.
  static int64_t count(const uint8_t* record, int at, int bytes) {
    int64_t n = 0;
    for (int i = 0; i < bytes; i += 8) n += __builtin_popcountll(load_u64(record + at + i));
    return n;
  }
};

struct Bf16sp : Stream<kBitmapBytes> {
  static constexpr int kGroup = 0;

  struct Cursor {
    const uint8_t* bitmap;
    const uint8_t* values;
    const uint8_t* head_end;
    int64_t lines;
  };
  static LW_INLINE Cursor at_record(const uint8_t* record, int64_t lines) {
    return {record, record + kHead, record + kHead, lines};
  }
  static LW_INLINE Cursor open(const PackedTensor& w, int64_t strip) {
    return at_record(begin(w, strip), lines(w, strip));
  }
  static int64_t values(const uint8_t* record) { return 2 * count(record, 0, kBitmapBytes); }

  template <class S>
  static LW_INLINE void pair(Cursor& c, typename S::F32x16& even, typename S::F32x16& odd) {
    const auto v = S::expand_u16(c.bitmap, c.values);
    even = S::bf16_even(v);
    odd = S::bf16_odd(v);
    c.bitmap += 4;
    if (c.bitmap == c.head_end) {
      prefetch_record<S>(c.values, c.lines);
      c = at_record(c.values, c.lines);
    }
  }
};

template <int G>
struct SparseParts : Stream<32 + kBitmapBytes> {
  static_assert(G == 64);
  static constexpr int kGroup = G;
  static constexpr bool kHasMin = false;

  struct Cursor {
    const uint8_t* record;
    int64_t lines;
  };
  static LW_INLINE Cursor open(const PackedTensor& w, int64_t strip) {
    return {SparseParts::begin(w, strip), SparseParts::lines(w, strip)};
  }
  template <class S>
  static LW_INLINE typename S::F32x16 scale(const Cursor& c) {
    return S::load_f16(as_f16(c.record));
  }
  static LW_INLINE const uint8_t* bitmap(const uint8_t* record, int block) {
    return record + 32 + 8 * block;
  }
  static LW_INLINE const uint8_t* even(const uint8_t* record, const uint8_t* end) {
    return end + ((end - record) & 1);
  }
};

template <int G>
struct W8sp : SparseParts<G> {
  static constexpr int kZeroPoint = 128, kMaxCode = 255;
  using typename SparseParts<G>::Cursor;
  static int64_t values(const uint8_t* record) {
    return (W8sp::count(record, 32, kBitmapBytes) + 1) & ~int64_t{1};
  }

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
    const uint8_t* p = c.record + W8sp::kHead;
    W8sp::template prefetch_record<S>(c.record, c.lines);
#pragma GCC unroll 2
    for (int b = 0; b < G / 4; ++b) {
      f(b, S::expand(kZeroPoint, W8sp::bitmap(c.record, b), p));
    }
    c.record = W8sp::even(c.record, p);
  }
};

template <int G>
struct W4sp : SparseParts<G> {
  static constexpr int kZeroPoint = 8, kMaxCode = 15;
  using typename SparseParts<G>::Cursor;
  static int64_t values(const uint8_t* record) {
    const int64_t lo = W4sp::count(record, 32, kBitmapBytes / 2);
    const int64_t hi = W4sp::count(record, 32 + kBitmapBytes / 2, kBitmapBytes / 2);
    return ((lo > hi ? lo : hi) + 1) & ~int64_t{1};
  }

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
    const uint8_t* lo = c.record + W4sp::kHead;
    const uint8_t* hi = lo;
    W4sp::template prefetch_record<S>(c.record, c.lines);
#pragma GCC unroll 2
    for (int b = 0; b < G / 8; ++b) {
      f(b, S::expand_lo4(kZeroPoint, W4sp::bitmap(c.record, b), lo));
      f(b + G / 8, S::expand_hi4(kZeroPoint, W4sp::bitmap(c.record, b + G / 8), hi));
    }
    c.record = W4sp::even(c.record, lo > hi ? lo : hi);
  }
};

}  // namespace
}  // namespace lacewing
