// One token's keys and values into its block of the paged f16 cache.
#pragma once

#include "ops/elementwise.h"

namespace lacewing {
namespace {

// Keeps what goes into the cache finite (NaN becomes the lowest value): attention multiplies masked
// lanes by 0, and a block's next owner must not meet the NaN of the last one.
template <class S>
inline typename S::F32x16 finite_f16(typename S::F32x16 v) {
  return S::min(S::max(v, S::set1(-65504.0f)), S::set1(65504.0f));
}

// K block [head_dim][16], V block [16][head_dim]; the token is lane `lane`.
template <class S>
void store_kv(const float* k, const float* v, uint16_t* k_block, uint16_t* v_block, int64_t lane,
              int64_t head_dim) {
  uint16_t half[16];
  uint16_t* v_row = v_block + lane * head_dim;
  for_chunks(head_dim, [&](int64_t i, int64_t lanes) {
    S::store_f16(half, finite_f16<S>(load_lanes<S>(k + i, lanes)));
    for (int64_t j = 0; j < lanes; ++j) k_block[(i + j) * 16 + lane] = half[j];
    S::store_f16(half, finite_f16<S>(load_lanes<S>(v + i, lanes)));
    for (int64_t j = 0; j < lanes; ++j) v_row[i + j] = half[j];
  });
}

}  // namespace
}  // namespace lacewing
