// Dense integer formats. Parts `codes` and `scales`; blocks stay 64-byte aligned.
//   w8a8g<G>:  codes uint8 [strips][k_pad/4][16][4], scales f16 [strips][k_pad/G][16]
//   w4a8g<G>:  codes uint8 [strips][k_pad/8][16][4]: inputs 8b+i in the low nibbles, 8b+4+i in
//              the high nibbles
//   w4a8g<G>z: scales f16 [strips][k_pad/G][2][16]: scale, minimum
//   w5a8g32z:  codes uint8 [strips][k_pad/32][320]: 8 x 64 fifth bits, then 4 nibble blocks
#pragma once

#include "formats/traits.h"

namespace lacewing {
namespace {

// Cursor and scales of all dense formats: CodeBytes per group of G, then scale (and minimum).
template <int G, int CodeBytes, bool HasMin>
struct DenseParts {
  static constexpr int kGroup = G;
  static constexpr int kPad = G;
  static constexpr bool kSparse = false;
  static constexpr bool kHasMin = HasMin;
  static constexpr int kParts = 2;
  static constexpr const char* kPartNames[kMaxParts] = {"codes", "scales"};
  static constexpr int kTileBytes[kMaxParts] = {CodeBytes, HasMin ? 64 : 32};

  struct Cursor {
    const uint8_t* codes;
    const uint8_t* scales;
  };
  static LW_INLINE Cursor open(const PackedTensor& w, int64_t strip) {
    const int64_t group = strip * (round_up(w.k, G) / G);
    return {w.parts[0] + group * kTileBytes[0], w.parts[1] + group * kTileBytes[1]};
  }
  template <class S>
  static LW_INLINE typename S::F32x16 scale(const Cursor& c) {
    return S::load_f16(as_f16(c.scales));
  }
  template <class S>
  static LW_INLINE typename S::F32x16 minimum(const Cursor& c) {
    return S::load_f16(as_f16(c.scales + 32));
  }
  static LW_INLINE void advance(Cursor& c) {
    c.codes += kTileBytes[0];
    c.scales += kTileBytes[1];
  }
};

template <int G>
struct W8 : DenseParts<G, G * 16, false> {
  static constexpr int kZeroPoint = 128, kMaxCode = 255;
  using typename DenseParts<G, G * 16, false>::Cursor;

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
#pragma GCC unroll 16
    for (int b = 0; b < G / 4; ++b) {
      prefetch_stream<S>(c.codes + 64 * b);
      f(b, S::load_u8(c.codes + 64 * b));
    }
    W8::advance(c);
  }
};

template <int G, bool HasMin>
struct Nibbles : DenseParts<G, G * 8, HasMin> {
  static constexpr int kZeroPoint = HasMin ? 0 : 8, kMaxCode = 15;
  using typename DenseParts<G, G * 8, HasMin>::Cursor;

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
#pragma GCC unroll 8
    for (int b = 0; b < G / 8; ++b) {
      const auto v = S::load_u8(c.codes + 64 * b);
      prefetch_stream<S>(c.codes + 64 * b);
      f(2 * b, S::and_u8(v, 15));
      f(2 * b + 1, S::shr4_u8(v));
    }
    Nibbles::advance(c);
  }
};

template <int G>
struct W4 : Nibbles<G, false> {};
template <int G>
struct W4z : Nibbles<G, true> {};

template <int G>
struct W5z : DenseParts<G, G * 10, true> {
  static constexpr int kZeroPoint = 0, kMaxCode = 31;
  using typename DenseParts<G, G * 10, true>::Cursor;

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
    const uint8_t* fifth = c.codes;
    const uint8_t* nibbles = c.codes + 2 * G;
    prefetch_stream<S>(fifth);
#pragma GCC unroll 4
    for (int b = 0; b < G / 8; ++b) {
      const auto v = S::load_u8(nibbles + 64 * b);
      prefetch_stream<S>(nibbles + 64 * b);
      f(2 * b, S::or_mask(S::and_u8(v, 15), load_u64(fifth + 16 * b), 16));
      f(2 * b + 1, S::or_mask(S::shr4_u8(v), load_u64(fifth + 16 * b + 8), 16));
    }
    W5z::advance(c);
  }
};

}  // namespace
}  // namespace lacewing
