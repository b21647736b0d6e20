// From how many rows on a product goes through tiles.
#pragma once

#include "core/kernels.h"
#include "drivers/gemm_amx.h"

namespace lacewing {
namespace {

// Where one tile of rows, mostly empty, costs what the other drivers cost: later if weights come in
// bytes that vpdpbusd takes as they are, sooner if they must be expanded or are floats, whose
// vector instructions are slow. From prototypes; to be measured on every machine.
template <class F>
constexpr int64_t amx_from() {
  if constexpr (F::kGroup == 0 || F::kSparse)
    return 8;
  else
    return F::kMaxCode == 255 ? 16 : 8;
}

template <const KernelTable& Base, class S, class Tiles, class F>
void linear_amx(const LinearArgs& a) {
  if constexpr (kThroughTiles<F>)
    if (a.x->m >= amx_from<F>()) return AmxGemm<S, Tiles, F>(a).run();
  Base.formats[a.w->format].linear(a);
}

}  // namespace
}  // namespace lacewing
