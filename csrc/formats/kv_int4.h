// The KV cache codec of 4 bits, sealed from int8: keys are scale * code + minimum, per channel of
// the block's 16 tokens, values scale * (code - zero), per token (KIVI, arXiv 2402.02750).
//
//   int4  V scales f16 [16], V zeros u8 [16], in sixteenths of a code, unit of K scales f32 (a
//         power of two), 12 bytes of 0; K scales i16 [pad16(head_dim)], in units, K minima f16
//         [pad16(head_dim)]; K codes, as the vectors of the int8 block, two in the low and high
//         nibbles of 64 bytes: [pad8(head_dim)/8][16][4]; V codes likewise, of tokens t and t + 4:
//         [2][pad16(head_dim)][4]
//
// Parts begin at multiples of 64 bytes.
#pragma once

#include "formats/kv.h"
#include "ops/limits.h"

namespace lacewing {
namespace {

struct Int4Keys {
  static constexpr int kTogether = 2;
  const uint8_t* at;
  template <class S>
  LW_INLINE typename S::U8x64 next(int which) {
    const auto pair = S::load_u8(at);
    at += which * 64;
    return which ? S::shr4_u8(pair) : S::and_u8(pair, 15);
  }
};

struct Int4Values {
  const uint8_t* at;
  int64_t pitch;
  template <class S>
  LW_INLINE typename S::U8x64 next(int fours, int chunk) {
    const auto pair = S::load_u8(at + fours / 2 * pitch + 64 * chunk);
    return fours % 2 ? S::shr4_u8(pair) : S::and_u8(pair, 15);
  }
  LW_INLINE void skip(int chunks) { at += 64 * chunks; }
};

struct Int4Kv {
  using Growing = Int8Kv;
  using Expanded = void;
  static constexpr bool kInteger = true;
  static constexpr bool kMinima = true;

  static constexpr int64_t key_scales_at() { return 64; }
  static constexpr int64_t key_minima_at(int64_t head_dim) {
    return key_scales_at() + 2 * pad_to(head_dim, 16);
  }
  static constexpr int64_t keys_at(int64_t head_dim) {
    return key_minima_at(head_dim) + 2 * pad_to(head_dim, 16);
  }
  static constexpr int64_t values_at(int64_t head_dim) {
    return keys_at(head_dim) + 8 * pad_to(head_dim, 8);
  }
  static constexpr int64_t value_pitch(int64_t head_dim) { return 4 * pad_to(head_dim, 16); }
  static constexpr int64_t block_bytes(int64_t head_dim) {
    return values_at(head_dim) + 2 * value_pitch(head_dim);
  }

  static LW_INLINE Int4Keys keys(const uint8_t* block, int64_t head_dim) {
    return {block + keys_at(head_dim)};
  }
  static LW_INLINE Int4Values values(const uint8_t* block, int64_t head_dim) {
    return {block + values_at(head_dim), value_pitch(head_dim)};
  }
  // i16, and behind them what does not disturb their product with zeros.
  static LW_INLINE const uint8_t* channel_scales(const uint8_t* block) {
    return block + key_scales_at();
  }
  static LW_INLINE float channel_unit(const uint8_t* block) {
    float unit;
    __builtin_memcpy(&unit, block + kUnitAt, 4);
    return unit;
  }
  // Of the channels c..c + 15.
  template <class S>
  static LW_INLINE typename S::F32x16 channel_minima(const uint8_t* block, int64_t head_dim,
                                                     int64_t c) {
    return S::load_f16(f16(block + key_minima_at(head_dim)) + c);
  }
  template <class S>
  static LW_INLINE typename S::F32x16 value_scales(const uint8_t* block) {
    return S::load_f16(f16(block));
  }
  // What is added to the tokens' codes.
  template <class S>
  static LW_INLINE typename S::F32x16 value_zeros(const uint8_t* block) {
    return S::mul(S::floats_of_u8(block + kZerosAt), S::set1(-0.0625f));
  }

  template <class S>
  static void seal(const uint8_t* growing, uint8_t* block, int64_t head_dim) {
    __builtin_memset(block, 0, static_cast<size_t>(block_bytes(head_dim)));
    seal_keys<S>(growing, block, head_dim);
    for (int64_t t = 0; t < kBlock; ++t) seal_token<S>(growing, block, t, head_dim);
  }

 private:
  static constexpr int64_t kZerosAt = 32, kUnitAt = 48;

  static LW_INLINE const uint16_t* f16(const uint8_t* p) {
    return reinterpret_cast<const uint16_t*>(p);
  }

  // The keys of one channel.
  template <class S>
  static LW_INLINE typename S::F32x16 channel(const uint8_t* growing, int64_t c, int64_t head_dim) {
    const uint8_t* from = growing + Int8Kv::keys_at(head_dim) + c / 4 * 64 + c % 4;
    float row[16];
    for (int t = 0; t < 16; ++t) row[t] = static_cast<float>(from[4 * t] - 128);
    return S::mul(S::load(row), Int8Kv::key_scales<S>(growing));
  }

