// Prints what every ISA's table lacks on made-up machines: one line per machine, `name: avx2 /
// avx512 / amx`. A program of its own, since no one machine can show them all.
#include <cstdio>

#include "core/cpu.h"

namespace {

using lacewing::Cpu;

// Everything there is, allowed by everybody.
constexpr Cpu kAll{~0u, ~0u, ~0u, ~0u, ~0u, false, 0x602e7, true};

template <class Change>
void show(const char* name, Change change) {
  Cpu cpu = kAll;
  change(cpu);
  const auto text = [](const char* missing) { return missing ? missing : "-"; };
  std::printf("%s: %s / %s / %s\n", name, text(missing_avx2(cpu)), text(missing_avx512(cpu)),
              text(missing_amx(cpu)));
}

}  // namespace

int main() {
  show("all", [](Cpu&) {});
  show("nothing", [](Cpu& c) { c = Cpu{}; });
  show("no avx2", [](Cpu& c) { c.leaf7_ebx &= ~(1u << 5); });
  show("no vbmi2", [](Cpu& c) { c.leaf7_ecx &= ~(1u << 6); });
  show("no avx512 state", [](Cpu& c) { c.xcr0 = 0x7; });
  show("no amx", [](Cpu& c) { c.leaf7_edx = 0; });
  show("no amx-int8", [](Cpu& c) { c.leaf7_edx &= ~(1u << 25); });
  show("no amx-bf16", [](Cpu& c) { c.leaf7_edx &= ~(1u << 22); });
  show("tile configuration not saved", [](Cpu& c) { c.xcr0 &= ~(1ull << 17); });
  show("tile data not saved", [](Cpu& c) { c.xcr0 &= ~(1ull << 18); });
  show("permission refused", [](Cpu& c) { c.tile_permitted = false; });
}
