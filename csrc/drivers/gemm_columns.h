// Many rows times strips that keep whole columns of inputs, without the work of what is dropped.
// The roles are exchanged: activations lie input by input, 64 rows side by side, so that a kept
// column is a run of bytes wherever it is; weights are broadcast, four kept inputs of one output at
// a time, from where they lie. No format, no ISA here.
//
// 4096 x 4096, 512 rows, two threads of a Zen 4: dense w8a8 23.7 ms; w8a8_b16x1 at zeros of 50, 70
// and 80 % 20.4, 13.0 and 8.9 ms here, 23.4, 23.2 and 23.0 through gemm, which expands to dense
// blocks.
#pragma once

#include "drivers/gemm.h"
#include "drivers/gemv_columns.h"

namespace lacewing {
namespace {

inline constexpr int64_t kSideRows = 64;       // rows side by side
inline constexpr int64_t kSideLeast = 48;      // of them: pays from half the columns dropped on
inline constexpr int64_t kSideQuads = 64;      // times four kept inputs at once: 16 KB, in L1
inline constexpr int64_t kSideInputs = 20480;  // at most; longer rows are gemm's

struct SideScratch {
  alignas(64) int32_t sums[kStrip][kSideRows];
  alignas(64) int32_t zero[kSideRows];  // sums of the kept activations
  alignas(64) uint8_t x[kSideQuads][4][64];
  uint32_t places[kSideInputs + 4];  // of the kept inputs, in `rows`
  alignas(64) int8_t rows[kSideInputs + 1][kSideRows];
};
static_assert(sizeof(SideScratch) <= kLinearScratch);

// Rows [first, first + count), at most 64, and an input of zeros behind the last one. What is in
// the place of missing rows is multiplied too, and not written.
template <class S>
void lay_side_by_side(SideScratch& t, const Rows& x, int64_t first, int64_t count) {
  for (int64_t r = 0; r < count; r += kRowBlock) {
    const int8_t* q = x.q + (first + r) * x.k_pad;
    const int lanes = x.rows_in((first + r) / kRowBlock);
    if (lanes == kRowBlock) {
      for (int64_t i = 0; i < x.k_pad; i += 8) S::split_rows(t.rows[i] + r, kSideRows, q + 8 * i);
    } else {
      for (int64_t i = 0; i < x.k_pad; ++i)
        for (int l = 0; l < lanes; ++l) t.rows[i][r + l] = q[(i / 4 * lanes + l) * 4 + i % 4];
    }
  }
  __builtin_memset(t.rows[x.k_pad], 0, kSideRows);
}

// Fills `places`, the last four inputs up with zeros. Returns how many fours there are.
inline int64_t list_columns(SideScratch& t, const uint8_t* bitmap, int64_t k_pad) {
  uint32_t* p = t.places;
  for (int64_t i = 0; i < k_pad; i += 64)
    for (uint64_t bits = load_u64(bitmap + i / 8); bits; bits &= bits - 1)
      *p++ = static_cast<uint32_t>((i + __builtin_ctzll(bits)) * kSideRows);
  const int64_t count = p - t.places;
  for (int i = 0; i < 4; ++i) *p++ = static_cast<uint32_t>(k_pad * kSideRows);
  return (count + 3) / 4;
}

// The activations of `count` fours as blocks of 16 rows x 4 inputs.
template <class S>
void take_columns(SideScratch& t, int64_t first, int64_t count) {
  typename S::I32x16 zero[4];
  for (int b = 0; b < 4; ++b) zero[b] = S::load_i32(t.zero + 16 * b);
  const int8_t* rows = t.rows[0];
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* p = t.places + 4 * (first + i);
    typename S::U8x64 x[4];
    S::join_rows(x, rows + p[0], rows + p[1], rows + p[2], rows + p[3]);
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      S::store_u8(t.x[i][b], x[b]);
      zero[b] = S::add_i8(zero[b], x[b]);
    }
  }
  for (int b = 0; b < 4; ++b) S::store_i32(t.zero + 16 * b, zero[b]);
}

