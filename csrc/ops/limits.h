// What the kernels of ops/ can do at most; their callers check it.
#pragma once

#include <cstdint>

namespace lacewing {

inline constexpr int64_t kMaxHeadDim = 512;
inline constexpr int64_t kBlock = 16;  // tokens of one KV cache block

}  // namespace lacewing
