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
inline constexpr int kMaxPanelStrips = 2;

// Of one strip, between depths: the outputs, or the integers where a row has one scale.
template <class F>
using Sums = std::conditional_t<F::kRowScale, int32_t, float>[kRowPanel][kStrip];

// A depth of one strip, decoded.
struct Panel {
  alignas(64) uint8_t codes[kDepth / 4 * 128];  // 16 KB, half of it where a block is 64 bytes
  alignas(64) float scales[kDepth / 32][kStrip];
  alignas(64) float minima[kDepth / 32][kStrip];
};

// The caller's scratch, cut up.
struct GemmScratch {
  alignas(64) uint8_t sums[kStripPanel * kRowPanel * kStrip * 4];  // 64 KB, Sums<F>[kStripPanel]
  alignas(64) uint8_t x[kRowPanel * kDepth * 2];                   // 128 KB
  Panel panels[kMaxPanelStrips];
};
static_assert(sizeof(GemmScratch) <= kLinearScratch);

using FloatSums = float[kRowPanel][kStrip];
using Values = float[kFloatDepth / 2][kStrip];

struct FloatScratch {
  alignas(64) FloatSums sums[2][kStripPanel];      // even and odd chains, 128 KB
  alignas(64) Values values[kMaxPanelStrips * 2];  // 32 KB: [chain][strip]
};
static_assert(sizeof(FloatScratch) <= kLinearScratch);

LW_INLINE void keep_in_memory(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Equal depths of at most `limit`, each a multiple of `unit`.
LW_INLINE int64_t even_depth(int64_t k_pad, int64_t limit, int64_t unit) {
  const int64_t units = k_pad / unit, most = limit / unit;
  const int64_t count = (units + most - 1) / most;
  return (units + count - 1) / count * unit;
}

// The outputs of a strip panel are short runs in rows far apart: stores alone would wait for every
// line in turn.
LW_INLINE void prefetch_outputs(const LinearArgs& a, int64_t row, int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 8;
  if (row + kAhead >= a.x->m) return;
  const float* y = a.y + (row + kAhead) * a.ldy;
  for (int64_t s = begin; s < end; ++s) __builtin_prefetch(y + s * kStrip, 1);
}

// ---- integers

// `groups` groups of the strip at the cursor into the panel.
template <class S, class F>
void fill_panel(Panel& panel, typename F::Cursor& c, int64_t groups) {
  using Dot = typename S::template PanelDot<F::kZeroPoint, F::kMaxCode>;
  uint8_t* p = panel.codes;
  for (int64_t j = 0; j < groups; ++j) {
    if constexpr (!F::kRowScale) S::store(panel.scales[j], F::template scale<S>(c));
    if constexpr (F::kHasMin) S::store(panel.minima[j], F::template minimum<S>(c));
    F::template group<S>(
        c, [&](int b, typename S::U8x64 w)
               __attribute__((always_inline)) { Dot::prepare(p + b * Dot::kBlockBytes, w); });
    p += F::kGroup / 4 * Dot::kBlockBytes;
  }
}

// What a row block has in common for all strips: `lanes` rows interleaved, from one of them on.
// With one scale per row `sum` is the row's at the first depth and 0 at the others.
struct PanelRows {
  const uint8_t* x;
  const float* scale;
  const int32_t* sum;
  int lanes;
};

// R of the rows of a block times the panels of T strips, onto their sums: a broadcast of x serves T
// products, a load of codes R.
template <class S, class F, int T, int R>
__attribute__((noinline)) void multiply_panel(const Panel* panels, int64_t groups, PanelRows rows,
                                              Sums<F>* sums, int64_t row) {
  using Dot = typename S::template PanelDot<F::kZeroPoint, F::kMaxCode>;
  constexpr int kBlocks = F::kGroup / 4;
  constexpr int kRun = kBlocks < Dot::kSteps ? kBlocks : Dot::kSteps;
  const uint8_t* w = panels[0].codes;
  constexpr int64_t kNext = sizeof(Panel);  // from one strip's codes to the next one's
  typename Dot::Acc dot[T][R];
  for (int64_t j = 0; j < groups; ++j) {
    if (!F::kRowScale || j == 0) {
#pragma GCC unroll 2
      for (int i = 0; i < T; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) dot[i][r] = Dot::init(rows.sum[r]);
    }
    for (int run = 0; run < kBlocks; run += kRun) {
#pragma GCC unroll 2
      for (int b = 0; b < kRun; ++b) {
#pragma GCC unroll 2
        for (int part = 0; part < Dot::kXBytes; part += 4) {
          typename S::U8x64 block[T];
#pragma GCC unroll 2
          for (int i = 0; i < T; ++i) block[i] = S::load_u8(w + i * kNext);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int i = 0; i < T; ++i)
              Dot::step(dot[i][r], block[i], rows.x + r * Dot::kXBytes + part);
          w += 64;
        }
        rows.x += rows.lanes * Dot::kXBytes;
      }
#pragma GCC unroll 2
      for (int i = 0; i < T; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) Dot::flush(dot[i][r]);
    }
    if constexpr (!F::kRowScale) {
#pragma GCC unroll 2
      for (int i = 0; i < T; ++i) {
        const auto sw = S::load(panels[i].scales[j]);
        auto mw = sw;
        if constexpr (F::kHasMin) mw = S::load(panels[i].minima[j]);
        float(*sum)[kStrip] = sums[i] + row;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          S::store(sum[r], add_group<S, F>(S::load(sum[r]), Dot::finish(dot[i][r], rows.sum[r]), sw,
                                           mw, rows.scale[r], rows.sum[r]));
      }
      rows.scale += rows.lanes;
      rows.sum += rows.lanes;
      keep_in_memory(sums);  // or the compiler spills the integer sums to keep these in registers
    }
  }
  if constexpr (F::kRowScale) {
#pragma GCC unroll 2
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t* sum = sums[i][row + r];
        S::store_i32(sum, S::add_i32(S::load_i32(sum), Dot::finish(dot[i][r], rows.sum[r])));
      }
  }
}

