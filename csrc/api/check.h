// Argument checks: where, requirement, actual.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <concepts>
#include <cstdint>
#include <string>

namespace lacewing {

template <class T, size_t Dims>
using Array =
    nanobind::ndarray<const T, nanobind::ndim<Dims>, nanobind::c_contig, nanobind::device::cpu>;

inline std::string text(int64_t x) { return std::to_string(x); }

inline void require(bool ok, const std::string& message) {
  if (!ok) throw nanobind::value_error(message.c_str());
}

// `what` must be in [low, high].
inline void require_range(const std::string& what, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    throw nanobind::value_error(
        (what + " must be in " + text(low) + ".." + text(high) + ", got " + text(value)).c_str());
}

// As above, for loops: what() is only called, and its text made, where the value is wrong.
template <class What>
  requires std::invocable<What>
void require_range(What what, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) require_range(what(), value, low, high);
}

// "[2, 3]"
template <class A>
std::string shape_text(const A& array) {
  std::string all = "[";
  for (size_t i = 0; i < array.ndim(); ++i)
    all += (i ? ", " : "") + text(static_cast<int64_t>(array.shape(i)));
  return all + "]";
}

}  // namespace lacewing
