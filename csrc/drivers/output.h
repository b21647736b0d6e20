// The last step of every driver: accumulator + bias, onto y or into it.
#pragma once

#include "core/inline.h"
#include "core/kernels.h"

namespace lacewing {
namespace {

// 16 outputs of strip `strip` and row `row`; the last strip may be cut short by n.
template <class S>
LW_INLINE void write_outputs(const LinearArgs& a, int64_t strip, int64_t row,
                             typename S::F32x16 acc) {
  const int64_t o = strip * kStrip;
  const int64_t left = a.w->n - o;
  float* y = a.y + row * a.ldy + o;
  if (left >= kStrip) {
    if (a.bias) acc = S::add(acc, S::load(a.bias + o));
    S::store(y, a.accumulate ? S::add(S::load(y), acc) : acc);
  } else {
    if (a.bias) acc = S::add(acc, S::load_n(a.bias + o, left));
    S::store_n(y, a.accumulate ? S::add(S::load_n(y, left), acc) : acc, left);
  }
}

}  // namespace
}  // namespace lacewing
