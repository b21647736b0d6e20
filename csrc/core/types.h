// Plain types shared by every layer of the native code. No ISA, no thread, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lacewing {

// Outputs per strip: one strip is 16 rows of the weight matrix, in VNNI order inside.
inline constexpr int kStrip = 16;
// Rows of activations interleaved in one block of `Rows` (the last block holds what is left).
inline constexpr int kRowBlock = 8;
inline constexpr int kMaxParts = 2;
// The activation group of formats with one scale per row: as long as the longest row they hold. Up
// to there the sum of a row is exact in int32: 128 * 127 * 2^17 < 2^31.
inline constexpr int kRowGroup = 1 << 17;

// Every weight format: X(name in manifests, C++ decoder type). One line registers a format.
#define LACEWING_FORMATS(X) \
  X("bf16", Bf16)           \
  X("w8a8", W8row)          \
  X("w8a8g32", W8<32>)      \
  X("w8a8g64", W8<64>)      \
  X("w4a8g32", W4<32>)      \
  X("w4a8g64", W4<64>)      \
  X("w4a8g128", W4<128>)    \
  X("w3a8g64", W3<64>)      \
  X("w2a8g64", W2<64>)      \
  X("w1.6a8", Ternary)      \
  X("w4a8g32z", W4z<32>)    \
  X("w5a8g32z", W5z<32>)    \
  X("w8a8g64_sp", W8sp<64>) \
  X("w4a8g64_sp", W4sp<64>) \
  X("bf16_sp", Bf16sp)      \
  X("w8a8g64_24", W8of24)   \
  X("w4a8g64_24", W4of24)   \
  X("w8a8_b16x1", W8b16x1)

#define LACEWING_COUNT(name, type) +1
inline constexpr int kFormatCount = 0 LACEWING_FORMATS(LACEWING_COUNT);
#undef LACEWING_COUNT

// Borrowed view of a packed weight `[n, k]`; `parts` are in the order of the format's part names.
struct PackedTensor {
  int format;  // index into LACEWING_FORMATS
  int64_t n, k;
  const uint8_t* parts[kMaxParts];
  size_t part_bytes[kMaxParts];

  int64_t strips() const { return (n + kStrip - 1) / kStrip; }
};

// Activations `[m, k]` as a linear layer of some format wants them (made by `quantize_rows`).
// Row r lives in block b = r / kRowBlock, lane r % kRowBlock; block b has
// rows_in(b) = min(kRowBlock, m - b * kRowBlock) lanes.
//   q:     int8  at b*kRowBlock*k_pad            + [k_pad/4][rows_in(b)][4]
//   scale: f32   at b*kRowBlock*(k_pad/group)    + [k_pad/group][rows_in(b)]
//   sum:   int32, like `scale`: sum of q over the group (for zero points and minima)
// Float formats (group == 0) read `f` instead: f32 at b*kRowBlock*k_pad + [k_pad/2][rows_in(b)][2].
// Padding columns (k..k_pad) are zero.
struct Rows {
  int64_t m, k_pad;
  int64_t group;  // inputs that share a scale, at most k_pad; 0: floats
  int8_t* q;
  float* scale;
  int32_t* sum;
  float* f;

  int64_t blocks() const { return (m + kRowBlock - 1) / kRowBlock; }
  int rows_in(int64_t b) const {
    const int64_t left = m - b * kRowBlock;
    return static_cast<int>(left < kRowBlock ? left : kRowBlock);
  }
};

enum class Activation : int { silu, gelu_tanh };

// How a tensor that is not ours holds its floats.
enum class Float : int { f32, bf16, f16 };
inline constexpr int64_t float_bytes(Float type) { return type == Float::f32 ? 4 : 2; }

}  // namespace lacewing
