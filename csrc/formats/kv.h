// KV cache codecs: how the keys and values of 16 tokens and one head lie in a block, how one token
// is stored, and how attention reads them. A codec knows no loop, no thread and no ISA.
//
//   floats  K [head_dim][16] (lanes are tokens), V [16][pad16(head_dim)]
//   int8    f16 K scales [16], f16 V scales [16]: 64 bytes;
//           K codes uint8 [pad4(head_dim)/4][16][4], 128 + code: a VNNI block is 16 tokens x 4;
//           V codes int8 [16][pad16(head_dim)]
//
// Parts begin at multiples of 64 bytes. Everything stored is finite: attention multiplies masked
// lanes by 0, and a block's next owner must not meet the NaN of the last one.
#pragma once

#include "core/inline.h"
#include "core/kv.h"
#include "ops/elementwise.h"

namespace lacewing {
namespace {

inline constexpr int64_t pad_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Blocks of numbers that one vocabulary word turns into floats. `Number` has Element, kLargest and
// load and store of 16 elements.
template <class Number>
struct FloatKv {
  using Element = typename Number::Element;
  static constexpr bool kInteger = false;
  static constexpr int64_t kLineRows = 64 / (16 * sizeof(Element));  // rows of 16 in 64 bytes

  static constexpr int64_t keys_at(int64_t) { return 0; }
  static constexpr int64_t values_at(int64_t head_dim) {
    return pad_to(head_dim * kBlock * static_cast<int64_t>(sizeof(Element)), 64);
  }
  static constexpr int64_t value_pitch(int64_t head_dim) {
    return pad_to(head_dim, 16) * static_cast<int64_t>(sizeof(Element));
  }
  static constexpr int64_t block_bytes(int64_t head_dim) {
    return values_at(head_dim) + kBlock * value_pitch(head_dim);
  }

  // Input d of 16 tokens.
  template <class S>
  static LW_INLINE typename S::F32x16 key(const uint8_t* keys, int64_t d) {
    return load<S>(keys, d * kBlock);
  }
  // Columns column..column + 15 of one token.
  template <class S>
  static LW_INLINE typename S::F32x16 value(const uint8_t* row, int64_t column) {
    return load<S>(row, column);
  }

  template <class S>
  static void store(const float* k, const float* v, uint8_t* block, int64_t lane,
                    int64_t head_dim) {
    Element row[16];
    auto* keys = reinterpret_cast<Element*>(block);
    auto* values =
        reinterpret_cast<Element*>(block + values_at(head_dim) + lane * value_pitch(head_dim));
    for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
      Number::template store<S>(row, finite<S>(load_lanes<S>(k + i, lanes)));
      for (int64_t j = 0; j < lanes; ++j) keys[(i + j) * kBlock + lane] = row[j];
      Number::template store<S>(values + i, finite<S>(load_lanes<S>(v + i, lanes)));
    });
  }

 private:
  template <class S>
  static LW_INLINE typename S::F32x16 load(const uint8_t* p, int64_t at) {
    return Number::template load<S>(reinterpret_cast<const Element*>(p) + at);
  }
  // NaN becomes the lowest value.
  template <class S>
  static LW_INLINE typename S::F32x16 finite(typename S::F32x16 v) {
    return S::min(S::max(v, S::set1(-Number::kLargest)), S::set1(Number::kLargest));
  }
};

struct F16 {
  using Element = uint16_t;
  static constexpr float kLargest = 65504.0f;
  template <class S>
  static LW_INLINE typename S::F32x16 load(const uint16_t* p) {
    return S::load_f16(p);
  }
  template <class S>
  static LW_INLINE void store(uint16_t* p, typename S::F32x16 v) {
    S::store_f16(p, v);
  }
};

struct Bf16Number {
  using Element = uint16_t;
  static constexpr float kLargest = 3.3895313892515355e38f;
  template <class S>
  static LW_INLINE typename S::F32x16 load(const uint16_t* p) {
    return S::load_bf16(p);
  }
  template <class S>
  static LW_INLINE void store(uint16_t* p, typename S::F32x16 v) {
    S::store_bf16(p, v);
  }
};

