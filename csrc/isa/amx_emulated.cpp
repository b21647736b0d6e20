// The AMX driver in plain C++: the slow twin that runs on every machine. See amx_joint.h.
#include "isa/amx_joint.h"
#include "simd/scalar.h"

namespace lacewing {

constinit const TileKernels kAmxEmulatedTable =
    make_tile_kernels<kScalarTable, Scalar, SoftwareTiles>("amx_emulated");

}  // namespace lacewing
