// Sums where groups have scales: every group is a step of its own, whose exact int32 tile is stored
// and added in float, in the order that the format states.
#pragma once

#include "drivers/amx_chunk.h"
#include "drivers/arithmetic.h"

namespace lacewing {
namespace {

// The integer sums of group g of a part: those of one group run beside the float steps of the one
// before.
template <class F>
TilePlace group_dots(AmxScratch<F>& s, int64_t g) {
  return AmxScratch<F>::place(s.dots[g % 2]);
}

// The exact sums of group g of a part, whose groups begin at `first`, onto rows of the block that
// there are. InScratch: from there and to there, with strides that the compiler then knows (15 % of
// the time of these steps).
template <class S, class F, int Strips, bool InScratch>
void add_dots(const AmxChunk<F>& c, int64_t block, int64_t first, int64_t g, const TilePlace& from,
              const TilePlace& to) {
  const Rows& x = *c.a.x;
  const TilePlace dot = group_dots(c.s, g);
  const int64_t all = x.k_pad / F::kGroup, end = c.rows - block * kBlockRows;
  for (int64_t r = 0; r < kBlockRows && r < end; r += kRowBlock) {
    const int64_t row = c.first + block * kBlockRows + r;
    const int lanes = x.rows_in(row / kRowBlock);
    const float* sx = x.scale + row * all + (first + g) * lanes;
    const int32_t* sumx = x.sum + row * all + (first + g) * lanes;
    for (int i = 0; i < Strips; ++i) {
      const auto sw = S::load(c.s.scales[i][g]);
      auto mw = sw;
      if constexpr (F::kHasMin) mw = S::load(c.s.minima[i][g]);
      const float *p = from.row(r, i), *d = dot.row(r, i);
      float* q = to.row(r, i);
      const int64_t p_stride = InScratch ? 16 : from.stride, q_stride = InScratch ? 16 : to.stride;
      const auto add = [&](int lane) __attribute__((always_inline)) {
        S::store(q + lane * q_stride,
                 add_group<S, F>(S::load(p + lane * p_stride), S::bits_i32(S::load(d + lane * 16)),
                                 sw, mw, sx[lane], sumx[lane]));
      };
      if (lanes == kRowBlock) {
#pragma GCC unroll 8
        for (int lane = 0; lane < kRowBlock; ++lane) add(lane);
      } else {
        for (int lane = 0; lane < lanes; ++lane) add(lane);
      }
    }
  }
}

// A block of rows (its activations at `x`) times the expanded weights, from the sums at `from` to
// those at `to`.
template <class S, class F, int Strips, class Block>
void multiply_groups(const AmxChunk<F>& c, Block sums, const uint8_t* x, int64_t block,
                     const AmxPart& part, const TilePlace& from, const TilePlace& to) {
  const TilePlace here = c.in_scratch(block);
  if (c.k + part.d == 0) __builtin_memset(here.p, 0, sizeof(c.s.sums[0]));
  const int64_t groups = c.groups_in(part.d, part.depth);
  const int64_t first = (c.k + part.d) * kTileInputs<F> / F::kGroup;
  for (int64_t g = 0; g < groups; ++g) {
    sums.zero();
    for (int64_t at = g * F::kGroup; at < (g + 1) * F::kGroup; at += kStepBytes<F>)
      sums.step(x + at / 64 * 2 * kTileBytes + at % 64, c.s.b[0][0] + at * kStrip,
                c.s.b[1][0] + at * kStrip);
    sums.store(group_dots(c.s, g));
    if (g > 1)
      add_dots<S, F, Strips, true>(c, block, first, g - 1, here, here);
    else if (g > 0)
      add_dots<S, F, Strips, false>(c, block, first, 0, from, here);
  }
  add_dots<S, F, Strips, false>(c, block, first, groups - 1, groups == 1 ? from : here, to);
}

}  // namespace
}  // namespace lacewing
