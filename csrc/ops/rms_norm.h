// y = x / sqrt(mean(x^2) + eps) * weight
#pragma once

#include "ops/elementwise.h"

namespace lacewing {
namespace {

// 1 / sqrt(mean(x^2) + eps). One chain of 16 partial sums, then the vocabulary's tree.
template <class S>
float rms_scale(const float* x, int64_t k, float eps) {
  auto squares = S::zero();
  for_chunks(k, [&](int64_t i, int64_t lanes) {
    const auto v = load_lanes<S>(x + i, lanes);
    squares = S::fma(v, v, squares);
  });
  const float mean = S::sum(squares) / static_cast<float>(k);
  float lanes[16];
  S::store(lanes, S::div(S::set1(1.0f), S::sqrt(S::set1(mean + eps))));
  return lanes[0];
}

// y[i] = (x[i] * scale) * weight[i]
template <class S>
void scale_mul(const float* x, float scale, const float* weight, int64_t n, float* y) {
  const auto s = S::set1(scale);
  for_chunks(n, [=](int64_t i, int64_t lanes) {
    const auto scaled = S::mul(load_lanes<S>(x + i, lanes), s);
    store_lanes<S>(y + i, S::mul(scaled, load_lanes<S>(weight + i, lanes)), lanes);
  });
}

}  // namespace
}  // namespace lacewing
