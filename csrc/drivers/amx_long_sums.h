// Sums that stay in tile registers for all k-tiles of a part: floats, and integers of formats with
// one scale per row, which is due when the row is done.
#pragma once

#include "drivers/amx_weights.h"
#include "drivers/arithmetic.h"

namespace lacewing {
namespace {

// A sixteenth of the sums of the next block to L1: two rows of both strips, where they come from
// and where they will go.
template <class S>
LW_INLINE void prefetch_block(const TilePlace& from, const TilePlace& to, int64_t step) {
  for (int64_t r = kBlockRows + 2 * step; r < kBlockRows + 2 * step + 2; ++r) {
    S::prefetch_t0(from.row(r, 0));
    S::prefetch_t0(from.row(r, 1));
    if (to.p == from.p) continue;
    S::prefetch_t0(to.row(r, 0));
    S::prefetch_t0(to.row(r, 1));
  }
}

// The next 16 KB of each strip to L2, shared out over all steps of all blocks of rows.
template <class S>
LW_INLINE void prefetch_weights(const AmxWeights& w, int64_t blocks, int64_t step) {
  if (!w.next[0]) return;
  const int64_t bytes = (kAmxDepth + blocks - 1) / blocks * 64;
  for (int64_t at = step * bytes; at < (step + 1) * bytes && at < kAmxDepth * kTileBytes;
       at += 64) {
    S::prefetch_t1(w.next[0] + at);
    if (w.next[1]) S::prefetch_t1(w.next[1] + at);
  }
}

// A block of rows (its activations at `x`) times the weights, from the sums at `from` to those at
// `to`.
template <class S, class F, class Block>
void multiply_long(const AmxChunk<F>& c, Block sums, const uint8_t* x, int64_t block,
                   const AmxPart& part, const AmxWeights& w, const TilePlace& from,
                   const TilePlace& to) {
  c.k + part.d == 0 ? sums.zero() : sums.load(from);
  for (int64_t t = 0; t < part.depth; ++t) {
    sums.step(x + 2 * kTileBytes * t, w.tiles[0] + kTileBytes * t, w.tiles[1] + kTileBytes * t);
    prefetch_block<S>(from, to, t);
    prefetch_weights<S>(w, c.blocks, block * kAmxDepth + t);
  }
  sums.store(to);
}

// 16 outputs of a row from its integers, less the zero point where the codes still have it.
template <class S, class F>
typename S::F32x16 finish_row(const LinearArgs& a, int64_t strip, int64_t row, const float* sums) {
  const int32_t zero = kLiesInTiles<F> ? -F::kZeroPoint * a.x->sum[row] : 0;
  return scale_row<S, F>(S::add_i32(S::bits_i32(S::load(sums)), S::set1_i32(zero)),
                         F::template scale<S>(F::open(*a.w, strip)), a.x->scale[row]);
}

}  // namespace
}  // namespace lacewing
