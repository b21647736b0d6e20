// Labels of keys (Double Sparsity, arXiv 2408.07092): r channels of every rotated key, chosen
// offline for a layer and KV head, as int8 with a fixed scale per channel:
//   code = clip(round_even(k / scale), -127, 127)   (a NaN counts as the lowest value)
// A label block holds 256 tokens of one head, uint8 128 + code:
//   [r/4][token of its block 0..15][block 0..15][4]
// 64 bytes are 16 blocks x 4 channels of one token: lanes are blocks, so that the largest score of
// a block's tokens needs no horizontal step.
#pragma once

#include "core/inline.h"
#include "core/kv.h"
#include "ops/elementwise.h"

namespace lacewing {
namespace {

struct Labels {
  // 16 blocks x channels 4 * group.. of one token of each.
  static LW_INLINE const uint8_t* codes(const uint8_t* block, int64_t group, int64_t token) {
    return block + (group * kBlock + token) * 64;
  }

  template <class S>
  static void store(const float* k, const int32_t* channels, const float* scales, int64_t count,
                    uint8_t* block, int64_t token) {
    uint8_t* to = block + token % kBlock * 64 + token / kBlock * 4;
    float key[16] = {};
    int8_t code[16];
    for_chunks(count, [&](int64_t i, int64_t lanes) {
      for (int64_t j = 0; j < lanes; ++j) key[j] = k[channels[i + j]];
      const auto steps = S::div(S::load(key), load_lanes<S>(scales + i, lanes));
      S::store_i8(code, S::to_i32(S::min(S::max(steps, S::set1(-127.0f)), S::set1(127.0f))));
      for (int64_t j = 0; j < lanes; ++j)
        to[(i + j) / 4 * kBlock * 64 + j % 4] = static_cast<uint8_t>(code[j] + 128);
    });
  }
};

}  // namespace
}  // namespace lacewing
