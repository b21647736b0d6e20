// The KV cache codec of 4 bits, sealed from int8: numbers are scale * code + minimum, per channel of
// the block's 16 tokens for keys, per token for values (KIVI, arXiv 2402.02750).
//
//   int4  V scales f16 [16], V minima f16 [16]: 64 bytes;
//         K scales f16 [pad16(head_dim)], K minima f16 [pad16(head_dim)];
//         K codes, as the vectors of the int8 block, two in the low and high nibbles of 64 bytes:
//         [pad8(head_dim)/8][16][4]; V codes likewise, of tokens t and t + 4: [2][pad16(head_dim)][4]
//
// Parts begin at multiples of 64 bytes.
#pragma once

#include "formats/kv.h"

namespace lacewing {
namespace {

struct Int4Keys {
  const uint8_t* at;
  int64_t taken = 0;
  template <class S>
  LW_INLINE typename S::U8x64 next() {
    const auto pair = S::load_u8(at + taken / 2 * 64);
    return taken++ % 2 ? S::shr4_u8(pair) : S::and_u8(pair, 15);
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
  // Of the channels c..c + 15.
  template <class S>
  static LW_INLINE typename S::F32x16 channel_scales(const uint8_t* block, int64_t c) {
    return S::load_f16(f16(block + key_scales_at()) + c);
  }
  template <class S>
  static LW_INLINE typename S::F32x16 channel_minima(const uint8_t* block, int64_t head_dim,
                                                     int64_t c) {
    return S::load_f16(f16(block + key_minima_at(head_dim)) + c);
  }
  template <class S>
  static LW_INLINE typename S::F32x16 value_scales(const uint8_t* block) {
    return S::load_f16(f16(block));
  }
  template <class S>
  static LW_INLINE typename S::F32x16 value_minima(const uint8_t* block) {
    return S::load_f16(f16(block) + kBlock);
  }

  template <class S>
  static void seal(const uint8_t* growing, uint8_t* block, int64_t head_dim) {
    __builtin_memset(block, 0, static_cast<size_t>(block_bytes(head_dim)));
    for (int64_t c = 0; c < head_dim; ++c) seal_channel<S>(growing, block, c, head_dim);
    for (int64_t t = 0; t < kBlock; ++t) seal_token<S>(growing, block, t, head_dim);
  }

 private:
  struct Steps {
    float inverse, minimum;
  };

  static LW_INLINE const uint16_t* f16(const uint8_t* p) {
    return reinterpret_cast<const uint16_t*>(p);
  }

  // The keys of one channel.
  template <class S>
  static void seal_channel(const uint8_t* growing, uint8_t* block, int64_t c, int64_t head_dim) {
    const uint8_t* from = growing + Int8Kv::keys_at(head_dim) + c / 4 * 64 + c % 4;
    float row[16];
    for (int t = 0; t < 16; ++t) row[t] = static_cast<float>(from[4 * t] - 128);
    const auto keys = S::mul(S::load(row), Int8Kv::key_scales<S>(growing));
    const Steps steps = store_steps<S>(-S::hmax(S::neg(keys)), S::hmax(keys),
                                       block + key_scales_at() + 2 * c,
                                       block + key_minima_at(head_dim) + 2 * c);
    int8_t codes[16];
    S::store_i8(codes, round<S>(keys, steps));
    uint8_t* to = block + keys_at(head_dim) + c / 8 * 64 + c % 4;
    for (int t = 0; t < 16; ++t) to[4 * t] |= static_cast<uint8_t>(codes[t] << c / 4 % 2 * 4);
  }

  // The values of one token.
  template <class S>
  static void seal_token(const uint8_t* growing, uint8_t* block, int64_t t, int64_t head_dim) {
    const auto* from = reinterpret_cast<const int8_t*>(growing) + Int8Kv::values_at(head_dim) +
                       t / 4 * Int8Kv::value_pitch(head_dim) + t % 4;
    float scales[16], row[16];
    S::store(scales, Int8Kv::value_scales<S>(growing));
    int low = 127, high = -127;
    for (int64_t c = 0; c < head_dim; ++c) {
      low = from[4 * c] < low ? from[4 * c] : low;
      high = from[4 * c] > high ? from[4 * c] : high;
    }
    const Steps steps =
        store_steps<S>(static_cast<float>(low) * scales[t], static_cast<float>(high) * scales[t],
                       block + 2 * t, block + 2 * (kBlock + t));
    uint8_t* to = block + values_at(head_dim) + t / 8 * value_pitch(head_dim) + t % 4;
    for_chunks(head_dim, [&](int64_t c, int64_t lanes) {
      for (int64_t i = 0; i < 16; ++i)
        row[i] = i < lanes ? static_cast<float>(from[4 * (c + i)]) : 0.0f;
      int8_t codes[16];
      S::store_i8(codes, round<S>(S::mul(S::load(row), S::set1(scales[t])), steps));
      for (int64_t i = 0; i < lanes; ++i)
        to[4 * (c + i)] |= static_cast<uint8_t>(codes[i] << t / 4 % 2 * 4);
    });
  }

  // Stores (high - low) / 15 and low as f16; gives back what numbers are rounded with: the stored
  // minimum, and the inverse of the stored scale (0 if that is too small for f16).
  template <class S>
  static Steps store_steps(float low, float high, uint8_t* scale, uint8_t* minimum) {
    float row[16] = {(high - low) / 15.0f, low};
    uint16_t half[16];
    const auto largest = S::set1(F16::kLargest);
    S::store_f16(half, S::min(S::max(S::load(row), S::neg(largest)), largest));
    S::store(row, S::load_f16(half));
    __builtin_memcpy(scale, half, 2);
    __builtin_memcpy(minimum, half + 1, 2);
    return {row[0] > 0.0f ? 1.0f / row[0] : 0.0f, row[1]};
  }
  template <class S>
  static LW_INLINE typename S::I32x16 round(typename S::F32x16 x, const Steps& steps) {
    const auto scaled = S::mul(S::sub(x, S::set1(steps.minimum)), S::set1(steps.inverse));
    return S::to_i32(S::min(S::max(scaled, S::zero()), S::set1(15.0f)));
  }
};

}  // namespace
}  // namespace lacewing
