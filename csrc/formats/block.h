// Blocks of 16 outputs x 1 input, kept or dropped as a whole: parts `stream` uint8 and `offsets`
// int64 [strips + 1]. A strip is
//   32 B    scales f16 [16], one per row
//   bitmap  [k_pad / 8], bit i % 8 of byte i / 8: input i is kept
//   padded to 64 bytes
//   blocks  [ceil(kept / 4)][16][4]: VNNI blocks of the kept inputs, in order
// Every block is 64-byte aligned in the stream. 64 spare bytes follow the last strip.
#pragma once

#include "formats/traits.h"

namespace lacewing {
namespace {

struct W8b16x1 {
  static constexpr int kGroup = 64;
  static constexpr int kPad = 64;
  static constexpr int kZeroPoint = 128, kMaxCode = 255;
  static constexpr bool kSparse = true;
  static constexpr bool kHasMin = false;
  static constexpr bool kRowScale = true;
  static constexpr bool kColumns = true;
  static constexpr int kParts = 2;
  static constexpr const char* kPartNames[kMaxParts] = {"stream", "offsets"};
  static constexpr int kTileBytes[kMaxParts] = {0, 0};
  static constexpr int kScaleBytes = 32;
  static constexpr int kBlockBytes = 64;

  // Bytes of a strip before its blocks.
  static constexpr int64_t head(int64_t k) {
    return round_up(kScaleBytes + round_up(k, kPad) / 8, 64);
  }

  struct Cursor {
    const uint8_t* scales;
    const uint8_t* bitmap;  // of the next group
    const uint8_t* blocks;  // the block in which the next kept input is
    int at;                 // its place there, 0..3
  };
  static LW_INLINE Cursor open(const PackedTensor& w, int64_t strip) {
    const uint8_t* p = w.parts[0] + load_u64(w.parts[1] + 8 * strip);
    return {p, p + kScaleBytes, p + head(w.k), 0};
  }
  template <class S>
  static LW_INLINE typename S::F32x16 scale(const Cursor& c) {
    return S::load_f16(as_f16(c.scales));
  }

  // Every block of the group is made of one or two stored ones.
  template <class S, class F>
  static LW_INLINE void group(Cursor& c, F&& f) {
    uint64_t bits = load_u64(c.bitmap);
    const uint8_t* first = c.blocks;
#pragma GCC unroll 2
    for (int b = 0; b < kGroup / 4; ++b, bits >>= 4) {
      const int pattern = static_cast<int>(bits & 15);
      const int next = c.at + kSetBits[pattern];
      const uint8_t* last = c.blocks + (next > 4 ? kBlockBytes : 0);
      f(b, S::expand_lanes(kZeroPoint, pattern, c.blocks, last, c.at));
      c.blocks += next / 4 * kBlockBytes;
      c.at = next % 4;
    }
    c.bitmap += kGroup / 8;
    for (; first < c.blocks; first += kBlockBytes) prefetch_stream<S>(first);
  }

 private:
  static constexpr uint8_t kSetBits[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
};

}  // namespace
}  // namespace lacewing
