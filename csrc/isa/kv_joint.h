// What an ISA does with the KV cache, instantiated for the vocabulary S. See joint.h.
#pragma once

#include "core/kernels.h"
#include "ops/attention.h"
#include "ops/merge.h"
#include "ops/select.h"

namespace lacewing {
namespace {

template <class S, class Kv>
constexpr KvKernels make_kv_kernels() {
  KvKernels kernels{};
  kernels.attention = attention<S, Kv>;
  kernels.attend_partial = attend_partial<S, Kv>;
  kernels.attend_segments = attend_segments<S, Kv>;
  kernels.merge_segments = merge_segments<S, Kv>;
  kernels.join_segments = join_segments<S, Kv>;
  if constexpr (requires { typename Kv::Growing; }) {
    kernels.seal = Kv::template seal<S>;
  } else {
    kernels.store = Kv::template store<S>;
    kernels.load = Kv::template load<S>;
    kernels.merge = merge<S, Kv>;
  }
  return kernels;
}

template <class S>
constexpr KvTable make_kv_table() {
  return {{
#define LACEWING_KV_KERNELS(name, Kv) make_kv_kernels<S, Kv>(),
              LACEWING_KV_FORMATS(LACEWING_KV_KERNELS)
#undef LACEWING_KV_KERNELS
          },
          Labels::store<S>,
          select_blocks<S>};
}

}  // namespace
}  // namespace lacewing
