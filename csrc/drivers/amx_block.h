// A block of up to 2 x 2 tiles of sums: how it lies in tile registers, and one k-tile onto it.
#pragma once

#include "core/inline.h"
#include "drivers/amx_pack.h"
#include "simd/amx.h"

namespace lacewing {
namespace {

enum class TileDot { bf16, s8_u8, s8_s8 };  // activations, weights

// Sums are tiles 0 (rows 0..15, first strip), 1 (second strip), 2 and 3 (rows 16..31), activations
// 4 and 5, weights 6 and 7. `step_bytes` of every row of activations are one step.
inline TileShapes block_shapes(int64_t step_bytes) {
  TileShapes s;
  for (int t = 0; t < 8; ++t) {
    s.rows[t] = static_cast<uint8_t>(t < 6 ? 16 : step_bytes / 4);
    s.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? step_bytes : 64);
  }
  return s;
}

// Where the sums of a block lie: `stride` from row to row, `down` to the tile of the next 16 rows,
// `right` to that of the second strip, all in floats.
struct TilePlace {
  float* p;
  int64_t stride, down, right;

  LW_INLINE float* tile(int i, int strip) const { return p + i * down + strip * right; }
  LW_INLINE float* row(int64_t r, int strip) const {
    return p + r / 16 * down + r % 16 * stride + strip * right;
  }
};

template <class Tiles, TileDot Dot, int RowTiles, int Strips>
struct TileBlock {
  Tiles& t;

  LW_INLINE void zero() const {
    each([&]<int T>() __attribute__((always_inline)) { t.template zero<T>(); });
  }
  LW_INLINE void load(const TilePlace& c) const {
    each([&]<int T>() __attribute__((always_inline)) {
      t.template load<T>(c.tile(T / 2, T % 2), 4 * c.stride);
    });
  }
  LW_INLINE void store(const TilePlace& c) const {
    each([&]<int T>() __attribute__((always_inline)) {
      t.template store<T>(c.tile(T / 2, T % 2), 4 * c.stride);
    });
  }
  // a: two tiles of rows, from L2 and not worth a place in L1; b0, b1: a tile of each strip, in L1.
  LW_INLINE void step(const uint8_t* a, const uint8_t* b0, const uint8_t* b1) const {
    t.template load_once<4>(a, 64);
    if constexpr (RowTiles > 1) t.template load_once<5>(a + kTileBytes, 64);
    t.template load<6>(b0, 64);
    dot<0, 4, 6>();
    if constexpr (RowTiles > 1) dot<2, 5, 6>();
    if constexpr (Strips > 1) {
      t.template load<7>(b1, 64);
      dot<1, 4, 7>();
      if constexpr (RowTiles > 1) dot<3, 5, 7>();
    }
  }

 private:
  // f<T>() for the tiles of sums that there are.
  template <class F>
  static LW_INLINE void each(F f) {
    f.template operator()<0>();
    if constexpr (Strips > 1) f.template operator()<1>();
    if constexpr (RowTiles > 1) f.template operator()<2>();
    if constexpr (RowTiles > 1 && Strips > 1) f.template operator()<3>();
  }

  template <int C, int A, int B>
  LW_INLINE void dot() const {
    if constexpr (Dot == TileDot::bf16)
      t.template dot_bf16<C, A, B>();
    else if constexpr (Dot == TileDot::s8_u8)
      t.template dot_s8_u8<C, A, B>();
    else
      t.template dot_s8_s8<C, A, B>();
  }
};

}  // namespace
}  // namespace lacewing
