// Sealed KV cache codecs: of every token's int8 keys, and of its values, the same number of codes
// is kept, those of the largest magnitude, ties: the first ones (MUSTAFAR, arXiv 2505.22913).
//
//   int8_sp<p>  the scales of the int8 block, f16 [2][16]: 64 bytes;
//               K codes that are kept, 16 x keep, keep = ceil((1 - p / 100) head_dim);
//               V codes that are kept, 16 x keep;
//               bitmaps, 8 bytes for 64 codes of the int8 block, bit i for byte i:
//               of K [pad4(head_dim)/4], of V [4][pad16(head_dim)/16]; the codes lie in this order
//
// Parts begin at multiples of 64 bytes. Expanding reads 64 bytes from where the next code lies:
// the bitmaps are behind the codes so that this never leaves the block.
#pragma once

#include "formats/kv.h"
#include "ops/limits.h"

namespace lacewing {
namespace {

struct SparseKeys {
  static constexpr int kTogether = 1;
  const uint8_t* codes;
  const uint8_t* bitmap;
  template <class S>
  LW_INLINE typename S::U8x64 next(int) {
    return S::expand(128, (bitmap += 8) - 8, codes);
  }
};

// Four tokens together keep 4 x keep codes: it is known where each four's begin.
struct SparseValues {
  const uint8_t* codes[4];
  const uint8_t* bitmap;
  int64_t pitch;  // of the bitmaps of four tokens
  template <class S>
  LW_INLINE typename S::U8x64 next(int fours, int chunk) {
    return S::expand(0, bitmap + fours * pitch + 8 * chunk, codes[fours]);
  }
  LW_INLINE void skip(int chunks) { bitmap += 8 * chunks; }
};

template <int Percent>
struct Int8Sparse {
  using Growing = Int8Kv;
  using Expanded = Int8Kv;
  static constexpr bool kInteger = true;
  static constexpr bool kMinima = false;

  // Of a token's keys, and of its values.
  static constexpr int64_t keep(int64_t head_dim) {
    return (head_dim * (100 - Percent) + 99) / 100;
  }
  static constexpr int64_t keys_at(int64_t) { return Int8Kv::kScales; }
  static constexpr int64_t values_at(int64_t head_dim) {
    return keys_at(head_dim) + pad_to(kBlock * keep(head_dim), 64);
  }
  static constexpr int64_t key_bitmaps_at(int64_t head_dim) {
    return values_at(head_dim) + pad_to(kBlock * keep(head_dim), 64);
  }
  static constexpr int64_t value_bitmaps_at(int64_t head_dim) {
    return key_bitmaps_at(head_dim) + pad_to(2 * pad_to(head_dim, 4), 64);
  }
  static constexpr int64_t block_bytes(int64_t head_dim) {
    return value_bitmaps_at(head_dim) + pad_to(2 * pad_to(head_dim, 16), 64);
  }

  static LW_INLINE SparseKeys keys(const uint8_t* block, int64_t head_dim) {
    return {block + keys_at(head_dim), block + key_bitmaps_at(head_dim)};
  }
  static LW_INLINE SparseValues values(const uint8_t* block, int64_t head_dim) {
    const uint8_t* codes = block + values_at(head_dim);
    const int64_t four = 4 * keep(head_dim);
    return {{codes, codes + four, codes + 2 * four, codes + 3 * four},
            block + value_bitmaps_at(head_dim),
            pad_to(head_dim, 16) / 2};
  }
  template <class S>
  static LW_INLINE typename S::F32x16 key_scales(const uint8_t* block) {
    return Int8Kv::key_scales<S>(block);
  }
  template <class S>
  static LW_INLINE typename S::F32x16 value_scales(const uint8_t* block) {
    return Int8Kv::value_scales<S>(block);
  }

  // `growing` as the int8 block that many queries at once had better read.
  template <class S>
  static void expand(const uint8_t* block, uint8_t* growing, int64_t head_dim) {
    __builtin_memcpy(growing, block, Int8Kv::kScales);
    auto key = keys(block, head_dim);
    uint8_t* to = growing + Int8Kv::keys_at(head_dim);
    for (int64_t d = 0; d < head_dim; d += 4, to += 64) S::store_u8(to, key.template next<S>(0));
    auto value = values(block, head_dim);
    to = growing + Int8Kv::values_at(head_dim);
    for (int t = 0; t < 4; ++t)
      for (int c = 0; c < pad_to(head_dim, 16) / 16; ++c, to += 64)
        S::store_u8(to, value.template next<S>(t, c));
  }

