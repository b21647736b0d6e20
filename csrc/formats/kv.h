// KV cache codecs: how the keys and values of 16 tokens and one head lie in a block, how one token
// is stored, and how attention reads them. A codec knows no loop, no thread and no ISA. Many
// queries at once read blocks of the codec `Expanded`; void: the blocks as they are.
//
//   f16, f32  K [head_dim][16] (lanes are tokens), V [16][pad16(head_dim)]
//   bf16      K [pad2(head_dim)/2][16][2], V [8][pad16(head_dim)][2]: pairs of inputs, of tokens
//   int8      f16 K scales [16], f16 V scales [16]: 64 bytes;
//             K codes uint8 [pad4(head_dim)/4][16][4], 128 + code: a VNNI block is 16 tokens x 4;
//             V codes int8 [4][pad16(head_dim)][4]: 16 columns x 4 tokens
//
// Parts begin at multiples of 64 bytes. Everything stored is finite: attention multiplies masked
// lanes by 0, and a block's next owner must not meet the NaN of the last one.
#pragma once

#include "core/inline.h"
#include "core/kv.h"
#include "ops/quantize_rows.h"

namespace lacewing {
namespace {

inline constexpr int64_t pad_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Numbers that few vocabulary words turn into floats. `Number` has Element, kLargest, kRows (rows
// of 16 that lie together, element by element), load of one of them and store of 16 elements.
template <class Number>
struct FloatKv {
  using Element = typename Number::Element;
  using Expanded = FloatKv<struct F32>;
  static constexpr bool kInteger = false;
  static constexpr bool kMinima = false;
  static constexpr int kRows = Number::kRows;  // inputs of keys, tokens of values
  static constexpr int64_t kRowsBytes = 16 * kRows * sizeof(Element);

  static constexpr int64_t values_at(int64_t head_dim) {
    return pad_to(pad_to(head_dim, kRows) / kRows * kRowsBytes, 64);
  }
  // Of kRows tokens.
  static constexpr int64_t value_pitch(int64_t head_dim) {
    return pad_to(head_dim, 16) / 16 * kRowsBytes;
  }
  static constexpr int64_t block_bytes(int64_t head_dim) {
    return values_at(head_dim) + kBlock / kRows * value_pitch(head_dim);
  }

  // Input d + r of 16 tokens, d a multiple of kRows.
  template <class S>
  static LW_INLINE typename S::F32x16 key(const uint8_t* block, int64_t d, int r) {
    return Number::template load<S>(block + d / kRows * kRowsBytes, r);
  }
  // Columns column..column + 15 of token r of kRows.
  template <class S>
  static LW_INLINE typename S::F32x16 value(const uint8_t* tokens, int64_t column, int r) {
    return Number::template load<S>(tokens + column / 16 * kRowsBytes, r);
  }

  template <class S>
  static void store(const float* k, const float* v, uint8_t* block, int64_t lane,
                    int64_t head_dim) {
    Element row[16];
    auto* keys = reinterpret_cast<Element*>(block) + lane * kRows;
    auto* values = reinterpret_cast<Element*>(block + values_at(head_dim) +
                                              lane / kRows * value_pitch(head_dim)) +
                   lane % kRows;
    for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
      Number::template store<S>(row, finite<S>(load_lanes<S>(k + i, lanes)));
      for (int64_t j = i; j < i + lanes; ++j) keys[j / kRows * 16 * kRows + j % kRows] = row[j - i];
      Number::template store<S>(row, finite<S>(load_lanes<S>(v + i, lanes)));
      for (int64_t j = 0; j < 16; ++j) values[(i + j) * kRows] = row[j];
    });
  }

  // What is stored of one token.
  template <class S>
  static void load(const uint8_t* block, int64_t lane, float* k, float* v, int64_t head_dim) {
    Element row[16 * kRows] = {};
    const auto* bytes = reinterpret_cast<const uint8_t*>(row);
    const auto* keys = reinterpret_cast<const Element*>(block) + lane * kRows;
    const auto* values = reinterpret_cast<const Element*>(block + values_at(head_dim) +
                                                          lane / kRows * value_pitch(head_dim)) +
                         lane % kRows;
    for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
      for (int64_t j = i; j < i + lanes; ++j)
        row[(j - i) * kRows] = keys[j / kRows * 16 * kRows + j % kRows];
      store_lanes<S>(k + i, Number::template load<S>(bytes, 0), lanes);
      for (int64_t j = 0; j < lanes; ++j) row[j * kRows] = values[(i + j) * kRows];
      store_lanes<S>(v + i, Number::template load<S>(bytes, 0), lanes);
    });
  }

 private:
  // NaN becomes the lowest value.
  template <class S>
  static LW_INLINE typename S::F32x16 finite(typename S::F32x16 v) {
    return S::min(S::max(v, S::set1(-Number::kLargest)), S::set1(Number::kLargest));
  }
};

struct F16 {
  using Element = uint16_t;
  static constexpr float kLargest = 65504.0f;
  static constexpr int kRows = 1;
  template <class S>
  static LW_INLINE typename S::F32x16 load(const uint8_t* p, int) {
    return S::load_f16(reinterpret_cast<const uint16_t*>(p));
  }
  template <class S>
  static LW_INLINE void store(uint16_t* p, typename S::F32x16 v) {
    S::store_f16(p, v);
  }
};

