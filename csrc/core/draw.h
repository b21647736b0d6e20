// Numbers without meaning for benchmarks: the same ones every time.
#pragma once

#include <cstdint>

namespace lacewing {

class Draw {
 public:
  // In -1..1.
  float next() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(state_ >> 8) * 0x1p-23f - 1.0f;
  }

 private:
  uint32_t state_ = 1;
};

}  // namespace lacewing