// Outputs [output, output + 8), blocks of rows [block, block + 2).
template <class S, class F>
void multiply_side(SideScratch& t, const uint8_t* codes, int64_t count, int output, int block) {
  using Dot = typename S::template Dot<F::kZeroPoint, F::kMaxCode>;
  typename S::I32x16 sum[8][2];
#pragma GCC unroll 8
  for (int o = 0; o < 8; ++o)
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) sum[o][b] = S::load_i32(t.sums[output + o] + 16 * (block + b));
  codes += 4 * output;
  for (int64_t i = 0; i < count; ++i, codes += 64) {
    const auto x0 = S::load_u8(t.x[i][block]), x1 = S::load_u8(t.x[i][block + 1]);
#pragma GCC unroll 8
    for (int o = 0; o < 8; ++o) {
      Dot::step_by(sum[o][0], codes + 4 * o, x0);
      Dot::step_by(sum[o][1], codes + 4 * o, x1);
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < 8; ++o)
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) S::store_i32(t.sums[output + o] + 16 * (block + b), sum[o][b]);
}

template <class S, class F>
void write_side(const LinearArgs& a, const SideScratch& t, int64_t strip, int64_t first,
                int64_t count, typename S::F32x16 sw) {
  for (int64_t r = 0; r < count; ++r) {
    const int at = S::joined_row(static_cast<int>(r));
    alignas(64) int32_t dot[kStrip];
    for (int o = 0; o < kStrip; ++o) dot[o] = t.sums[o][at] - F::kZeroPoint * t.zero[at];
    write_outputs<S>(a, strip, first + r,
                     scale_row<S, F>(S::load_i32(dot), sw, a.x->scale[first + r]));
  }
}

template <class S, class F>
void multiply_strip_side(const LinearArgs& a, SideScratch& t, int64_t strip, int64_t first,
                         int64_t count) {
  const auto c = F::open(*a.w, strip);
  const int64_t fours = list_columns(t, c.bitmap, a.x->k_pad);
  __builtin_memset(t.sums, 0, sizeof(t.sums));
  __builtin_memset(t.zero, 0, sizeof(t.zero));
  for (int64_t i = 0; i < fours; i += kSideQuads) {
    const int64_t some = kSideQuads < fours - i ? kSideQuads : fours - i;
    take_columns<S>(t, i, some);
    for (int output = 0; output < kStrip; output += 8)
      for (int block = 0; block < 4; block += 2)
        multiply_side<S, F>(t, c.blocks + 64 * i, some, output, block);
  }
  write_side<S, F>(a, t, strip, first, count, F::template scale<S>(c));
}

// The last m % 64 rows are gemm's where they are few.
template <class S, class F>
void gemm_columns(const LinearArgs& a) {
  auto& t = *static_cast<SideScratch*>(a.scratch);
  const Rows& x = *a.x;
  const int64_t left = x.m % kSideRows;
  const int64_t whole = x.k_pad > kSideInputs ? 0 : left < kSideLeast ? x.m - left : x.m;
  for (int64_t r = 0; r < whole; r += kSideRows) {
    const int64_t count = kSideRows < x.m - r ? kSideRows : x.m - r;
    lay_side_by_side<S>(t, x, r, count);
    for (int64_t s = a.strip_begin; s < a.strip_end; ++s)
      multiply_strip_side<S, F>(a, t, s, r, count);
  }
  if (whole == x.m) return;
  Rows rest = x;
  rest.m -= whole;
  rest.q += whole * x.k_pad;
  rest.scale += whole;
  rest.sum += whole;
  LinearArgs more = a;
  more.x = &rest;
  more.y += whole * a.ldy;
  gemm<S, F>(more);
}

}  // namespace
}  // namespace lacewing