  template <class S>
  static void seal_keys(const uint8_t* growing, uint8_t* block, int64_t head_dim) {
    float scales[kMaxHeadDim], largest = 0.0f;
    for (int64_t c = 0; c < head_dim; ++c) {
      const auto keys = channel<S>(growing, c, head_dim);
      const float low = -S::hmax(S::neg(keys));
      scales[c] = (S::hmax(keys) - low) / 15.0f;
      largest = scales[c] > largest ? scales[c] : largest;
      store_half<S>(low, block + key_minima_at(head_dim) + 2 * c);
    }
    const float unit = unit_of(largest), units = inverse_of(unit);
    __builtin_memcpy(block + kUnitAt, &unit, 4);
    for (int64_t c = 0; c < head_dim; ++c) {
      const float scale = scales[c] * units + 0.5f;
      const auto code = static_cast<int16_t>(scale < 32767.0f ? scale : 32767.0f);
      __builtin_memcpy(block + key_scales_at() + 2 * c, &code, 2);
      seal_channel<S>(growing, block, c, head_dim, static_cast<float>(code) * unit);
    }
  }

  template <class S>
  static void seal_channel(const uint8_t* growing, uint8_t* block, int64_t c, int64_t head_dim,
                           float scale) {
    float minima[16];
    S::store(minima, channel_minima<S>(block, head_dim, c / 16 * 16));
    const auto keys = S::sub(channel<S>(growing, c, head_dim), S::set1(minima[c % 16]));
    int8_t codes[16];
    S::store_i8(codes, round<S>(S::mul(keys, S::set1(inverse_of(scale)))));
    uint8_t* to = block + keys_at(head_dim) + c / 8 * 64 + c % 4;
    for (int t = 0; t < 16; ++t) to[4 * t] |= static_cast<uint8_t>(codes[t] << c / 4 % 2 * 4);
  }

  // The values of one token, between whose extremes zero is counted.
  template <class S>
  static void seal_token(const uint8_t* growing, uint8_t* block, int64_t t, int64_t head_dim) {
    const auto* from = reinterpret_cast<const int8_t*>(growing) + Int8Kv::values_at(head_dim) +
                       t / 4 * Int8Kv::value_pitch(head_dim) + t % 4;
    float scales[16];
    S::store(scales, Int8Kv::value_scales<S>(growing));
    int low = 0, high = 0;
    for (int64_t c = 0; c < head_dim; ++c) {
      low = from[4 * c] < low ? from[4 * c] : low;
      high = from[4 * c] > high ? from[4 * c] : high;
    }
    const float scale =
        store_half<S>(static_cast<float>(high - low) * scales[t] / 15.0f, block + 2 * t);
    const float inverse = inverse_of(scale) * scales[t];
    const float zero = static_cast<float>(-low) * inverse * 16.0f + 0.5f;
    block[kZerosAt + t] = static_cast<uint8_t>(zero < 240.0f ? zero : 240.0f);
    uint8_t* to = block + values_at(head_dim) + t / 8 * value_pitch(head_dim) + t % 4;
    for_chunks(head_dim, [&](int64_t c, int64_t lanes) {
      float row[16];
      for (int64_t i = 0; i < 16; ++i)
        row[i] = i < lanes ? static_cast<float>(from[4 * (c + i)]) : 0.0f;
      int8_t codes[16];
      S::store_i8(codes,
                  round<S>(S::add(S::mul(S::load(row), S::set1(inverse)),
                                  S::set1(static_cast<float>(block[kZerosAt + t]) * 0.0625f))));
      for (int64_t i = 0; i < lanes; ++i)
        to[4 * (c + i)] |= static_cast<uint8_t>(codes[i] << t / 4 % 2 * 4);
    });
  }

  // What is stored.
  template <class S>
  static float store_half(float x, uint8_t* at) {
    float row[16];
    uint16_t half[16];
    const auto largest = S::set1(F16::kLargest);
    S::store_f16(half, S::min(S::max(S::set1(x), S::neg(largest)), largest));
    S::store(row, S::load_f16(half));
    __builtin_memcpy(at, half, 2);
    return row[0];
  }
  // The power of two that makes 2^14..2^15 of it, or 0.
  static LW_INLINE float unit_of(float largest) {
    uint32_t bits;
    __builtin_memcpy(&bits, &largest, 4);
    bits &= 0x7f800000;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return power * 0x1p-14f;
  }
  static LW_INLINE float inverse_of(float scale) { return scale > 0x1p-100f ? 1.0f / scale : 0.0f; }
  template <class S>
  static LW_INLINE typename S::I32x16 round(typename S::F32x16 x) {
    return S::to_i32(S::min(S::max(x, S::zero()), S::set1(15.0f)));
  }
};

}  // namespace
}  // namespace lacewing
