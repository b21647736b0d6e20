// y = act(gate) * up
#pragma once

#include "ops/elementwise.h"
#include "ops/math.h"

namespace lacewing {
namespace {

// x * sigmoid(x)
template <class S>
inline typename S::F32x16 silu(typename S::F32x16 x) {
  return S::div(x, S::add(S::set1(1.0f), exp<S>(S::neg(x))));
}

// 0.5 x (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), which is x * sigmoid(2u).
template <class S>
inline typename S::F32x16 gelu_tanh(typename S::F32x16 x) {
  const auto cubic = S::fma(S::mul(x, x), S::set1(0.044715f), S::set1(1.0f));
  const auto twice_u = S::mul(S::mul(x, cubic), S::set1(1.5957691216057308f));
  return S::div(x, S::add(S::set1(1.0f), exp<S>(S::neg(twice_u))));
}

template <class S>
void act_mul(Activation act, const float* gate, const float* up, int64_t n, float* y) {
  const auto with = [=](auto function) {
    for_chunks(n, [=](int64_t i, int64_t lanes) {
      const auto g = function(load_lanes<S>(gate + i, lanes));
      store_lanes<S>(y + i, S::mul(g, load_lanes<S>(up + i, lanes)), lanes);
    });
  };
  if (act == Activation::silu)
    with([](typename S::F32x16 x) { return silu<S>(x); });
  else
    with([](typename S::F32x16 x) { return gelu_tanh<S>(x); });
}

}  // namespace
}  // namespace lacewing
