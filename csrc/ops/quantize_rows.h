// Activations as linear layers read them: int8 groups with scale and sum, or interleaved floats.
#pragma once

#include "core/inline.h"
#include "ops/elementwise.h"

namespace lacewing {
namespace {

// 16 consecutive quantized columns of lane `lane` into a block of `rows` interleaved rows.
template <class S>
inline void store_interleaved(int8_t* q, typename S::I32x16 v, int64_t col, int rows, int lane) {
  if (rows == 1) return S::store_i8(q + col, v);
  int8_t bytes[16];
  S::store_i8(bytes, v);
  for (int i = 0; i < 4; ++i)
    __builtin_memcpy(q + (col + 4 * i) * rows + 4 * lane, bytes + 4 * i, 4);
}

template <class S>
inline typename S::F32x16 load_columns(const float* x, int64_t k, int64_t col) {
  return col + 16 <= k ? S::load(x + col) : S::load_n(x + col, col < k ? k - col : 0);
}

struct Steps {
  float inverse, scale;  // 127 / amax, amax / 127
};
LW_INLINE Steps steps_of(float amax) {
  const float inverse = 127.0f / amax;
  if (!(inverse <= 3.402823466e38f)) return {0.0f, 0.0f};  // amax is 0 or too tiny to invert
  return {inverse, amax / 127.0f};
}

template <class S>
LW_INLINE typename S::I32x16 to_codes(typename S::F32x16 x, float inverse) {
  const auto scaled = S::mul(x, S::set1(inverse));
  return S::to_i32(S::min(S::max(scaled, S::set1(-127.0f)), S::set1(127.0f)));
}

// One group of `Chunks` x 16 columns, which stay in registers: all of them are below k if `Whole`.
template <class S, int Chunks, bool Whole>
inline void quantize_group(const float* x, int64_t k, int64_t col, int8_t* q, int rows, int lane,
                           float* scale, int32_t* sum) {
  typename S::F32x16 v[Chunks];
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c)
    v[c] = Whole ? S::load(x + col + 16 * c) : load_columns<S>(x, k, col + 16 * c);
  auto largest = S::zero();
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c)
    largest = S::max(S::abs(v[c]), largest);  // drops NaN: the second operand wins
  const auto [inverse, step] = steps_of(S::hmax(largest));
  auto total = S::set1_i32(0);
#pragma GCC unroll 4
  for (int c = 0; c < Chunks; ++c) {
    const auto codes = to_codes<S>(v[c], inverse);
    total = S::add_i32(total, codes);
    store_interleaved<S>(q, codes, col + 16 * c, rows, lane);
  }
  *scale = step;
  *sum = S::sum_i32(total);
}

// Groups [begin, end) of row r, `Chunks` x 16 columns each.
template <class S, int Chunks>
void quantize_groups(const float* x, int64_t k, const Rows& dst, int8_t* q, int64_t at, int rows,
                     int lane, int64_t begin, int64_t end) {
  const int64_t whole = k / (16 * Chunks);
  for (int64_t g = begin; g < end; ++g) {
    float* scale = dst.scale + at + g * rows;
    int32_t* sum = dst.sum + at + g * rows;
    if (g < whole)
      quantize_group<S, Chunks, true>(x, k, g * 16 * Chunks, q, rows, lane, scale, sum);
    else
      quantize_group<S, Chunks, false>(x, k, g * 16 * Chunks, q, rows, lane, scale, sum);
  }
}

// As `quantize_group` for a group of any length, a multiple of 64: two passes over it.
template <class S>
void quantize_long_group(const float* x, int64_t k, int64_t col, int64_t group, int8_t* q, int rows,
                         int lane, float* scale, int32_t* sum) {
  auto largest = S::zero();
  for (int64_t i = col; i < col + group; i += 16)
    largest = S::max(S::abs(load_columns<S>(x, k, i)), largest);
  const auto [inverse, step] = steps_of(S::hmax(largest));
  auto total = S::set1_i32(0);
  for (int64_t i = col; i < col + group; i += 16) {
    const auto codes = to_codes<S>(load_columns<S>(x, k, i), inverse);
    total = S::add_i32(total, codes);
    store_interleaved<S>(q, codes, i, rows, lane);
  }
  *scale = step;
  *sum = S::sum_i32(total);
}

// Columns in pairs `[k_pad/2][rows][2]`; columns past k are 0.
template <class S>
void interleave_floats(const float* x, int64_t k, int64_t begin, int64_t end, float* f, int rows,
                       int lane) {
  for (int64_t col = begin; col < end; col += 2) {
    float* pair = f + col * rows + 2 * lane;
    pair[0] = col < k ? x[col] : 0.0f;
    pair[1] = col + 1 < k ? x[col + 1] : 0.0f;
  }
}

// Groups [group_begin, group_end) of row r (see `KernelTable::quantize_row`).
template <class S>
void quantize_row(const float* x, int64_t k, const Rows& dst, int64_t r, int64_t group_begin,
                  int64_t group_end) {
  const int64_t block = r / kRowBlock;
  const int lane = static_cast<int>(r % kRowBlock), rows = dst.rows_in(block);
  const int64_t start = block * kRowBlock;
  if (dst.group == 0) {
    const int64_t end = group_end * 64 < dst.k_pad ? group_end * 64 : dst.k_pad;
    interleave_floats<S>(x, k, group_begin * 64, end, dst.f + start * dst.k_pad, rows, lane);
    return;
  }
  const int64_t groups = dst.k_pad / dst.group;
  int8_t* q = dst.q + start * dst.k_pad;
  const int64_t first = start * groups + lane;
  if (dst.group == 32)
    return quantize_groups<S, 2>(x, k, dst, q, first, rows, lane, group_begin, group_end);
  if (dst.group == 64)
    return quantize_groups<S, 4>(x, k, dst, q, first, rows, lane, group_begin, group_end);
  for (int64_t g = group_begin; g < group_end; ++g)
    quantize_long_group<S>(x, k, g * dst.group, dst.group, q, rows, lane,
                           dst.scale + first + g * rows, dst.sum + first + g * rows);
}

}  // namespace
}  // namespace lacewing
