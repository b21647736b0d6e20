// Rotary embedding of one head, halves layout: lane i is paired with lane i + head_dim / 2.
#pragma once

#include "ops/elementwise.h"

namespace lacewing {
namespace {

// (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin), every product and sum rounded.
template <class S>
void rope(float* x, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  float* y = x + half;
  for_chunks(half, [=](int64_t i, int64_t lanes) {
    const auto x0 = load_lanes<S>(x + i, lanes), x1 = load_lanes<S>(y + i, lanes);
    const auto c = load_lanes<S>(cos + i, lanes), s = load_lanes<S>(sin + i, lanes);
    store_lanes<S>(x + i, S::sub(S::mul(x0, c), S::mul(x1, s)), lanes);
    store_lanes<S>(y + i, S::add(S::mul(x1, c), S::mul(x0, s)), lanes);
  });
}

}  // namespace
}  // namespace lacewing
