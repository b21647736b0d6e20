// What the CPU and the operating system offer, and which of it an ISA's table lacks.
#pragma once

#include <cstdint>

namespace lacewing {

struct Cpu {
  uint32_t leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, extended_ecx;  // CPUID
  bool amd;             // its vendor, where kernels behave differently (Switch)
  uint64_t xcr0;        // register state that the OS saves
  bool tile_permitted;  // the kernel gives this process tile registers
};

// Asks the CPU, and Linux for permission to use tile registers if the CPU has them.
Cpu read_cpu();

// Linux gives tile registers (8 KB of state per thread) only to a process that has asked. True if
// this one has them, false if the kernel refuses or does not know them.
bool request_tiles();

// The first feature that is missing, or null.
const char* missing_avx2(const Cpu& cpu);
const char* missing_avx512(const Cpu& cpu);
const char* missing_amx(const Cpu& cpu);

}  // namespace lacewing
