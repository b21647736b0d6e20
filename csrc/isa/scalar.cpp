// The Scalar table. See joint.h.
#include "simd/scalar.h"

#include "isa/joint.h"

namespace lacewing {

constinit const KernelTable kScalarTable = make_table<Scalar, kScalarKvTable>();

}  // namespace lacewing
