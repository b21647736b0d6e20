// What the parts of the AMX driver share: which formats it multiplies and how, the caller's
// scratch, and the chunk of a product that is being multiplied.
#pragma once

#include "core/kernels.h"
#include "drivers/amx_block.h"
#include "formats/traits.h"

namespace lacewing {
namespace {

inline constexpr int64_t kAmxDepth = 16;      // k-tiles of weights at once
inline constexpr int64_t kAmxStrips = 1024;   // strips whose cursors are in scratch at once
inline constexpr int64_t kKept = 200 * 1024;  // sums that are in scratch between chunks

// Whether the tiles of a strip lie in its bytes just as they are multiplied: values of 16 bits, or
// codes of 8 whose groups have no scales.
template <class F>
constexpr bool lies_in_tiles() {
  if constexpr (F::kSparse) return false;
  if constexpr (F::kGroup == 0) return F::kTileBytes[0] == F::kPad * kStrip * 2;
  return F::kRowScale && F::kTileBytes[0] == F::kPad * kStrip;
}
template <class F>
inline constexpr bool kLiesInTiles = lies_in_tiles<F>();

// Formats that this driver can multiply by: floats, and groups that are half a k-tile or whole
// ones.
template <class F>
inline constexpr bool kThroughTiles =
    F::kGroup == 0 || F::kGroup == 32 || (F::kGroup % 64 == 0 && F::kGroup <= kAmxDepth * 64);

// Where sums stay in tile registers for 16 k-tiles; elsewhere every group is a step of its own.
template <class F>
inline constexpr bool kLongSums = F::kGroup == 0 || F::kRowScale;

// Bytes of a row of activations that one step multiplies.
template <class F>
inline constexpr int64_t kStepBytes = F::kGroup == 32 && !F::kRowScale ? 32 : 64;

// Where the packed bytes are the tiles, codes are unsigned; expanded ones are less their zero
// point.
template <class F>
inline constexpr TileDot kTileDot = F::kGroup == 0    ? TileDot::bf16
                                    : kLiesInTiles<F> ? TileDot::s8_u8
                                                      : TileDot::s8_s8;

// The caller's scratch, cut up.
template <class F>
struct AmxScratch {
  // [16 rows][strip] of a block of rows. Where sums are integers these are their bits.
  using Sums = float[2][2][16][16];

  alignas(64) uint8_t a[kAmxTiles][kTileBytes];        // 1 MB
  alignas(64) uint8_t b[2][kAmxDepth][kTileBytes];     // 32 KB
  alignas(64) Sums sums[kAmxRows / kBlockRows];        // 64 KB
  alignas(64) Sums dots[2];                            // int32, of this step and the one before
  alignas(64) float scales[2][kAmxDepth * 2][kStrip];  // of the weights in `b`
  alignas(64) float minima[2][kAmxDepth * 2][kStrip];
  alignas(64) float kept[kKept];  // 800 KB
  typename F::Cursor cursors[kAmxStrips];

  // A block's sums, as a place.
  static TilePlace place(Sums& sums) { return {sums[0][0][0], 16, 2 * 256, 256}; }
};

// Rows, strips and k-tiles that are being multiplied.
template <class F>
struct AmxChunk {
  const LinearArgs& a;
  AmxScratch<F>& s;
  int64_t first = 0, rows = 0, blocks = 0;  // rows of this panel, and their blocks of 32
  int64_t begin = 0, end = 0;               // strips whose cursors are in scratch
  int64_t k = 0, count = 0;                 // k-tiles

  // Inputs in `depth` k-tiles from the chunk's d-th one.
  int64_t inputs_in(int64_t d, int64_t depth) const {
    const int64_t left = a.x->k_pad - (k + d) * kTileInputs<F>, inputs = depth * kTileInputs<F>;
    return inputs < left ? inputs : left;
  }
  int64_t groups_in(int64_t d, int64_t depth) const { return inputs_in(d, depth) / F::kGroup; }

  TilePlace in_scratch(int64_t block) const { return AmxScratch<F>::place(s.sums[block]); }
};

// Up to 16 k-tiles of a panel.
struct AmxPart {
  int64_t s, d, depth;  // first strip; first k-tile in the chunk and how many
  bool waited;          // the sums so far wait where the last chunk left them
  bool leaves;          // the chunk ends here
  bool ends;            // the sums end here
};

}  // namespace
}  // namespace lacewing
