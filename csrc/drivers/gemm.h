// Many rows. A depth of a strip is decoded once into a panel (L1) in the form the ISA multiplies
// fastest, and used for all rows of a row panel (L2). Sums stay in scratch between depths, so that
// every output keeps the order of additions that gemv has. No format, no ISA here.
#pragma once

#include <type_traits>

#include "drivers/arithmetic.h"
#include "drivers/output.h"
#include "formats/traits.h"

namespace lacewing {
namespace {

inline constexpr int64_t kRowPanel = 128;  // rows; a multiple of kRowBlock
inline constexpr int64_t kStripPanel = 8;  // strips whose sums are in scratch at once
inline constexpr int64_t kDepth = 512;     // inputs decoded at once
inline constexpr int64_t kFloatDepth = 256;

// The caller's scratch, cut up.
struct GemmScratch {
  union {  // 64 KB
    alignas(64) float sums[kStripPanel][kRowPanel][kStrip];
    alignas(64) int32_t dots[kStripPanel][kRowPanel][kStrip];  // one scale per row
  };
  alignas(64) uint8_t x[kRowPanel * kDepth * 2];  // 128 KB
  alignas(64) uint8_t codes[kDepth / 4 * 128];    // 16 KB
  alignas(64) float scales[kDepth / 32][kStrip];
  alignas(64) float minima[kDepth / 32][kStrip];
};
static_assert(sizeof(GemmScratch) <= kLinearScratch);

struct FloatScratch {
  alignas(64) float sums[2][kStripPanel][kRowPanel][kStrip];  // even and odd chains, 128 KB
  alignas(64) float values[2][kFloatDepth / 2][kStrip];       // 16 KB
};
static_assert(sizeof(FloatScratch) <= kLinearScratch);

LW_INLINE void keep_in_memory(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Equal depths of at most `limit`, each a multiple of `unit`.
LW_INLINE int64_t even_depth(int64_t k_pad, int64_t limit, int64_t unit) {
  const int64_t units = k_pad / unit, most = limit / unit;
  const int64_t count = (units + most - 1) / most;
  return (units + count - 1) / count * unit;
}

// ---- integers

// What stays in scratch between depths: with one scale per row the integers, else the outputs.
template <class F>
using Sum = std::conditional_t<F::kRowScale, int32_t, float>;

template <class F>
LW_INLINE Sum<F> (*sums_of(GemmScratch& t, int64_t strip))[kStrip] {
  if constexpr (F::kRowScale)
    return t.dots[strip];
  else
    return t.sums[strip];
}

// `groups` groups of the strip at the cursor into the panel.
template <class S, class F>
void fill_panel(GemmScratch& t, typename F::Cursor& c, int64_t groups) {
  using Dot = typename S::template PanelDot<F::kZeroPoint, F::kMaxCode>;
  uint8_t* p = t.codes;
  for (int64_t j = 0; j < groups; ++j) {
    if constexpr (!F::kRowScale) S::store(t.scales[j], F::template scale<S>(c));
    if constexpr (F::kHasMin) S::store(t.minima[j], F::template minimum<S>(c));
    F::template group<S>(
        c, [&](int b, typename S::U8x64 w)
               __attribute__((always_inline)) { Dot::prepare(p + b * Dot::kBlockBytes, w); });
    p += F::kGroup / 4 * Dot::kBlockBytes;
  }
}

// R of the `lanes` rows of a block times the panel, onto their sums. With one scale per row `sumx`
// is the row's at the first depth and 0 at the others.
template <class S, class F, int R>
__attribute__((noinline)) void multiply_panel(const GemmScratch& t, int64_t groups,
                                              const uint8_t* x, const float* sx,
                                              const int32_t* sumx, int lanes,
                                              Sum<F> (*sums)[kStrip]) {
  using Dot = typename S::template PanelDot<F::kZeroPoint, F::kMaxCode>;
  constexpr int kBlocks = F::kGroup / 4;
  constexpr int kRun = kBlocks < Dot::kSteps ? kBlocks : Dot::kSteps;
  const uint8_t* w = t.codes;
  typename Dot::Acc dot[R];
  for (int64_t j = 0; j < groups; ++j) {
    if (!F::kRowScale || j == 0) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) dot[r] = Dot::init(sumx[r]);
    }
    for (int run = 0; run < kBlocks; run += kRun) {
#pragma GCC unroll 2
      for (int b = 0; b < kRun; ++b) {
#pragma GCC unroll 2
        for (int part = 0; part < Dot::kXBytes; part += 4) {
          const auto block = S::load_u8(w);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) Dot::step(dot[r], block, x + r * Dot::kXBytes + part);
          w += 64;
        }
        x += lanes * Dot::kXBytes;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) Dot::flush(dot[r]);
    }
    if constexpr (!F::kRowScale) {
      const auto sw = S::load(t.scales[j]);
      auto mw = sw;
      if constexpr (F::kHasMin) mw = S::load(t.minima[j]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        S::store(sums[r], add_group<S, F>(S::load(sums[r]), Dot::finish(dot[r], sumx[r]), sw, mw,
                                          sx[r], sumx[r]));
      sx += lanes;
      sumx += lanes;
      keep_in_memory(sums);  // or the compiler spills the integer sums to keep these in registers
    }
  }
  if constexpr (F::kRowScale) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      S::store_i32(sums[r], S::add_i32(S::load_i32(sums[r]), Dot::finish(dot[r], sumx[r])));
  }
}

