// Rows of a packed weight as f32: embeddings. Decodes the strip of every id and keeps one lane.
#pragma once

#include "core/inline.h"
#include "formats/traits.h"

namespace lacewing {
namespace {

template <class S, class F>
void gather_row_float(const PackedTensor& w, int64_t id, float* out) {
  auto c = F::open(w, id / kStrip);
  alignas(64) float lanes[2][16];
  for (int64_t i = 0; i < w.k; i += 2) {
    typename S::F32x16 even, odd;
    F::template pair<S>(c, even, odd);
    S::store(lanes[0], even);
    S::store(lanes[1], odd);
    out[i] = lanes[0][id % kStrip];
    if (i + 1 < w.k) out[i + 1] = lanes[1][id % kStrip];
  }
}

template <class S, class F>
void gather_row(const PackedTensor& w, int64_t id, float* out) {
  const int lane = static_cast<int>(id % kStrip);
  auto c = F::open(w, id / kStrip);
  alignas(64) float scale[16], minimum[16];
  alignas(64) uint8_t codes[F::kGroup / 4][64];
  for (int64_t i = 0; i < w.k; i += F::kGroup) {
    S::store(scale, F::template scale<S>(c));
    if constexpr (F::kHasMin) S::store(minimum, F::template minimum<S>(c));
    F::template group<S>(
        c, [&](int b, typename S::U8x64 v)
               __attribute__((always_inline)) { S::store_u8(codes[b], v); });
    const int count = static_cast<int>(w.k - i < F::kGroup ? w.k - i : F::kGroup);
    for (int t = 0; t < count; ++t) {
      const float code = static_cast<float>(codes[t / 4][lane * 4 + t % 4] - F::kZeroPoint);
      const float value = scale[lane] * code;
      if constexpr (F::kHasMin)
        out[i + t] = value + minimum[lane];
      else
        out[i + t] = value;
    }
  }
}

template <class S, class F>
void gather_rows(const PackedTensor& w, const int32_t* ids, int64_t count, float* out,
                 int64_t ldo) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (F::kGroup == 0)
      gather_row_float<S, F>(w, ids[i], out + i * ldo);
    else
      gather_row<S, F>(w, ids[i], out + i * ldo);
  }
}

}  // namespace
}  // namespace lacewing
