// What an ISA does with the KV cache, instantiated for the vocabulary S. See joint.h.
#pragma once

#include "core/kernels.h"
#include "ops/attention.h"

namespace lacewing {
namespace {

template <class S, class Kv>
constexpr KvKernels make_kv_kernels() {
  KvKernels kernels{nullptr,
                    nullptr,
                    attention<S, Kv>,
                    attend_partial<S, Kv>,
                    attend_segments<S, Kv>,
                    merge_segments<S, Kv>,
                    join_segments<S, Kv>};
  if constexpr (requires { typename Kv::Growing; })
    kernels.seal = Kv::template seal<S>;
  else
    kernels.store = Kv::template store<S>;
  return kernels;
}

template <class S>
constexpr KvTable make_kv_table() {
  return {{
#define LACEWING_KV_KERNELS(name, Kv) make_kv_kernels<S, Kv>(),
              LACEWING_KV_FORMATS(LACEWING_KV_KERNELS)
#undef LACEWING_KV_KERNELS
          },
          nullptr,
          nullptr};
}

}  // namespace
}  // namespace lacewing
