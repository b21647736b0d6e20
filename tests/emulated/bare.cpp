// The equality test without an operating system, for an emulator of an AVX-512 machine (boot.S has
// set up long mode, 2 MB pages and the vector state). Text goes to port 0xe9, which Bochs prints.
#include "platform.h"

extern "C" {

extern uint64_t lw_page_table[512];  // boot.S: 2 MB pages of the first gigabyte

// What compiled code may call. Bytes forward: no vector code is needed here.
void* memcpy(void* to, const void* from, size_t n) {
  void* start = to;
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
  return start;
}
void* memset(void* to, int value, size_t n) {
  void* start = to;
  __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
  return start;
}
int memcmp(const void* a, const void* b, size_t n) {
  auto* x = static_cast<const uint8_t*>(a);
  auto* y = static_cast<const uint8_t*>(b);
  for (size_t i = 0; i < n; ++i)
    if (x[i] != y[i]) return x[i] - y[i];
  return 0;
}
float fmaf(float a, float b, float c) {
  __asm__("vfmadd213ss %2, %1, %0" : "+x"(a) : "x"(b), "x"(c));
  return a;
}
float sqrtf(float x) {
  __asm__("sqrtss %0, %0" : "+x"(x));
  return x;
}
void __stack_chk_fail() { __builtin_trap(); }

}  // extern "C"

namespace lacewing::test {
namespace {

constexpr uint64_t kFirstPage = 32;  // 64 MB: slots of one 2 MB page and one that is not there

void out8(uint16_t port, uint8_t value) {
  __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

void print_hex(uint64_t value) {
  for (int shift = 60; shift >= 0; shift -= 4) out8(0xe9, "0123456789abcdef"[value >> shift & 15]);
}

[[noreturn]] void power_off() {
  for (const char* c = "Shutdown"; *c; ++c) out8(0x8900, static_cast<uint8_t>(*c));
  for (;;) __asm__ volatile("hlt");
}

}  // namespace

void print(const char* text) {
  for (; *text; ++text) out8(0xe9, static_cast<uint8_t>(*text));
}

uint8_t* guarded(int slot, size_t bytes) {
  return reinterpret_cast<uint8_t*>((kFirstPage + 2 * slot + 1) << 21) - bytes;
}

int usable_tables(const KernelTable** tables) {
  tables[0] = &kScalarTable;
  tables[1] = &kAvx2Table;
  tables[2] = &kAvx512Table;
  return 3;
}

// From boot.S: any exception.
extern "C" [[noreturn]] void lw_fault(uint64_t vector, uint64_t rip) {
  uint64_t address;
  __asm__ volatile("mov %%cr2, %0" : "=r"(address));
  print("\nFAULT vector ");
  print_hex(vector);
  print(" at ");
  print_hex(rip);
  print(" address ");
  print_hex(address);
  print("\n");
  power_off();
}

extern "C" [[noreturn]] void lw_main() {
  for (int slot = 0; slot < kSlots; ++slot) lw_page_table[kFirstPage + 2 * slot + 1] = 0;
  __asm__ volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" : : : "rax", "memory");
  run();
  power_off();
}

}  // namespace lacewing::test
