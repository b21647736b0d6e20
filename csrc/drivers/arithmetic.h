// The float steps of an integer format, in the order that every driver and the oracle share.
#pragma once

#include "core/inline.h"

namespace lacewing {
namespace {

// acc + float(dot) * (sw * sx) [+ float(sumx) * (mw * sx)]
template <class S, class F>
LW_INLINE typename S::F32x16 add_group(typename S::F32x16 acc, typename S::I32x16 dot,
                                       typename S::F32x16 sw, typename S::F32x16 mw, float sx,
                                       int32_t sumx) {
  const auto x = S::set1(sx);
  const auto product = S::mul(S::from_i32(dot), S::mul(sw, x));
  if constexpr (!F::kHasMin) return S::add(acc, product);
  const auto offset = S::mul(S::set1(static_cast<float>(sumx)), S::mul(mw, x));
  return S::add(acc, S::add(product, offset));
}

// The one step of a format with one scale per row: 0 + float(dot) * (sw * sx)
template <class S, class F>
LW_INLINE typename S::F32x16 scale_row(typename S::I32x16 dot, typename S::F32x16 sw, float sx) {
  return add_group<S, F>(S::zero(), dot, sw, sw, sx, 0);
}

}  // namespace
}  // namespace lacewing
