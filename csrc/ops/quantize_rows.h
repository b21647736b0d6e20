// Activations as linear layers read them: int8 groups with scale and sum, or interleaved floats.
#pragma once

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

// One group of `Chunks` x 16 columns.
template <class S, int Chunks>
inline void quantize_group(const float* x, int64_t k, int64_t col, int8_t* q, int rows, int lane,
                           float* scale, int32_t* sum) {
  typename S::F32x16 v[Chunks];
  const bool whole = col + 16 * Chunks <= k;
  for (int c = 0; c < Chunks; ++c)
    v[c] = whole ? S::load(x + col + 16 * c) : load_columns<S>(x, k, col + 16 * c);
  auto largest = S::zero();
  for (int c = 0; c < Chunks; ++c)
    largest = S::max(S::abs(v[c]), largest);  // drops NaN: the second operand wins
  const float amax = S::hmax(largest);
  float inverse = 127.0f / amax;
  const bool zero = !(inverse <= 3.402823466e38f);  // amax is 0 or too tiny to invert
  if (zero) inverse = 0.0f;
  auto total = S::set1_i32(0);
  for (int c = 0; c < Chunks; ++c) {
    const auto scaled = S::mul(v[c], S::set1(inverse));
    const auto bounded = S::min(S::max(scaled, S::set1(-127.0f)), S::set1(127.0f));
    const auto codes = S::to_i32(bounded);
    total = S::add_i32(total, codes);
    store_interleaved<S>(q, codes, col + 16 * c, rows, lane);
  }
  *scale = zero ? 0.0f : amax / 127.0f;
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
  const auto quantize = dst.group == 32 ? quantize_group<S, 2> : quantize_group<S, 4>;
  const int64_t groups = dst.k_pad / dst.group;
  int8_t* q = dst.q + start * dst.k_pad;
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int64_t at = start * groups + g * rows + lane;
    quantize(x, k, g * dst.group, q, rows, lane, dst.scale + at, dst.sum + at);
  }
}

}  // namespace
}  // namespace lacewing