// All lanes of one block of rows: kPanelRows at a time, then what is left.
template <class S, class F, int T>
void multiply_block(const Panel* panels, int64_t groups, const PanelRows& block, Sums<F>* sums,
                    int64_t row) {
  using Dot = typename S::template PanelDot<F::kZeroPoint, F::kMaxCode>;
  int r = 0;
  const auto take = [&](auto multiply, int rows) __attribute__((always_inline)) {
    multiply(panels, groups,
             {block.x + r * Dot::kXBytes, block.scale + r, block.sum + r, block.lanes}, sums,
             row + r);
    r += rows;
  };
  while (block.lanes - r >= S::kPanelRows)
    take(multiply_panel<S, F, T, S::kPanelRows>, S::kPanelRows);
  if (S::kPanelRows > 4 && block.lanes - r >= 4) take(multiply_panel<S, F, T, 4>, 4);
  switch (block.lanes - r) {
    case 3:
      take(multiply_panel<S, F, T, 3>, 3);
      break;
    case 2:
      take(multiply_panel<S, F, T, 2>, 2);
      break;
    case 1:
      take(multiply_panel<S, F, T, 1>, 1);
      break;
  }
}

// The depth of `groups` groups from group g on: T strips, beginning at their cursors and sums,
// times all rows of the panel [first, first + count).
template <class S, class F, int T>
void multiply_depth(const Rows& x, GemmScratch& t, int64_t first, int64_t count, int64_t g,
                    int64_t groups, typename F::Cursor* cursors, Sums<F>* sums) {
  using Dot = typename S::template PanelDot<F::kZeroPoint, F::kMaxCode>;
  constexpr int32_t kNone[kRowBlock] = {};
  const int64_t all_groups = x.k_pad / F::kGroup;
  for (int i = 0; i < T; ++i) fill_panel<S, F>(t.panels[i], cursors[i], groups);
  for (int64_t r = 0; r < count; r += kRowBlock) {
    const int lanes = x.rows_in((first + r) / kRowBlock);
    const int64_t at = (first + r) * (F::kRowScale ? 1 : all_groups) + g * lanes;
    const float* scale = F::kRowScale ? nullptr : x.scale + at;
    const int32_t* sum = F::kRowScale && g > 0 ? kNone : x.sum + at;
    const uint8_t* px = Dot::kXBytes != 4 ? t.x + r * groups * F::kGroup * 2
                                          : reinterpret_cast<const uint8_t*>(x.q) +
                                                (first + r) * x.k_pad + g * F::kGroup * lanes;
    multiply_block<S, F, T>(t.panels, groups, {px, scale, sum, lanes}, sums, r);
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
  auto* sums = reinterpret_cast<Sums<F>*>(t.sums);
  typename F::Cursor cursors[kStripPanel];
  for (int64_t s = begin; s < end; ++s) {
    cursors[s - begin] = F::open(*a.w, s);
    __builtin_memset(sums[s - begin], 0, sizeof(float[kStrip]) * static_cast<size_t>(count));
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
    int64_t s = 0;
    for (; s + S::kPanelStrips <= end - begin; s += S::kPanelStrips)
      multiply_depth<S, F, S::kPanelStrips>(x, t, first, count, g, groups, cursors + s, sums + s);
    for (; s < end - begin; ++s)
      multiply_depth<S, F, 1>(x, t, first, count, g, groups, cursors + s, sums + s);
  }
  const LinearArgs out = a;  // a copy that no store to y can change
  [[maybe_unused]] alignas(64) float scales[kStripPanel][kStrip];
  if constexpr (F::kRowScale)
    for (int64_t s = 0; s < end - begin; ++s) S::store(scales[s], F::template scale<S>(cursors[s]));
  for (int64_t r = 0; r < count; ++r) {
    prefetch_outputs(out, first + r, begin, end);
    for (int64_t s = begin; s < end; ++s) {
      if constexpr (F::kRowScale)
        write_outputs<S>(out, s, first + r,
                         scale_row<S, F>(S::load_i32(sums[s - begin][r]),
                                         S::load(scales[s - begin]), x.scale[first + r]));
      else
        write_outputs<S>(out, s, first + r, S::load(sums[s - begin][r]));
    }
  }
}

// ---- floats

template <class S, class F>
void fill_values(Values& evens, Values& odds, typename F::Cursor& c, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    typename S::F32x16 even, odd;
    F::template pair<S>(c, even, odd);
    S::store(evens[i], even);
    S::store(odds[i], odd);
  }
}

