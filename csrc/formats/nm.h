// 2:4: two of every four inputs of an output. Part `records`: uint8 [strips][k_pad/64][kRecord],
//   codes    w8: 32 bytes for each of the 16 blocks; w4: 32 bytes for blocks b (low nibbles) and
//            8 + b (high nibbles) together
//   128 B    bitmaps: 16 x little-endian uint64 with 32 bits set, two in every four
//   32 B     scales f16 [16]
// Records are equally long and codes come first, so that a strip's place is a product, loads of 64
// bytes stay inside, and hostile bitmaps choose wrong codes but never leave the record.
#pragma once

#include "formats/traits.h"

namespace lacewing {
namespace {

template <int CodeBytes>
struct Records24 {
  static constexpr int kGroup = 64;
  static constexpr int kPad = 64;
  static constexpr bool kSparse = true;
  static constexpr bool kHasMin = false;
  static constexpr bool kRowScale = false;
  static constexpr int kParts = 1;
  static constexpr const char* kPartNames[kMaxParts] = {"records", nullptr};
  static constexpr int kRecord = CodeBytes + 160;
  static constexpr int kTileBytes[kMaxParts] = {kRecord, 0};

  struct Cursor {
    const uint8_t* record;
  };
  static LW_INLINE Cursor open(const PackedTensor& w, int64_t strip) {
    return {w.parts[0] + strip * (round_up(w.k, kPad) / kPad) * kRecord};
  }
  template <class S>
  static LW_INLINE typename S::F32x16 scale(const Cursor& c) {
    return S::load_f16(as_f16(c.record + CodeBytes + 128));
  }
  static LW_INLINE const uint8_t* bitmap(const Cursor& c, int block) {
    return c.record + CodeBytes + 8 * block;
  }
  template <class S>
  static LW_INLINE void prefetch(const Cursor& c) {
#pragma GCC unroll 11
    for (int at = 0; at < kRecord; at += 64) prefetch_stream<S>(c.record + at);
  }
};

struct W8of24 : Records24<512> {
  static constexpr int kZeroPoint = 128, kMaxCode = 255;

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
    prefetch<S>(c);
#pragma GCC unroll 16
    for (int b = 0; b < 16; ++b)
      f(b, S::expand_24(kZeroPoint, bitmap(c, b), S::load_u8(c.record + 32 * b)));
    c.record += kRecord;
  }
};

struct W4of24 : Records24<256> {
  static constexpr int kZeroPoint = 8, kMaxCode = 15;

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
    prefetch<S>(c);
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) {
      const auto v = S::load_u8(c.record + 32 * b);
      f(b, S::expand_24(kZeroPoint, bitmap(c, b), S::and_u8(v, 15)));
      f(8 + b, S::expand_24(kZeroPoint, bitmap(c, 8 + b), S::shr4_u8(v)));
    }
    c.record += kRecord;
  }
};

}  // namespace
}  // namespace lacewing
