#include "core/dispatch.h"

#include <cpuid.h>

#include <cstdlib>
#include <stdexcept>

namespace lacewing {
namespace {

struct Cpuid {
  uint32_t eax, ebx, ecx, edx;
};

Cpuid cpuid(uint32_t leaf, uint32_t sub) {
  Cpuid r{};
  if (__get_cpuid_max(0, nullptr) < leaf) return r;
  __cpuid_count(leaf, sub, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

// Register state the OS saves; reading it needs OSXSAVE.
uint64_t xcr0(const Cpuid& leaf1) {
  if (!(leaf1.ecx >> 27 & 1)) return 0;
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return static_cast<uint64_t>(hi) << 32 | lo;
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

bool bit(uint32_t word, int i) { return word >> i & 1; }

const char* missing_avx2() {
  const Cpuid l1 = cpuid(1, 0), l7 = cpuid(7, 0);
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(0x80000001, &a, &b, &c, &d);
  const Feature needed[] = {{"AVX", bit(l1.ecx, 28)},
                            {"FMA", bit(l1.ecx, 12)},
                            {"F16C", bit(l1.ecx, 29)},
                            {"POPCNT", bit(l1.ecx, 23)},
                            {"AVX2", bit(l7.ebx, 5)},
                            {"BMI1", bit(l7.ebx, 3)},
                            {"BMI2", bit(l7.ebx, 8)},
                            {"LZCNT", bit(c, 5)},
                            {"AVX state enabled by the OS", (xcr0(l1) & 0x6) == 0x6}};
  return first_missing(needed);
}

const char* missing_avx512() {
  if (const char* m = missing_avx2()) return m;
  const Cpuid l1 = cpuid(1, 0), l7 = cpuid(7, 0);
  const Feature needed[] = {{"AVX512F", bit(l7.ebx, 16)},
                            {"AVX512BW", bit(l7.ebx, 30)},
                            {"AVX512DQ", bit(l7.ebx, 17)},
                            {"AVX512VL", bit(l7.ebx, 31)},
                            {"AVX512_VNNI", bit(l7.ecx, 11)},
                            {"AVX512_VBMI", bit(l7.ecx, 1)},
                            {"AVX512_VBMI2", bit(l7.ecx, 6)},
                            {"AVX-512 state enabled by the OS", (xcr0(l1) & 0xe6) == 0xe6}};
  return first_missing(needed);
}

std::string names() {
  int count;
  const IsaStatus* isas = isa_status(&count);
  std::string all;
  for (int i = 0; i < count; ++i) all += (i ? ", `" : "`") + std::string(isas[i].name) + "`";
  return all;
}

}  // namespace

const IsaStatus* isa_status(int* count) {
  static const IsaStatus isas[] = {{"scalar", &kScalarTable, nullptr},
                                   {"avx2", &kAvx2Table, missing_avx2()},
                                   {"avx512", &kAvx512Table, missing_avx512()}};
  *count = static_cast<int>(sizeof(isas) / sizeof(isas[0]));
  return isas;
}

const IsaStatus* find_isa(const std::string& name) {
  int count;
  const IsaStatus* isas = isa_status(&count);
  for (int i = 0; i < count; ++i)
    if (name == isas[i].name) return &isas[i];
  return nullptr;
}

const KernelTable& default_table() {
  if (const char* forced = std::getenv("LACEWING_ISA"); forced && *forced) {
    const IsaStatus* isa = find_isa(forced);
    if (!isa)
      throw std::runtime_error(std::string("LACEWING_ISA must be one of ") + names() + ", got `" +
                               forced + "`");
    if (isa->missing)
      throw std::runtime_error(std::string("LACEWING_ISA=") + forced + " needs a CPU with " +
                               isa->missing + "; unset it to use what this CPU has");
    return *isa->table;
  }
  int count;
  const IsaStatus* isas = isa_status(&count);
  while (isas[count - 1].missing) --count;  // scalar needs nothing
  return *isas[count - 1].table;
}

}  // namespace lacewing
