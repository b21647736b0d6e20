// What each format states about itself, and the check that makes hostile bytes harmless: whatever
// passes `validate` can be read by any kernel without leaving its parts.
#include "core/inline.h"
#include "core/kernels.h"
#include "formats/bf16.h"
#include "formats/block.h"
#include "formats/dense.h"
#include "formats/nm.h"
#include "formats/sparse.h"

namespace lacewing {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 31;  // n and k: products stay far from overflow

template <class F>
int64_t k_pad(int64_t k) {
  return round_up(k, F::kPad);
}

template <class F>
const char* validate_shape(const PackedTensor& w) {
  if (w.n < 1 || w.k < 1) return "n and k must be at least 1";
  if (w.n >= kMaxSide || w.k >= kMaxSide) return "n and k must be below 2^31";
  if (F::kRowScale && w.k > kRowGroup) return "with one scale per row k must be at most 131072";
  return nullptr;
}

template <class F>
const char* validate_dense(const PackedTensor& w) {
  if (const char* error = validate_shape<F>(w)) return error;
  const uint64_t strips = static_cast<uint64_t>(w.strips());
  for (int p = 0; p < F::kParts; ++p) {
    const bool once = F::kRowScale && p == 1;  // the scales: one tile per strip
    const uint64_t tiles = once ? strips : strips * (k_pad<F>(w.k) / F::kPad);
    if (w.part_bytes[p] % F::kTileBytes[p] || w.part_bytes[p] / F::kTileBytes[p] != tiles)
      return p == 0 ? "the first part's size does not fit the shape"
                    : "the second part's size does not fit the shape";
  }
  return nullptr;
}

// Every record of the strip in [begin, end) must lie inside it.
template <class F>
const char* validate_records(const PackedTensor& w, size_t begin, size_t end) {
  const int64_t records = k_pad<F>(w.k) / F::kPad;
  size_t at = begin;
  for (int64_t j = 0; j < records; ++j) {
    if (end - at < F::kHead) return "a strip ends inside a record's head";
    const size_t values = static_cast<size_t>(F::values(w.parts[0] + at));
    at += F::kHead;
    if (end - at < values) return "a strip ends inside a record's values";
    at += values;
  }
  return nullptr;
}

// The strip in [begin, end) must be its head and the blocks of the inputs that it keeps.
template <class F>
const char* validate_columns(const PackedTensor& w, size_t begin, size_t end) {
  const int64_t inputs = k_pad<F>(w.k), head = F::head(w.k);
  const int64_t size = static_cast<int64_t>(end - begin);
  if (size < head) return "a strip ends inside its head";
  const uint8_t* bitmap = w.parts[0] + begin + F::kScaleBytes;
  int64_t kept = 0;
  for (int64_t i = 0; i < inputs; i += 64) kept += __builtin_popcountll(load_u64(bitmap + i / 8));
  if (size != head + (kept + 3) / 4 * F::kBlockBytes)
    return "a strip ends elsewhere than the inputs that it keeps say";
  if (w.k % 64 && load_u64(bitmap + inputs / 8 - 8) >> w.k % 64)
    return "a strip keeps inputs beyond k";
  return nullptr;
}

template <class F>
const char* validate_strip(const PackedTensor& w, size_t begin, size_t end) {
  if constexpr (kKeepsColumns<F>)
    return validate_columns<F>(w, begin, end);
  else
    return validate_records<F>(w, begin, end);
}

constexpr size_t kSpareBytes = 64;  // so that 64-byte loads never leave the part

template <class F>
const char* validate_stream(const PackedTensor& w) {
  if (const char* error = validate_shape<F>(w)) return error;
  const uint64_t strips = static_cast<uint64_t>(w.strips());
  if (w.part_bytes[1] != (strips + 1) * 8) return "`offsets` must hold one int64 per strip and one";
  if (w.part_bytes[0] < kSpareBytes) return "`stream` is shorter than its 64 spare bytes";
  const uint64_t size = w.part_bytes[0] - kSpareBytes;
  uint64_t begin = load_u64(w.parts[1]);
  if (begin != 0) return "`offsets` must start at 0";
  for (uint64_t s = 0; s < strips; ++s) {
    const uint64_t end = load_u64(w.parts[1] + 8 * (s + 1));
    if (end % 64) return "`offsets` must be multiples of 64";
    if (end < begin) return "`offsets` must not decrease";
    if (end > size) return "`offsets` point beyond `stream`";
    if (const char* error = validate_strip<F>(w, begin, end)) return error;
    begin = end;
  }
  return begin == size ? nullptr : "`stream` must end 64 bytes after the last offset";
}

template <class F>
constexpr auto validator() {
  if constexpr (F::kTileBytes[0] == 0)
    return validate_stream<F>;
  else
    return validate_dense<F>;
}

template <class F>
constexpr FormatInfo info(const char* name) {
  return {name,      F::kRowScale ? kRowGroup : F::kGroup, k_pad<F>,
          F::kParts, {F::kPartNames[0], F::kPartNames[1]}, validator<F>()};
}

}  // namespace

#define LACEWING_INFO(name, ...) info<__VA_ARGS__>(name),
constinit const FormatInfo kFormatInfo[kFormatCount] = {LACEWING_FORMATS(LACEWING_INFO)};
#undef LACEWING_INFO

}  // namespace lacewing
