// What attention over an integer KV codec multiplies: queries as int8, softmax weights as 15 bits.
#pragma once

#include "ops/quantize_rows.h"

namespace lacewing {
namespace {

// One query as int8, every fourth of `size` x 4 bytes of `to`. Returns the scale; *sum: of the
// codes. A NaN counts as the lowest value.
template <class S>
float query_codes(const float* x, int64_t head_dim, int64_t size, int8_t* to, int32_t* sum) {
  auto largest = S::zero();
  for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
    largest = S::max(S::abs(load_lanes<S>(x + i, lanes)), largest);
  });
  const auto [inverse, step] = steps_of(S::hmax(largest));
  auto sums = S::set1_i32(0);
  for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
    int8_t codes[16];
    const auto q = to_codes<S>(load_lanes<S>(x + i, lanes), inverse);
    sums = S::add_i32(sums, q);
    S::store_i8(codes, q);
    for (int64_t j = 0; j < lanes; j += 4) __builtin_memcpy(to + (i + j) * size, codes + j, 4);
  });
  *sum = S::sum_i32(sums);
  return step;
}

// Weights of a span (the value's scales included) as codes for S::WideDot. The scale, which is
// returned, is a power of two, so that rounding is all that is lost: the largest weight becomes
// 2^14..2^15. Seven bits would lose the small weights beside the first token's, which is often
// large. Weights below 2^-100 are nothing.
template <class S>
float weight_codes(const float* weight, int64_t columns, float largest, uint8_t* codes) {
  uint32_t bits;
  __builtin_memcpy(&bits, &largest, 4);
  bits &= 0x7f800000;
  float power;
  __builtin_memcpy(&power, &bits, 4);
  const bool none = power < 0x1p-100f;
  const auto inverse = S::set1(none ? 0.0f : 0x1p14f / power);
  for (int64_t t = 0; t < columns; t += 16)
    S::WideDot::prepare(codes + 2 * t, S::mul(S::load(weight + t), inverse));
  return none ? 0.0f : power * 0x1p-14f;
}

}  // namespace
}  // namespace lacewing
