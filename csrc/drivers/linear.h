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
constexpr Switch gemv_switch() {
  return {&gemv_limit<S, F>, gemv_rows<S, F>(), gemv_rows<S, F>(), gemv_most<S, F>()};
}

template <class S>
struct Unprefetched : S {
  static constexpr bool kPrefetch = false;
};

// The same for prefetching, which gemv may leave to the CPU while it reads one stream and
// multiplies it by one row. Zen 4, 4096x4096 cold, 1 thread, huge pages: w8a8 1.26x, bf16 1.33x,
// w4a8g32 1.09x, w8a8g64_sp 1.09x, w4a8g64_sp 1.06x; 2 threads, at the roof: 1.01-1.11x,
// w8a8_b16x1 1.02x, w5a8g32z 1.05x, bf16_sp 1.19x, w1.6a8 1.23x. With two and three bits (0.99x and
// 0.94x; 1 thread 0.87x) and with 4 rows (1 thread: bf16 0.78x, w4a8g64 0.66x) the CPU does not
// look far enough ahead; on an Emerald Rapids nothing but prefetching by software reaches the roof.
template <class S, class F>
constexpr int cpu_prefetch_most() {
  return S::kPrefetch ? 1 : 0;
}
template <class S, class F>
int cpu_prefetch_limit = 0;

template <class S, class F>
constexpr Switch cpu_prefetch_switch() {
  bool pays = true;
  if constexpr (F::kGroup != 0) pays = F::kMaxCode <= 2 || F::kMaxCode > 7;
  const int most = cpu_prefetch_most<S, F>();
  return {&cpu_prefetch_limit<S, F>, 0, pays ? most : 0, most};
}

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
  if (!few) return many_rows<S, F>(a);
  if constexpr (cpu_prefetch_most<S, F>() > 0)
    if (a.x->m == 1 && __atomic_load_n(&cpu_prefetch_limit<S, F>, __ATOMIC_RELAXED) > 0)
      return gemv<Unprefetched<S>, F, 1>(a);
  gemv<S, F, gemv_most<S, F>()>(a);
}

}  // namespace
}  // namespace lacewing
