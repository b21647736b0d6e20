// What attention over an integer KV codec multiplies: queries as int8 or int16, softmax weights as
// codes 0..128.
#pragma once

#include "formats/kv.h"
#include "ops/quantize_rows.h"

namespace lacewing {
namespace {

constexpr int64_t kSpan = 128;  // tokens of one softmax update
constexpr int kSpanBlocks = kSpan / kBlock;

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

// One query as int16, pad64(head_dim) of them in `to`. Returns the scale. A NaN counts as the
// lowest value.
template <class S>
float wide_query_codes(const float* x, int64_t head_dim, int16_t* to) {
  auto largest = S::zero();
  for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
    largest = S::max(S::abs(load_lanes<S>(x + i, lanes)), largest);
  });
  const float amax = S::hmax(largest), inverse = 32767.0f / amax;
  const bool none = !(inverse <= 3.402823466e38f);
  __builtin_memset(to, 0, static_cast<size_t>(2 * pad_to(head_dim, 64)));
  for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
    int32_t codes[16];
    const auto scaled = S::mul(load_lanes<S>(x + i, lanes), S::set1(none ? 0.0f : inverse));
    S::store_i32(codes, S::to_i32(S::min(S::max(scaled, S::set1(-32767.0f)), S::set1(32767.0f))));
    for (int64_t j = 0; j < lanes; ++j) to[i + j] = static_cast<int16_t>(codes[j]);
  });
  return none ? 0.0f : amax / 32767.0f;
}

// Softmax weights (the value's scale included) [size][kSpan] as codes 0..128. Every block has a
// scale of its own, or the small weights beside the first token's, which is often large, would be
// lost. `largest` [size][kSpanBlocks] become scales. Weights below 2^-100 are nothing. Codes of
// four blocks lie together, [kSpan/64][4][4 blocks][4 tokens], as S::to_u8 makes them.
template <class S>
void weight_codes(const float* weight, int size, float* largest, uint8_t* codes) {
  alignas(64) float inverses[16];
  for (int i = 0; i < size * kSpanBlocks; i += 16) {
    const auto top = S::load(largest + i), least = S::set1(0x1p-100f);
    S::store(inverses, S::select_gt(top, least, S::div(S::set1(128.0f), top), S::zero()));
    S::store(largest + i, S::mul(top, S::set1(1.0f / 128.0f)));
    for (int b = 0; b < 16 && i + b < size * kSpanBlocks; b += 4) {
      const float* w = weight + (i + b) * kBlock;
      const auto scaled = [&](int j) {
        return S::mul(S::load(w + j * kBlock), S::set1(inverses[b + j]));
      };
      S::store_u8(codes + (i + b) * kBlock, S::to_u8(scaled(0), scaled(1), scaled(2), scaled(3)));
    }
  }
}

}  // namespace
}  // namespace lacewing