// One chain (even or odd inputs) of R rows and T strips.
template <class S, int T, int R>
__attribute__((noinline)) void multiply_values(const Values* w, int64_t pairs, const float* x,
                                               int lanes, FloatSums* sums, int64_t row) {
  typename S::F32x16 acc[T][R];
#pragma GCC unroll 2
  for (int j = 0; j < T; ++j)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[j][r] = S::load(sums[j][row + r]);
#pragma GCC unroll 2
  for (int64_t i = 0; i < pairs; ++i) {
    typename S::F32x16 v[T];
#pragma GCC unroll 2
    for (int j = 0; j < T; ++j) v[j] = S::load(w[j][i]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < T; ++j) acc[j][r] = S::fma(v[j], S::set1(x[2 * r]), acc[j][r]);
    x += 2 * lanes;
  }
#pragma GCC unroll 2
  for (int j = 0; j < T; ++j)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) S::store(sums[j][row + r], acc[j][r]);
}

template <class S, int T>
void multiply_float_block(const Values* w, int64_t pairs, const float* x, int lanes,
                          FloatSums* sums, int64_t row) {
  int r = 0;
  const auto take = [&](auto multiply, int rows) __attribute__((always_inline)) {
    multiply(w, pairs, x + 2 * r, lanes, sums, row + r);
    r += rows;
  };
  while (lanes - r >= S::kPanelRows) take(multiply_values<S, T, S::kPanelRows>, S::kPanelRows);
  if (S::kPanelRows > 4 && lanes - r >= 4) take(multiply_values<S, T, 4>, 4);
  switch (lanes - r) {
    case 3:
      take(multiply_values<S, T, 3>, 3);
      break;
    case 2:
      take(multiply_values<S, T, 2>, 2);
      break;
    case 1:
      take(multiply_values<S, T, 1>, 1);
      break;
  }
}

// `pairs` pairs of inputs from input `input` on: T strips times all rows of the panel.
template <class S, class F, int T>
void multiply_float_depth(const Rows& x, FloatScratch& t, int64_t first, int64_t count,
                          int64_t input, int64_t pairs, typename F::Cursor* cursors,
                          int64_t strip) {
  for (int j = 0; j < T; ++j) fill_values<S, F>(t.values[j], t.values[T + j], cursors[j], pairs);
  for (int64_t r = 0; r < count; r += kRowBlock) {
    const int lanes = x.rows_in((first + r) / kRowBlock);
    const float* px = x.f + (first + r) * x.k_pad + input * lanes;
    for (int chain = 0; chain < 2; ++chain)
      multiply_float_block<S, T>(t.values + chain * T, pairs, px + chain, lanes,
                                 t.sums[chain] + strip, r);
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
    int64_t s = 0;
    for (; s + S::kPanelStrips <= end - begin; s += S::kPanelStrips)
      multiply_float_depth<S, F, S::kPanelStrips>(x, t, first, count, i, pairs, cursors + s, s);
    for (; s < end - begin; ++s)
      multiply_float_depth<S, F, 1>(x, t, first, count, i, pairs, cursors + s, s);
  }
  for (int64_t r = 0; r < count; ++r) {
    prefetch_outputs(a, first + r, begin, end);
    for (int64_t s = begin; s < end; ++s)
      write_outputs<S>(a, s, first + r,
                       S::add(S::load(t.sums[0][s - begin][r]), S::load(t.sums[1][s - begin][r])));
  }
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
