// Chooses the driver by the number of rows.
#pragma once

#include "drivers/gemm.h"
#include "drivers/gemv.h"

namespace lacewing {
namespace {

template <class S, class F>
constexpr int gemv_rows() {
  if constexpr (F::kGroup == 0)
    return S::kGemvFloat;
  else if constexpr (F::kRowScale)  // sums of more rows than fit the registers are gemm's
    return S::kGemvWide < S::kGemvBlock ? S::kGemvWide : S::kGemvBlock;
  else if constexpr (F::kMaxCode <= 31)
    return S::kGemvNarrow;
  else  // beyond one block of rows a sparse panel is as cheap as decoding into L1
    return F::kSparse && S::kGemvWide > S::kGemvBlock ? S::kGemvBlock : S::kGemvWide;
}

template <class S, class F>
void linear(const LinearArgs& a) {
  if (a.x->m <= gemv_rows<S, F>())
    gemv<S, F, gemv_rows<S, F>()>(a);
  else
    gemm<S, F>(a);
}

}  // namespace
}  // namespace lacewing
