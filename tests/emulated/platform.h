// What the equality test needs of the machine below it: Linux (hosted.cpp) or nothing (bare.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/kernels.h"

namespace lacewing::test {

void print(const char* text);

// The last `bytes` bytes before memory that must not be touched: one byte further is a fault.
// A slot is used again and again; kSlots slots of kSlotBytes.
inline constexpr int kSlots = 16;
inline constexpr size_t kSlotBytes = size_t{2} << 20;
uint8_t* guarded(int slot, size_t bytes);

// Tables that run here, the scalar one first.
int usable_tables(const KernelTable** tables);

// Compares every kernel of every table with the scalar one. Returns the number of differences.
int run();

}  // namespace lacewing::test
