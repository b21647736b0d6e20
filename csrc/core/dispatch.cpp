#include "core/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include "core/cpu.h"

namespace lacewing {
namespace {

// `base` with the products of `tiles`.
KernelTable with_tiles(const KernelTable& base, const TileKernels& tiles) {
  KernelTable table = base;
  table.isa = tiles.isa;
  for (int i = 0; i < kFormatCount; ++i) table.formats[i].linear = tiles.linear[i];
  return table;
}

const Cpu& this_cpu() {
  static const Cpu cpu = read_cpu();
  return cpu;
}

// True once: every table's switches stand where this CPU wants them.
bool set_switches() {
  for (const KernelTable* table : {&kScalarTable, &kAvx2Table, &kAvx512Table})
    for (const FormatKernels& format : table->formats)
      for (const Switch* s : {&format.gemv, &format.cpu_prefetch})
        __atomic_store_n(s->rows, standard_of(*s), __ATOMIC_RELAXED);
  return true;
}

}  // namespace

int standard_of(const Switch& s) { return this_cpu().amd ? s.on_amd : s.standard; }

std::string isa_names() {
  int count;
  const IsaStatus* isas = isa_status(&count);
  std::string all;
  for (int i = 0; i < count; ++i) all += (i ? ", `" : "`") + std::string(isas[i].name) + "`";
  return all;
}

const IsaStatus* isa_status(int* count) {
  const Cpu& cpu = this_cpu();
  [[maybe_unused]] static const bool set = set_switches();
  static const char* const avx512 = missing_avx512(cpu);
  static const KernelTable amx = with_tiles(kAvx512Table, kAmxTable);
  // Everything but the tile instructions is what runs beside them, wherever the CPU allows it.
  static const KernelTable emulated = avx512 ? with_tiles(kScalarTable, kAmxEmulatedTable)
                                             : with_tiles(kAvx512Table, kAmxEmulatedAvx512Table);
  static const IsaStatus isas[] = {{"amx_emulated", &emulated, nullptr, true},
                                   {"scalar", &kScalarTable, nullptr, false},
                                   {"avx2", &kAvx2Table, missing_avx2(cpu), false},
                                   {"avx512", &kAvx512Table, avx512, false},
                                   {"amx", &amx, missing_amx(cpu), false}};
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
      throw std::runtime_error(std::string("LACEWING_ISA must be one of ") + isa_names() +
                               ", got `" + forced + "`");
    if (isa->missing)
      throw std::runtime_error(std::string("LACEWING_ISA=") + forced + " needs " + isa->missing +
                               ", which is missing here; unset it to use what there is");
    return *isa->table;
  }
  int count;
  const IsaStatus* isas = isa_status(&count);
  // `amx` only when asked for: its instructions have run in emulation, not yet on hardware.
  while (isas[count - 1].missing || isas[count - 1].table->isa == std::string_view("amx")) --count;
  return *isas[count - 1].table;
}

}  // namespace lacewing
