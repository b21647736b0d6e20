// bf16: part `values` uint16 [strips][k_pad/2][16][2].
#pragma once

#include "formats/traits.h"

namespace lacewing {
namespace {

struct Bf16 {
  static constexpr int kGroup = 0;
  static constexpr int kPad = 2;
  static constexpr bool kSparse = false;
  static constexpr int kParts = 1;
  static constexpr const char* kPartNames[kMaxParts] = {"values", nullptr};
  static constexpr int kTileBytes[kMaxParts] = {64, 0};  // per strip and kPad inputs

  struct Cursor {
    const uint8_t* values;
  };
  static Cursor open(const PackedTensor& w, int64_t strip) {
    return {w.parts[0] + strip * (round_up(w.k, 2) / 2) * 64};
  }
  // Two inputs: f32 of the even and of the odd one.
  template <class S>
  static LW_INLINE void pair(Cursor& c, typename S::F32x16& even, typename S::F32x16& odd) {
    const auto v = S::load_u8(c.values);
    prefetch_stream<S>(c.values);
    even = S::bf16_even(v);
    odd = S::bf16_odd(v);
    c.values += 64;
  }
};

}  // namespace
}  // namespace lacewing