// All lanes of one block of rows: kPanelRows at a time, then what is left.
template <class S, class F>
void multiply_block(const GemmScratch& t, int64_t groups, const uint8_t* x, const float* sx,
                    const int32_t* sumx, int lanes, Sum<F> (*sums)[kStrip]) {
  using Dot = typename S::template PanelDot<F::kZeroPoint, F::kMaxCode>;
  int r = 0;
  const auto take = [&](auto multiply, int rows) __attribute__((always_inline)) {
    multiply(t, groups, x + r * Dot::kXBytes, sx + r, sumx + r, lanes, sums + r);
    r += rows;
  };
  while (lanes - r >= S::kPanelRows) take(multiply_panel<S, F, S::kPanelRows>, S::kPanelRows);
  if (S::kPanelRows > 4 && lanes - r >= 4) take(multiply_panel<S, F, 4>, 4);
  switch (lanes - r) {
    case 3:
      take(multiply_panel<S, F, 3>, 3);
      break;
    case 2:
      take(multiply_panel<S, F, 2>, 2);
      break;
    case 1:
      take(multiply_panel<S, F, 1>, 1);
      break;
  }
}

// Rows [first, first + count) times strips [begin, end), at most a row panel and a strip panel.
template <class S, class F>
void gemm_tile(const LinearArgs& a, GemmScratch& t, int64_t first, int64_t count, int64_t begin,
               int64_t end) {
  using Dot = typename S::template PanelDot<F::kZeroPoint, F::kMaxCode>;
  const Rows& x = *a.x;
  const int64_t all_groups = x.k_pad / F::kGroup;
  const int64_t step = even_depth(x.k_pad, kDepth, F::kGroup) / F::kGroup;
  constexpr int32_t kNone[kRowBlock] = {};
  typename F::Cursor cursors[kStripPanel];
  for (int64_t s = begin; s < end; ++s) {
    cursors[s - begin] = F::open(*a.w, s);
    __builtin_memset(sums_of<F>(t, s - begin), 0, sizeof(float[kStrip]) * count);
  }
  for (int64_t g = 0; g < all_groups; g += step) {
    const int64_t groups = step < all_groups - g ? step : all_groups - g;
    if constexpr (Dot::kXBytes != 4) {
      for (int64_t r = 0; r < count; r += kRowBlock) {
        const int lanes = x.rows_in((first + r) / kRowBlock);
        const int8_t* q = x.q + (first + r) * x.k_pad + g * F::kGroup * lanes;
        Dot::prepare_x(t.x + r * groups * F::kGroup * 2, q, groups * F::kGroup * lanes);
      }
    }
    for (int64_t s = begin; s < end; ++s) {
      fill_panel<S, F>(t, cursors[s - begin], groups);
      for (int64_t r = 0; r < count; r += kRowBlock) {
        const int lanes = x.rows_in((first + r) / kRowBlock);
        const int64_t at = (first + r) * (F::kRowScale ? 1 : all_groups) + g * lanes;
        const float* sx = F::kRowScale ? nullptr : x.scale + at;
        const int32_t* sumx = F::kRowScale && g > 0 ? kNone : x.sum + at;
        const uint8_t* px = Dot::kXBytes != 4 ? t.x + r * groups * F::kGroup * 2
                                              : reinterpret_cast<const uint8_t*>(x.q) +
                                                    (first + r) * x.k_pad + g * F::kGroup * lanes;
        multiply_block<S, F>(t, groups, px, sx, sumx, lanes, sums_of<F>(t, s - begin) + r);
      }
    }
  }
  for (int64_t r = 0; r < count; ++r)
    for (int64_t s = begin; s < end; ++s) {
      if constexpr (F::kRowScale)
        write_outputs<S>(
            a, s, first + r,
            scale_row<S, F>(S::load_i32(t.dots[s - begin][r]),
                            F::template scale<S>(cursors[s - begin]), x.scale[first + r]));
      else
        write_outputs<S>(a, s, first + r, S::load(t.sums[s - begin][r]));
    }
}

