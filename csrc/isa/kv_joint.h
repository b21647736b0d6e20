// What an ISA does with the KV cache, instantiated for the vocabulary S. See joint.h.
#pragma once

#include "core/kernels.h"
#include "ops/attention.h"
#include "ops/merge.h"
#include "ops/select.h"

namespace lacewing {
namespace {

template <class S>
constexpr KvTable make_kv_table() {
  return {{
#define LACEWING_KV_KERNELS(name, Kv)             \
  {Kv::store<S>,          nullptr,                \
   Kv::load<S>,           attention<S, Kv>,       \
   attend_partial<S, Kv>, attend_segments<S, Kv>, \
   merge_segments<S, Kv>, join_segments<S, Kv>,   \
   merge<S, Kv>},
              LACEWING_KV_FORMATS(LACEWING_KV_KERNELS)
#undef LACEWING_KV_KERNELS
          },
          Labels::store<S>,
          select_blocks<S>};
}

}  // namespace
}  // namespace lacewing