// In pairs: a shift or a mask makes a row of floats.
struct Bf16Number {
  using Element = uint16_t;
  static constexpr float kLargest = 3.3895313892515355e38f;
  static constexpr int kRows = 2;
  template <class S>
  static LW_INLINE typename S::F32x16 load(const uint8_t* p, int r) {
    const auto pairs = S::load_u8(p);
    return r ? S::bf16_odd(pairs) : S::bf16_even(pairs);
  }
  template <class S>
  static LW_INLINE void store(uint16_t* p, typename S::F32x16 v) {
    S::store_bf16(p, v);
  }
};

struct F32 {
  using Element = float;
  static constexpr float kLargest = 3.4028234663852886e38f;
  static constexpr int kRows = 1;
  template <class S>
  static LW_INLINE typename S::F32x16 load(const uint8_t* p, int) {
    return S::load(reinterpret_cast<const float*>(p));
  }
  template <class S>
  static LW_INLINE void store(float* p, typename S::F32x16 v) {
    S::store(p, v);
  }
};

using F16Kv = FloatKv<F16>;
using Bf16Kv = FloatKv<Bf16Number>;
using F32Kv = FloatKv<F32>;

// How attention reads the codes of an integer codec's block, 64 at a time: all keys in order,
// kTogether of which are number 0, 1, ... of what is read at once; of four tokens, `fours` = 0..3,
// the values' next `chunks` of 16 columns in order, then `skip(chunks)`.
struct DenseKeys {
  static constexpr int kTogether = 1;
  const uint8_t* at;
  template <class S>
  LW_INLINE typename S::U8x64 next(int) {
    return S::load_u8((at += 64) - 64);
  }
};

struct DenseValues {
  const uint8_t* at;
  int64_t pitch;
  template <class S>
  LW_INLINE typename S::U8x64 next(int fours, int chunk) {
    return S::load_u8(at + fours * pitch + 64 * chunk);
  }
  LW_INLINE void skip(int chunks) { at += 64 * chunks; }
};

// int8 per token and head, symmetric: scale = f16(max|x| / 127), code = round_even(x / scale).
struct Int8Kv {
  using Expanded = void;
  static constexpr bool kInteger = true;
  static constexpr bool kMinima = false;  // numbers are scale * code
  static constexpr int64_t kScales = 64;  // bytes: f16 [2][16], keys' then values'

  static constexpr int64_t keys_at(int64_t) { return kScales; }
  static constexpr int64_t values_at(int64_t head_dim) {
    return kScales + pad_to(head_dim, 4) * kBlock;
  }
  // Of 4 tokens.
  static constexpr int64_t value_pitch(int64_t head_dim) { return 4 * pad_to(head_dim, 16); }
  static constexpr int64_t block_bytes(int64_t head_dim) {
    return values_at(head_dim) + kBlock / 4 * value_pitch(head_dim);
  }

  static LW_INLINE DenseKeys keys(const uint8_t* block, int64_t head_dim) {
    return {block + keys_at(head_dim)};
  }
  static LW_INLINE DenseValues values(const uint8_t* block, int64_t head_dim) {
    return {block + values_at(head_dim), value_pitch(head_dim)};
  }
  template <class S>
  static LW_INLINE typename S::F32x16 key_scales(const uint8_t* block) {
    return S::load_f16(reinterpret_cast<const uint16_t*>(block));
  }
  template <class S>
  static LW_INLINE typename S::F32x16 value_scales(const uint8_t* block) {
    return S::load_f16(reinterpret_cast<const uint16_t*>(block) + kBlock);
  }

  template <class S>
  static void store(const float* k, const float* v, uint8_t* block, int64_t lane,
                    int64_t head_dim) {
    auto* scales = reinterpret_cast<uint16_t*>(block) + lane;
    uint8_t* keys = block + kScales + 4 * lane;
    const float k_inverse = store_scale<S>(k, head_dim, scales);
    const float v_inverse = store_scale<S>(v, head_dim, scales + kBlock);
    auto* values = reinterpret_cast<int8_t*>(block + values_at(head_dim)) +
                   lane / 4 * value_pitch(head_dim) + lane % 4;
    int8_t codes[16];
    for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
      S::store_i8(codes, to_codes<S>(load_lanes<S>(v + i, lanes), v_inverse));
      for (int64_t j = 0; j < 16; ++j) values[4 * (i + j)] = codes[j];
      S::store_i8(codes, to_codes<S>(load_lanes<S>(k + i, lanes), k_inverse));
      for (int64_t j = 0; j < pad_to(lanes, 4); ++j)
        keys[(i + j) / 4 * 64 + j % 4] = static_cast<uint8_t>(codes[j] + 128);
    });
  }

  // What is stored of one token.
  template <class S>
  static void load(const uint8_t* block, int64_t lane, float* k, float* v, int64_t head_dim) {
    float k_scale[16], v_scale[16];
    S::store(k_scale, key_scales<S>(block));
    S::store(v_scale, value_scales<S>(block));
    const uint8_t* keys = block + kScales + 4 * lane;
    const auto* values = reinterpret_cast<const int8_t*>(block + values_at(head_dim)) +
                         lane / 4 * value_pitch(head_dim) + lane % 4;
    for (int64_t d = 0; d < head_dim; ++d) {
      k[d] = static_cast<float>(keys[d / 4 * 64 + d % 4] - 128) * k_scale[lane];
      v[d] = static_cast<float>(values[4 * d]) * v_scale[lane];
    }
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
