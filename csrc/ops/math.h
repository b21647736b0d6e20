// Elementary functions in the vocabulary: the same bits on every ISA, no libm.
#pragma once

#include "core/types.h"

namespace lacewing {
namespace {

// e^x, at most 2 ulp off for x in [-87.3, 88.3]; 0 below (also for -inf and NaN), e^88.3 above.
// e^0 is exactly 1. Range reduction x = n ln2 + r, then Cephes' polynomial for e^r.
template <class S>
inline typename S::F32x16 exp(typename S::F32x16 x) {
  using F = typename S::F32x16;
  const F low = S::set1(-87.3f);
  const F bounded = S::min(S::max(x, low), S::set1(88.3f));
  const F n = S::round_even(S::mul(bounded, S::set1(1.44269504088896341f)));
  F r = S::fma(n, S::set1(-0.693359375f), bounded);
  r = S::fma(n, S::set1(2.12194440e-4f), r);
  F p = S::set1(1.9875691500e-4f);
  p = S::fma(p, r, S::set1(1.3981999507e-3f));
  p = S::fma(p, r, S::set1(8.3334519073e-3f));
  p = S::fma(p, r, S::set1(4.1665795894e-2f));
  p = S::fma(p, r, S::set1(1.6666665459e-1f));
  p = S::fma(p, r, S::set1(5.0000001201e-1f));
  p = S::add(S::fma(S::mul(r, r), p, r), S::set1(1.0f));
  return S::select_gt(x, low, S::mul(p, S::pow2(S::to_i32(n))), S::zero());
}

// 2^x for x <= 0, at most 2.1 ulp off; 0 from -125 down (also for -inf and NaN). 2^0 is exactly 1.
// Two thirds of the operations of `exp`. x = n + r, and a polynomial for 2^r (its relative error is
// at most 9.2e-8).
template <class S>
inline typename S::F32x16 exp2_negative(typename S::F32x16 x) {
  using F = typename S::F32x16;
  const F low = S::set1(-125.0f);
  const F n = S::round_even(x);
  const F r = S::sub(x, n);
  F p = S::set1(1.3264727e-3f);
  p = S::fma(p, r, S::set1(9.6715130e-3f));
  p = S::fma(p, r, S::set1(5.5507336e-2f));
  p = S::fma(p, r, S::set1(2.4022242e-1f));
  p = S::fma(p, r, S::set1(6.9314700e-1f));
  p = S::fma(p, r, S::set1(1.0f));
  return S::select_gt(x, low, S::scale2(p, n), S::zero());
}

// 1 / (1 + e^-x)
template <class S>
inline typename S::F32x16 sigmoid(typename S::F32x16 x) {
  const auto one = S::set1(1.0f);
  return S::div(one, S::add(one, exp<S>(S::neg(x))));
}

}  // namespace
}  // namespace lacewing
