#include "core/cpu.h"

#include <asm/prctl.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>

namespace lacewing {
namespace {

struct Leaf {
  uint32_t eax, ebx, ecx, edx;
};

Leaf cpuid(uint32_t leaf, uint32_t sub) {
  Leaf r{};
  if (__get_cpuid_max(leaf & 0x80000000u, nullptr) < leaf) return r;
  __cpuid_count(leaf, sub, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

bool bit(uint32_t word, int i) { return word >> i & 1; }

// Reading XCR0 needs OSXSAVE.
uint64_t read_xcr0(uint32_t leaf1_ecx) {
  if (!bit(leaf1_ecx, 27)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

struct Feature {
  const char* name;
  bool present;
};

template <size_t N>
const char* first_missing(const Feature (&features)[N]) {
  for (const Feature& f : features)
    if (!f.present) return f.name;
  return nullptr;
}

constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 3u << 17;

}  // namespace

bool request_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, Linux 5.16 and later
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

Cpu read_cpu() {
  const Leaf vendor = cpuid(0, 0), one = cpuid(1, 0), seven = cpuid(7, 0);
  const Leaf extended = cpuid(0x80000001, 0);
  constexpr uint32_t kAuth = 0x68747541;  // "Auth" of "AuthenticAMD"
  Cpu cpu{one.ecx,      seven.ebx,           seven.ecx,          seven.edx,
          extended.ecx, vendor.ebx == kAuth, read_xcr0(one.ecx), false};
  cpu.tile_permitted = bit(cpu.leaf7_edx, 24) && request_tiles();
  return cpu;
}

const char* missing_avx2(const Cpu& cpu) {
  const Feature needed[] = {{"AVX", bit(cpu.leaf1_ecx, 28)},
                            {"FMA", bit(cpu.leaf1_ecx, 12)},
                            {"F16C", bit(cpu.leaf1_ecx, 29)},
                            {"POPCNT", bit(cpu.leaf1_ecx, 23)},
                            {"AVX2", bit(cpu.leaf7_ebx, 5)},
                            {"BMI1", bit(cpu.leaf7_ebx, 3)},
                            {"BMI2", bit(cpu.leaf7_ebx, 8)},
                            {"LZCNT", bit(cpu.extended_ecx, 5)},
                            {"AVX state enabled by the OS", (cpu.xcr0 & kAvxState) == kAvxState}};
  return first_missing(needed);
}

const char* missing_avx512(const Cpu& cpu) {
  if (const char* missing = missing_avx2(cpu)) return missing;
  const Feature needed[] = {
      {"AVX512F", bit(cpu.leaf7_ebx, 16)},
      {"AVX512BW", bit(cpu.leaf7_ebx, 30)},
      {"AVX512DQ", bit(cpu.leaf7_ebx, 17)},
      {"AVX512VL", bit(cpu.leaf7_ebx, 31)},
      {"AVX512_VNNI", bit(cpu.leaf7_ecx, 11)},
      {"AVX512_VBMI", bit(cpu.leaf7_ecx, 1)},
      {"AVX512_VBMI2", bit(cpu.leaf7_ecx, 6)},
      {"AVX-512 state enabled by the OS", (cpu.xcr0 & kAvx512State) == kAvx512State}};
  return first_missing(needed);
}

const char* missing_amx(const Cpu& cpu) {
  if (const char* missing = missing_avx512(cpu)) return missing;
  const Feature needed[] = {
      {"AMX-TILE", bit(cpu.leaf7_edx, 24)},
      {"AMX-INT8", bit(cpu.leaf7_edx, 25)},
      {"AMX-BF16", bit(cpu.leaf7_edx, 22)},
      {"AMX state enabled by the OS", (cpu.xcr0 & kTileState) == kTileState},
      {"the kernel's permission to use AMX tiles (arch_prctl)", cpu.tile_permitted}};
  return first_missing(needed);
}

}  // namespace lacewing
