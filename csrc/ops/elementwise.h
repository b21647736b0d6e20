// Loops over plain rows of floats.
#pragma once

#include "core/types.h"

namespace lacewing {
namespace {

// f(i, lanes) for chunks of 16 of [0, n); the last one may have fewer lanes.
template <class F>
inline void for_chunks(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i, 16);
  if (i < n) f(i, n - i);
}

template <class S>
inline typename S::F32x16 load_lanes(const float* p, int64_t lanes) {
  return lanes == 16 ? S::load(p) : S::load_n(p, lanes);
}

template <class S>
inline void store_lanes(float* p, typename S::F32x16 v, int64_t lanes) {
  if (lanes == 16)
    S::store(p, v);
  else
    S::store_n(p, v, lanes);
}

// y += x
template <class S>
void add(const float* x, int64_t n, float* y) {
  for_chunks(n, [=](int64_t i, int64_t lanes) {
    const auto sum = S::add(load_lanes<S>(y + i, lanes), load_lanes<S>(x + i, lanes));
    store_lanes<S>(y + i, sum, lanes);
  });
}

// y *= factor
template <class S>
void scale(float factor, int64_t n, float* y) {
  for_chunks(n, [=](int64_t i, int64_t lanes) {
    store_lanes<S>(y + i, S::mul(load_lanes<S>(y + i, lanes), S::set1(factor)), lanes);
  });
}

}  // namespace
}  // namespace lacewing
