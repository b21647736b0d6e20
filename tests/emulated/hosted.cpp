// The equality test as an ordinary program: what this CPU runs against the scalar table.
#include <sys/mman.h>

#include <cstdio>

#include "platform.h"

namespace lacewing::test {

void print(const char* text) { std::fputs(text, stdout); }

uint8_t* guarded(int slot, size_t bytes) {
  static uint8_t* ends[kSlots];
  if (!ends[slot]) {
    void* p =
        mmap(nullptr, 2 * kSlotBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) __builtin_trap();
    ends[slot] = static_cast<uint8_t*>(p) + kSlotBytes;
    if (mprotect(ends[slot], kSlotBytes, PROT_NONE)) __builtin_trap();
  }
  return ends[slot] - bytes;
}

int usable_tables(const KernelTable** tables) {
  int all, count = 0;
  const IsaStatus* isas = isa_status(&all);
  tables[count++] = &kScalarTable;
  for (int i = 0; i < all; ++i) {
    if (isas[i].missing)
      std::printf("not run: %s, this CPU lacks %s\n", isas[i].name, isas[i].missing);
    else if (isas[i].table != &kScalarTable)
      tables[count++] = isas[i].table;
  }
  return count;
}

}  // namespace lacewing::test

int main() { return lacewing::test::run() ? 1 : 0; }
