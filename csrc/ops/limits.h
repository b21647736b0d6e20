// What the kernels of ops/ can do at most; their callers check it.
#pragma once

#include <cstdint>

#include "core/kv.h"  // kBlock

namespace lacewing {

inline constexpr int64_t kMaxHeadDim = 512;

}  // namespace lacewing
