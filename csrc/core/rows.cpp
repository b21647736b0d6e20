#include "core/rows.h"

namespace lacewing {
namespace {

size_t align64(size_t n) { return (n + 63) & ~size_t{63}; }

// Inputs per scale of a row of k.
int64_t group_of(const FormatInfo& format, int64_t k) {
  return format.group == kRowGroup ? format.k_pad(k) : format.group;
}

}  // namespace

size_t rows_bytes(const FormatInfo& format, int64_t m, int64_t k) {
  const size_t cells = static_cast<size_t>(m) * static_cast<size_t>(format.k_pad(k));
  if (format.group == 0) return cells * sizeof(float);
  const size_t groups = cells / static_cast<size_t>(group_of(format, k));
  return align64(cells) + align64(groups * sizeof(float)) + groups * sizeof(int32_t);
}

Rows place_rows(const FormatInfo& format, int64_t m, int64_t k, uint8_t* memory) {
  Rows rows{m, format.k_pad(k), group_of(format, k), nullptr, nullptr, nullptr, nullptr};
  if (format.group == 0) {
    rows.f = reinterpret_cast<float*>(memory);
    return rows;
  }
  const size_t cells = static_cast<size_t>(m) * static_cast<size_t>(rows.k_pad);
  const size_t groups = cells / static_cast<size_t>(rows.group);
  rows.q = reinterpret_cast<int8_t*>(memory);
  rows.scale = reinterpret_cast<float*>(memory + align64(cells));
  rows.sum = reinterpret_cast<int32_t*>(memory + align64(cells) + align64(groups * 4));
  return rows;
}

}  // namespace lacewing
