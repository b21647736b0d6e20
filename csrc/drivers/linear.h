// Chooses the driver by the number of rows.
#pragma once

#include "drivers/gemm_columns.h"

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

// At most M rows.
template <class S, class F, int M>
LW_INLINE void gemv(const LinearArgs& a) {
  if constexpr (M > 0) {
    if (a.x->m != M) return gemv<S, F, M - 1>(a);
    if constexpr (kKeepsColumns<F>)
      gemv_columns<S, F, M>(a);
    else
      gemv_block<S, F, M>(a);
  }
}

// Rows that gemv is made for: at least what `gemv_rows` says.
template <class S, class F>
constexpr int gemv_most() {
  return S::kGemvMost > gemv_rows<S, F>() ? S::kGemvMost : gemv_rows<S, F>();
}

// Up to so many rows gemv takes a product, at most gemv_most: a table tuned on this machine may say
// otherwise than the constants (api/system.cpp). Results are the same whatever it says. Not
// std::atomic, whose functions would be weak symbols of this ISA.
template <class S, class F>
int gemv_limit = gemv_rows<S, F>();

template <class S, class F>
LW_INLINE void many_rows(const LinearArgs& a) {
  if constexpr (kKeepsColumns<F> && S::kColumnGemm)
    gemm_columns<S, F>(a);
  else
    gemm<S, F>(a);
}

template <class S, class F>
void linear(const LinearArgs& a) {
  bool few = a.x->m <= __atomic_load_n(&gemv_limit<S, F>, __ATOMIC_RELAXED);
  if constexpr (kKeepsColumns<F>) few = few && columns_fit<S>(*a.x);
  if (few)
    gemv<S, F, gemv_most<S, F>()>(a);
  else
    many_rows<S, F>(a);
}

}  // namespace
}  // namespace lacewing