struct F32 {
  using Element = float;
  static constexpr float kLargest = 3.4028234663852886e38f;
  template <class S>
  static LW_INLINE typename S::F32x16 load(const float* p) {
    return S::load(p);
  }
  template <class S>
  static LW_INLINE void store(float* p, typename S::F32x16 v) {
    S::store(p, v);
  }
};

using F16Kv = FloatKv<F16>;
using Bf16Kv = FloatKv<Bf16Number>;
using F32Kv = FloatKv<F32>;

// int8 per token and head, symmetric: scale = f16(max|x| / 127), code = round_even(x / scale).
struct Int8Kv {
  static constexpr bool kInteger = true;
  static constexpr int64_t kScales = 64;   // bytes: f16 [2][16], keys' then values'
  static constexpr int64_t kLineRows = 1;  // a row of keys is a VNNI block

  static constexpr int64_t keys_at(int64_t) { return kScales; }
  static constexpr int64_t values_at(int64_t head_dim) {
    return kScales + pad_to(head_dim, 4) * kBlock;
  }
  static constexpr int64_t value_pitch(int64_t head_dim) { return pad_to(head_dim, 16); }
  static constexpr int64_t block_bytes(int64_t head_dim) {
    return values_at(head_dim) + kBlock * value_pitch(head_dim);
  }

  template <class S>
  static LW_INLINE typename S::F32x16 key_scales(const uint8_t* block) {
    return S::load_f16(reinterpret_cast<const uint16_t*>(block));
  }
  template <class S>
  static LW_INLINE typename S::F32x16 value_scales(const uint8_t* block) {
    return S::load_f16(reinterpret_cast<const uint16_t*>(block) + kBlock);
  }
  // Codes, without their scale.
  template <class S>
  static LW_INLINE typename S::F32x16 value(const uint8_t* row, int64_t column) {
    return S::from_i32(S::load_i8(reinterpret_cast<const int8_t*>(row) + column));
  }

  template <class S>
  static void store(const float* k, const float* v, uint8_t* block, int64_t lane,
                    int64_t head_dim) {
    auto* scales = reinterpret_cast<uint16_t*>(block) + lane;
    uint8_t* keys = block + kScales + 4 * lane;
    const float k_inverse = store_scale<S>(k, head_dim, scales);
    const float v_inverse = store_scale<S>(v, head_dim, scales + kBlock);
    auto* row =
        reinterpret_cast<int8_t*>(block + values_at(head_dim)) + lane * value_pitch(head_dim);
    int8_t codes[16];
    for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
      S::store_i8(row + i, quantized<S>(load_lanes<S>(v + i, lanes), v_inverse));
      S::store_i8(codes, quantized<S>(load_lanes<S>(k + i, lanes), k_inverse));
      for (int64_t j = 0; j < pad_to(lanes, 4); ++j)
        keys[(i + j) / 4 * 64 + j % 4] = static_cast<uint8_t>(codes[j] + 128);
    });
  }

  template <class S>
  static LW_INLINE typename S::I32x16 quantized(typename S::F32x16 x, float inverse) {
    const auto scaled = S::mul(x, S::set1(inverse));
    return S::to_i32(S::min(S::max(scaled, S::set1(-127.0f)), S::set1(127.0f)));
  }

 private:
  // Stores the scale of x and returns its inverse (0 if it is too small for f16).
  template <class S>
  static float store_scale(const float* x, int64_t head_dim, uint16_t* scale) {
    auto largest = S::zero();
    for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
      largest = S::max(S::abs(load_lanes<S>(x + i, lanes)), largest);  // drops NaN
    });
    const float amax = S::hmax(largest);
    uint16_t half[16];
    float widened[16];
    S::store_f16(half, S::min(S::set1(amax / 127.0f), S::set1(F16::kLargest)));
    S::store(widened, S::load_f16(half));
    *scale = half[0];
    return widened[0] > 0.0f ? 1.0f / widened[0] : 0.0f;
  }
};

}  // namespace
}  // namespace lacewing