// ---- floats

template <class S, class F>
void fill_values(FloatScratch& t, typename F::Cursor& c, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    typename S::F32x16 even, odd;
    F::template pair<S>(c, even, odd);
    S::store(t.values[0][i], even);
    S::store(t.values[1][i], odd);
  }
}

// One chain (even or odd inputs) of R rows.
template <class S, int R>
__attribute__((noinline)) void multiply_values(const float (*w)[kStrip], int64_t pairs,
                                               const float* x, int lanes, float (*sums)[kStrip]) {
  typename S::F32x16 acc[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r] = S::load(sums[r]);
#pragma GCC unroll 2
  for (int64_t i = 0; i < pairs; ++i) {
    const auto v = S::load(w[i]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = S::fma(v, S::set1(x[2 * r]), acc[r]);
    x += 2 * lanes;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) S::store(sums[r], acc[r]);
}

template <class S>
void multiply_float_block(const float (*w)[kStrip], int64_t pairs, const float* x, int lanes,
                          float (*sums)[kStrip]) {
  int r = 0;
  const auto take = [&](auto multiply, int rows) __attribute__((always_inline)) {
    multiply(w, pairs, x + 2 * r, lanes, sums + r);
    r += rows;
  };
  while (lanes - r >= S::kPanelRows) take(multiply_values<S, S::kPanelRows>, S::kPanelRows);
  if (S::kPanelRows > 4 && lanes - r >= 4) take(multiply_values<S, 4>, 4);
  switch (lanes - r) {
    case 3:
      take(multiply_values<S, 3>, 3);
      break;
    case 2:
      take(multiply_values<S, 2>, 2);
      break;
    case 1:
      take(multiply_values<S, 1>, 1);
      break;
  }
}

template <class S, class F>
void gemm_tile_float(const LinearArgs& a, FloatScratch& t, int64_t first, int64_t count,
                     int64_t begin, int64_t end) {
  const Rows& x = *a.x;
  const int64_t step = even_depth(x.k_pad, kFloatDepth, 2);
  typename F::Cursor cursors[kStripPanel];
  for (int64_t s = begin; s < end; ++s) {
    cursors[s - begin] = F::open(*a.w, s);
    for (int chain = 0; chain < 2; ++chain)
      for (int64_t r = 0; r < count; ++r) S::store(t.sums[chain][s - begin][r], S::zero());
  }
  for (int64_t i = 0; i < x.k_pad; i += step) {
    const int64_t pairs = (step < x.k_pad - i ? step : x.k_pad - i) / 2;
    for (int64_t s = begin; s < end; ++s) {
      fill_values<S, F>(t, cursors[s - begin], pairs);
      for (int64_t r = 0; r < count; r += kRowBlock) {
        const int lanes = x.rows_in((first + r) / kRowBlock);
        const float* px = x.f + (first + r) * x.k_pad + i * lanes;
        for (int chain = 0; chain < 2; ++chain)
          multiply_float_block<S>(t.values[chain], pairs, px + chain, lanes,
                                  t.sums[chain][s - begin] + r);
      }
    }
  }
  for (int64_t r = 0; r < count; ++r)
    for (int64_t s = begin; s < end; ++s)
      write_outputs<S>(a, s, first + r,
                       S::add(S::load(t.sums[0][s - begin][r]), S::load(t.sums[1][s - begin][r])));
}

template <class S, class F>
void gemm(const LinearArgs& a) {
  const int64_t m = a.x->m;
  for (int64_t r = 0; r < m; r += kRowPanel) {
    const int64_t rows = kRowPanel < m - r ? kRowPanel : m - r;
    for (int64_t s = a.strip_begin; s < a.strip_end; s += kStripPanel) {
      const int64_t end = s + kStripPanel < a.strip_end ? s + kStripPanel : a.strip_end;
      if constexpr (F::kGroup == 0)
        gemm_tile_float<S, F>(a, *static_cast<FloatScratch*>(a.scratch), r, rows, s, end);
      else
        gemm_tile<S, F>(a, *static_cast<GemmScratch*>(a.scratch), r, rows, s, end);
    }
  }
}

}  // namespace
}  // namespace lacewing
