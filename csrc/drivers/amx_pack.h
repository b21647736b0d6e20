// Activations as AMX multiplies them: tiles of 16 rows x 64 bytes (64 int8 inputs, or 32 bf16).
#pragma once

#include "core/inline.h"
#include "core/types.h"

namespace lacewing {
namespace {

inline constexpr int64_t kTileBytes = 1024;
inline constexpr int64_t kBlockRows = 32;   // two tiles of rows
inline constexpr int64_t kAmxRows = 512;    // rows at once
inline constexpr int64_t kAmxTiles = 1024;  // tiles at once: 1 MB, which L2 holds beside the rest

// Inputs of a k-tile.
template <class F>
inline constexpr int64_t kTileInputs = F::kGroup == 0 ? 32 : 64;

// One k-tile of `lanes` interleaved rows: `quads` x `lanes` dwords, into rows of 64 bytes.
template <class S>
LW_INLINE void place_lanes(uint8_t* to, const uint8_t* dwords, int lanes, int64_t quads) {
  if (lanes == kRowBlock && quads == 16) return S::transpose_16x8(to, dwords);
  __builtin_memset(to, 0, static_cast<size_t>(lanes) * 64);
  for (int lane = 0; lane < lanes; ++lane)
    for (int64_t i = 0; i < quads; ++i)
      __builtin_memcpy(to + 64 * lane + 4 * i, dwords + 4 * (i * lanes + lane), 4);
}

template <class S>
LW_INLINE void round_floats(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16)
    S::store_bf16(to + i, i + 16 <= count ? S::load(from + i) : S::load_n(from + i, count - i));
}

// Rows [first, first + rows) of x, k-tiles [k, k + count), as [block of 32 rows][k-tile][2] tiles.
// Rows that are not there keep whatever the tile held: no other row depends on them.
template <class S, class F>
void pack_rows(uint8_t (*tiles)[kTileBytes], const Rows& x, int64_t first, int64_t rows, int64_t k,
               int64_t count) {
  constexpr int64_t kInputs = kTileInputs<F>;
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    const int lanes = x.rows_in((first + r) / kRowBlock);
    uint8_t* to = tiles[2 * (r / kBlockRows) * count + r % kBlockRows / 16] + r % 16 * 64;
    for (int64_t t = k; t < k + count; ++t, to += 2 * kTileBytes) {
      const int64_t left = x.k_pad - t * kInputs, inputs = left < kInputs ? left : kInputs;
      const int64_t at = (first + r) * x.k_pad + t * kInputs * lanes;
      if constexpr (F::kGroup == 0) {
        alignas(64) uint16_t rounded[kRowBlock * kInputs];
        round_floats<S>(rounded, x.f + at, inputs * lanes);
        place_lanes<S>(to, reinterpret_cast<const uint8_t*>(rounded), lanes, inputs / 2);
      } else {
        place_lanes<S>(to, reinterpret_cast<const uint8_t*>(x.q + at), lanes, inputs / 4);
      }
    }
  }
}

}  // namespace
}  // namespace lacewing
