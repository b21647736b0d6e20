// What a decoder tells about its format, and what decoders share.
//
// A decoder turns one strip (16 outputs) into 64-byte VNNI blocks and scales. It knows no loop over
// outputs, no thread and no ISA. Its members:
//   kGroup, kZeroPoint, kMaxCode, kHasMin, kSparse, kParts, kPartNames
//   kRowScale                    one scale per row: kGroup is only what `group` decodes at once
//   Cursor, open(w, strip)       a place in the strip's bytes, at its first group
//   scale<S>(c), minimum<S>(c)   of the group at the cursor
//   group<S>(c, f)               calls f(b, block) for the group's blocks, then moves to the next
//   kTileBytes                   of each part, per strip and kPad inputs; 0: a stream
// Where strips keep whole columns of inputs (kKeepsColumns): head(k), the bytes before the blocks,
// kScaleBytes of them before the bitmap; kBlockBytes of four kept columns; and the cursor of an
// opened strip has the `bitmap` of its inputs and the `blocks` of those that are kept.
// Floats (kGroup 0) have pair<S>(c, even, odd) instead: two inputs of the 16 outputs.
// weight = scale * (code - kZeroPoint) [+ minimum].
#pragma once

#include "core/inline.h"
#include "core/types.h"

namespace lacewing {
namespace {

template <class F>
inline constexpr bool kKeepsColumns = requires { F::kColumns; };

// Distances of the two prefetch levels on a stream, in bytes: one core does not overlap DRAM
// latency with decoding by itself. Running past a tensor's end is harmless.
inline constexpr int kPrefetchNear = 768;
inline constexpr int kPrefetchFar = 8192;

template <class S>
LW_INLINE void prefetch_stream(const uint8_t* p) {
  if constexpr (S::kPrefetch) {
    S::prefetch_t0(p + kPrefetchNear);
    S::prefetch_t1(p + kPrefetchFar);
  }
}

LW_INLINE uint64_t load_u64(const uint8_t* p) {
  uint64_t v;
  __builtin_memcpy(&v, p, 8);
  return v;
}

LW_INLINE const uint16_t* as_f16(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace
}  // namespace lacewing
