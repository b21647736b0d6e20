// What AMX adds to the Avx512 table, and the same with software tiles. See amx_joint.h.
#include "isa/amx_joint.h"
#include "simd/avx512.h"

namespace lacewing {

constinit const TileKernels kAmxTable = make_tile_kernels<kAvx512Table, Avx512, AmxTiles>("amx");
constinit const TileKernels kAmxEmulatedAvx512Table =
    make_tile_kernels<kAvx512Table, Avx512, SoftwareTiles>("amx_emulated");

}  // namespace lacewing
