// Memory that one call leaves to the next of its thread: fresh pages, or zeroing old ones, would
// cost more than a small product. Only what is unusually large is given back.
#pragma once

#include "core/memory.h"
#include "core/pool.h"
#include "core/rows.h"

namespace lacewing {

class Workspace {
 public:
  explicit Workspace(size_t kept) : kept_(kept) {}
  // At least `bytes` of anything, 64-byte aligned, until the next call of `take`.
  uint8_t* take(size_t bytes) {
    if (memory_.size() < bytes || memory_.size() > kept_) memory_ = Memory(bytes);
    return memory_.data();
  }

 private:
  const size_t kept_;
  Memory memory_;
};
inline thread_local Workspace activations_space(size_t{64} << 20);
inline thread_local Workspace scratch_space(kLinearScratch* Pool::kMaxThreads);

// Activations `[m, k]` as weights of `format` want them, in this thread's workspace.
inline Rows take_rows(int format, int64_t m, int64_t k) {
  const FormatInfo& info = kFormatInfo[format];
  return place_rows(info, m, k, activations_space.take(rows_bytes(info, m, k)));
}

// Groups of activations in a row, as `KernelTable::quantize_row` counts them.
inline int64_t row_groups(const Rows& rows) {
  const int64_t step = rows.group ? rows.group : 64;
  return (rows.k_pad + step - 1) / step;
}

}  // namespace lacewing
