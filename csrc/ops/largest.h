// The largest of many floats, for whoever keeps the most important of something.
#pragma once

#include "core/types.h"

namespace lacewing {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

// The bits of the `rank`-th largest (from 1) of n floats >= 0, and how many of those equal to it
// are among the `rank` largest. Such floats are ordered as their bits are: count how often each
// digit occurs, the highest first, and go on with those that share the one wanted.
struct Threshold {
  uint32_t bits;
  int64_t equal;
};
inline Threshold threshold_of(const float* value, int64_t n, int64_t rank, float* spare) {
  constexpr int kShifts[] = {23, 15, 7, 0};  // digits of 8 bits, the last of 7: there is no sign
  uint32_t bits = 0;
  for (int shift : kShifts) {
    int32_t count[256] = {};
    const uint32_t mask = shift ? 255 : 127;
    for (int64_t i = 0; i < n; ++i) ++count[bits_of(value[i]) >> shift & mask];
    uint32_t digit = mask;
    for (; count[digit] < rank; --digit) rank -= count[digit];
    bits |= digit << shift;
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i)
      if ((bits_of(value[i]) >> shift & mask) == digit) spare[left++] = value[i];
    value = spare, n = left;
  }
  return {bits, rank};
}

// Indices that stay of 0..n-1, ascending: the first `first`, the last `last`, and of those between
// the ones of the largest values (>= 0; ties: the lower index), `keep` in all. `spare`: room for n
// floats.
inline void keep_largest(const float* value, int64_t n, int64_t first, int64_t last, int64_t keep,
                         float* spare, int32_t* kept) {
  const int64_t stop = n - last, between = keep - first - last;
  int64_t found = 0, i = 0;
  for (; i < first; ++i) kept[found++] = static_cast<int32_t>(i);
  if (between > 0) {
    auto [threshold, equal] = threshold_of(value + first, stop - first, between, spare);
    for (; found < first + between; ++i) {
      const uint32_t bits = bits_of(value[i]);
      if (bits < threshold || (bits == threshold && equal-- <= 0)) continue;
      kept[found++] = static_cast<int32_t>(i);
    }
  }
  for (i = stop; i < n; ++i) kept[found++] = static_cast<int32_t>(i);
}

}  // namespace
}  // namespace lacewing
