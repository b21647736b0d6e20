// Values of Python dictionaries.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>

#include "api/check.h"

namespace lacewing {

// Of any dimension: products stay in int64.
inline constexpr int64_t kMaxSize = int64_t{1} << 24;

inline nanobind::object item(const std::string& where, const nanobind::dict& from,
                             const char* key) {
  require(from.contains(key), where + " needs `" + key + "`");
  return nanobind::borrow(from[key]);
}

// kind: what it must be, as in "an integer".
template <class T>
T value(const std::string& where, const nanobind::object& object, const std::string& what,
        const char* kind) {
  T result;
  if (!nanobind::try_cast(object, result))
    throw nanobind::type_error((where + ": " + what + " must be " + kind).c_str());
  return result;
}

}  // namespace lacewing
