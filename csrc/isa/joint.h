// Everything an ISA's table is made of, instantiated for the vocabulary S. Included by one
// translation unit per ISA, compiled with that ISA's flags. All of it has internal linkage, since
// S does: the only symbol that leaves the unit is its KernelTable.
#pragma once

#include "core/kernels.h"
#include "drivers/gather.h"
#include "drivers/linear.h"
#include "formats/bf16.h"
#include "formats/block.h"
#include "formats/dense.h"
#include "formats/nm.h"
#include "formats/sparse.h"
#include "ops/activation.h"
#include "ops/convert.h"
#include "ops/elementwise.h"
#include "ops/math.h"
#include "ops/peak.h"
#include "ops/quantize_rows.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/stream.h"

namespace lacewing {
namespace {

template <class S, const KvTable& Kv>
constexpr KernelTable make_table() {
  return {
      S::kName,
      {
#define LACEWING_KERNELS(name, ...)                                                    \
  {linear<S, __VA_ARGS__>, gather_rows<S, __VA_ARGS__>, gemv_switch<S, __VA_ARGS__>(), \
   cpu_prefetch_switch<S, __VA_ARGS__>()},
          LACEWING_FORMATS(LACEWING_KERNELS)
#undef LACEWING_KERNELS
      },
      quantize_row<S>,
      rms_scale<S>,
      scale_mul<S>,
      add<S>,
      scale<S>,
      widen<S>,
      narrow<S>,
      act_mul<S>,
      rope<S>,
      &Kv,
      read_stream<S>,
      spin_int8<S>,
      spin_float<S>,
  };
}

}  // namespace
}  // namespace lacewing
