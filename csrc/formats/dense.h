// Dense integer formats. Parts `codes` and `scales`; blocks stay 64-byte aligned.
//   w8a8g<G>:  codes uint8 [strips][k_pad/4][16][4], scales f16 [strips][k_pad/G][16]
//   w4a8g<G>:  codes uint8 [strips][k_pad/8][16][4]: inputs 8b+i in the low nibbles, 8b+4+i in
//              the high nibbles
//   w4a8g<G>z: scales f16 [strips][k_pad/G][2][16]: scale, minimum
//   w5a8g32z:  codes uint8 [strips][k_pad/32][320]: 8 x 64 fifth bits, then 4 nibble blocks
//   w3a8g64:   codes uint8 [strips][k_pad/64][6][64]: two bit vectors, then four crumb vectors
//   w2a8g64:   codes uint8 [strips][k_pad/16][16][4]: inputs 16b+4j+i in bits 2j and 2j+1
// and with one scale per row, scales f16 [strips][16]:
//   w8a8:      codes as w8a8g64
//   w1.6a8:    codes uint8 [strips][k_pad/20][16][4]: inputs 20b+4j+i are digit j of a fraction
//              in base 3
#pragma once

#include "formats/traits.h"

namespace lacewing {
namespace {

// Cursor and scales of all dense formats: CodeBytes per group of G, then scale (and minimum).
template <int G, int CodeBytes, bool HasMin, bool RowScale = false>
struct DenseParts {
  static constexpr int kGroup = G;
  static constexpr int kPad = G;
  static constexpr bool kSparse = false;
  static constexpr bool kHasMin = HasMin;
  static constexpr bool kRowScale = RowScale;
  static constexpr int kParts = 2;
  static constexpr const char* kPartNames[kMaxParts] = {"codes", "scales"};
  static constexpr int kTileBytes[kMaxParts] = {CodeBytes, HasMin ? 64 : 32};

  struct Cursor {
    const uint8_t* codes;
    const uint8_t* scales;
  };
  static LW_INLINE Cursor open(const PackedTensor& w, int64_t strip) {
    const int64_t group = strip * (round_up(w.k, G) / G);
    return {w.parts[0] + group * kTileBytes[0],
            w.parts[1] + (RowScale ? strip : group) * kTileBytes[1]};
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
    if constexpr (!RowScale) c.scales += kTileBytes[1];
  }
};

template <int G, bool RowScale = false>
struct W8 : DenseParts<G, G * 16, false, RowScale> {
  static constexpr int kZeroPoint = 128, kMaxCode = 255;
  using typename DenseParts<G, G * 16, false, RowScale>::Cursor;

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

using W8row = W8<64, true>;

template <int G, bool HasMin>
struct Nibbles : DenseParts<G, G * 8, HasMin> {
  static constexpr int kZeroPoint = HasMin ? 0 : 8, kMaxCode = 15;
  using typename DenseParts<G, G * 8, HasMin>::Cursor;

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
#pragma GCC unroll 16
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

// Codes 0, 2, 4, 6: the levels -3, -1, 1, 3.
template <int G>
struct W2 : DenseParts<G, G * 4, false> {
  static constexpr int kZeroPoint = 3, kMaxCode = 6;
  using typename DenseParts<G, G * 4, false>::Cursor;

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
#pragma GCC unroll 4
    for (int v = 0; v < G / 16; ++v) {
      const auto crumbs = S::load_u8(c.codes + 64 * v);
      prefetch_stream<S>(c.codes + 64 * v);
      f(4 * v, S::template shift_and<-1>(crumbs, 6));
      f(4 * v + 1, S::template shift_and<1>(crumbs, 6));
      f(4 * v + 2, S::template shift_and<3>(crumbs, 6));
      f(4 * v + 3, S::template shift_and<5>(crumbs, 6));
    }
    W2::advance(c);
  }
};

// The third bits of eight blocks share a vector (bit b of a byte belongs to block b), the lower
// two of four: no bit ever leaves its byte, so that shifts and masks put a code together.
template <int G>
struct W3 : DenseParts<G, G * 6, false> {
  static constexpr int kZeroPoint = 4, kMaxCode = 7;
  using typename DenseParts<G, G * 6, false>::Cursor;

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
    const uint8_t* crumbs = c.codes + 2 * G;
#pragma GCC unroll 2
    for (int v = 0; v < G / 32; ++v) {
      const auto third = S::load_u8(c.codes + 64 * v);
      prefetch_stream<S>(c.codes + 64 * v);
      four<S, 0>(8 * v, third, crumbs + 128 * v, f);
      four<S, 4>(8 * v + 4, third, crumbs + 128 * v + 64, f);
    }
    W3::advance(c);
  }

 private:
  // Blocks b..b+3, whose third bits are First..First+3.
  template <class S, int First, class F>
  static LW_INLINE void four(int b, typename S::U8x64 third, const uint8_t* p, F& f) {
    const auto low = S::load_u8(p);
    prefetch_stream<S>(p);
    f(b, S::or_u8(S::template shift_and<0>(low, 3), S::template shift_and<First - 2>(third, 4)));
    f(b + 1,
      S::or_u8(S::template shift_and<2>(low, 3), S::template shift_and<First - 1>(third, 4)));
    f(b + 2, S::or_u8(S::template shift_and<4>(low, 3), S::template shift_and<First>(third, 4)));
    f(b + 3,
      S::or_u8(S::template shift_and<6>(low, 3), S::template shift_and<First + 1>(third, 4)));
  }
};

// Five codes 0, 1, 2 per byte, as in llama.cpp's TQ1_0: the byte is the fraction 0.t0t1t2t3t4 in
// base 3, times 256, rounded up. Its first digit is the upper byte of three times it, the lower
// byte the fraction of the others.
struct Ternary : DenseParts<320, 1024, false, true> {
  static constexpr int kZeroPoint = 1, kMaxCode = 2;

  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
#pragma GCC unroll 4
    for (int v = 0; v < 16; ++v) {
      typename S::U8x64 digits[5];
      S::trits(S::load_u8(c.codes + 64 * v), digits);
      prefetch_stream<S>(c.codes + 64 * v);
#pragma GCC unroll 5
      for (int i = 0; i < 5; ++i) f(5 * v + i, digits[i]);
    }
    advance(c);
  }
};

}  // namespace
}  // namespace lacewing