  template <class S>
  static void seal(const uint8_t* growing, uint8_t* block, int64_t head_dim) {
    const int64_t at = key_bitmaps_at(head_dim), split = value_bitmaps_at(head_dim) - at;
    uint64_t bitmaps[kMaxHeadDim];  // the end of the block
    __builtin_memset(bitmaps, 0, sizeof(bitmaps));
    for (int lane = 0; lane < kBlock; ++lane) {
      choose_keys(growing, lane, head_dim, bitmaps);
      choose_values(growing, lane, head_dim, bitmaps + split / 8);
    }
    __builtin_memcpy(block, growing, Int8Kv::kScales);
    pack<S>(Int8Kv::keys_at(head_dim), values_at(head_dim), block, [&](auto put) {
      const uint8_t* from = growing + Int8Kv::keys_at(head_dim);
      for (int64_t d = 0; d < head_dim; d += 4, from += 64) put(bitmaps[d / 4], from);
    });
    pack<S>(values_at(head_dim), at, block, [&](auto put) {
      const uint8_t* from = growing + Int8Kv::values_at(head_dim);
      for (int64_t i = 0; i < pad_to(head_dim, 16) / 4; ++i, from += 64)
        put(bitmaps[split / 8 + i], from);
    });
    __builtin_memcpy(block + at, bitmaps, static_cast<size_t>(block_bytes(head_dim) - at));
  }

 private:
  static void choose_keys(const uint8_t* growing, int lane, int64_t head_dim, uint64_t* bitmaps) {
    const uint8_t* codes = growing + Int8Kv::keys_at(head_dim) + 4 * lane;
    choose(
        head_dim, [=](int64_t c) { return codes[c / 4 * 64 + c % 4] - 128; },
        [=](int64_t c) { bitmaps[c / 4] |= uint64_t{1} << (4 * lane + c % 4); });
  }
  static void choose_values(const uint8_t* growing, int lane, int64_t head_dim, uint64_t* bitmaps) {
    const auto* codes = reinterpret_cast<const int8_t*>(growing) + Int8Kv::values_at(head_dim) +
                        lane / 4 * Int8Kv::value_pitch(head_dim) + lane % 4;
    bitmaps += lane / 4 * pad_to(head_dim, 16) / 16;
    choose(
        head_dim, [=](int64_t c) { return codes[4 * c]; },
        [=](int64_t c) { bitmaps[c / 16] |= uint64_t{1} << (c % 16 * 4 + lane % 4); });
  }
  // Marks the channels of one token that are kept.
  template <class Code, class Mark>
  static void choose(int64_t head_dim, Code code, Mark mark) {
    int64_t counts[129] = {};
    const auto magnitude = [=](int64_t c) { return code(c) < 0 ? -code(c) : code(c); };
    for (int64_t c = 0; c < head_dim; ++c) ++counts[magnitude(c)];
    int least = 128;  // what is above is kept, and so are the first `ties` of that magnitude
    int64_t ties = keep(head_dim);
    for (; counts[least] < ties; --least) ties -= counts[least];
    for (int64_t c = 0; c < head_dim; ++c)
      if (magnitude(c) > least || (magnitude(c) == least && ties-- > 0)) mark(c);
  }
  // The codes that `each` puts, and zeros, into the bytes [begin, end) of the block.
  template <class S, class Each>
  static void pack(int64_t begin, int64_t end, uint8_t* block, Each each) {
    auto* to = reinterpret_cast<int8_t*>(block) + begin;
    each([&](uint64_t bitmap, const uint8_t* codes) {
      to += S::compress(to, bitmap, reinterpret_cast<const int8_t*>(codes));
    });
    const auto* stop = reinterpret_cast<int8_t*>(block) + end;
    __builtin_memset(to, 0, static_cast<size_t>(stop - to));
  }
};

}  // namespace
}  // namespace lacewing
