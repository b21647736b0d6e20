// The joint of what tiles add to a table: every format's `linear` with the AMX driver, for the
// vocabulary S and the tiles `Tiles`, over the table `Base`. See joint.h.
#pragma once

#include "drivers/linear_amx.h"
#include "isa/joint.h"

namespace lacewing {
namespace {

template <const KernelTable& Base, class S, class Tiles>
constexpr TileKernels make_tile_kernels(const char* isa) {
  return {isa,
          {
#define LACEWING_TILE_KERNEL(name, ...) linear_amx<Base, S, Tiles, __VA_ARGS__>,
              LACEWING_FORMATS(LACEWING_TILE_KERNEL)
#undef LACEWING_TILE_KERNEL
          }};
}

}  // namespace
}  // namespace lacewing
