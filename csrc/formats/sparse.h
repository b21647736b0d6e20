// Unstructured sparse formats: parts `stream` uint8 and `offsets` int64 [strips + 1].
// A strip is one record per group of 64 inputs, back to back:
//   32 B   scales f16 [16]
//   128 B  bitmaps: 16 x little-endian uint64, bit 4*o+i of block b: the weight is there
//   codes  w8: one byte each, in block and bit order
//          w4: blocks 0..7 in the low nibbles, blocks 8..15 in the high nibbles of the same bytes
//   padded to an even length
// Loads of 64 bytes may run past a strip's end: 64 spare bytes follow the last one.
#pragma once

#include "formats/traits.h"

namespace lacewing {
namespace {

inline constexpr int kRecordHead = 160;

template <int G>
struct SparseParts {
  static_assert(G == 64);
  static constexpr int kGroup = G;
  static constexpr int kPad = G;
  static constexpr bool kSparse = true;
  static constexpr bool kHasMin = false;
  static constexpr bool kRowScale = false;
  static constexpr int kParts = 2;
  static constexpr const char* kPartNames[kMaxParts] = {"stream", "offsets"};
  static constexpr int kTileBytes[kMaxParts] = {0, 0};

  struct Cursor {
    const uint8_t* record;
  };
  static LW_INLINE Cursor open(const PackedTensor& w, int64_t strip) {
    return {w.parts[0] + load_u64(w.parts[1] + 8 * strip)};
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

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
    const uint8_t* p = c.record + kRecordHead;
    prefetch_stream<S>(c.record);
    prefetch_stream<S>(c.record + 64);
#pragma GCC unroll 2
    for (int b = 0; b < G / 4; ++b) {
      prefetch_stream<S>(p);
      f(b, S::expand(kZeroPoint, W8sp::bitmap(c.record, b), p));
    }
    c.record = W8sp::even(c.record, p);
  }
};

template <int G>
struct W4sp : SparseParts<G> {
  static constexpr int kZeroPoint = 8, kMaxCode = 15;
  using typename SparseParts<G>::Cursor;

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
    const uint8_t* lo = c.record + kRecordHead;
    const uint8_t* hi = lo;
    prefetch_stream<S>(c.record);
    prefetch_stream<S>(c.record + 64);
#pragma GCC unroll 2
    for (int b = 0; b < G / 8; ++b) {
      prefetch_stream<S>(lo);
      f(b, S::expand_lo4(kZeroPoint, W4sp::bitmap(c.record, b), lo));
      f(b + G / 8, S::expand_hi4(kZeroPoint, W4sp::bitmap(c.record, b + G / 8), hi));
    }
    c.record = W4sp::even(c.record, lo > hi ? lo : hi);
  }
};

}  // namespace
}  // namespace lacewing
