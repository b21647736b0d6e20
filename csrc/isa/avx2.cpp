// The Avx2 table. See joint.h.
#include "simd/avx2.h"

#include "isa/joint.h"

namespace lacewing {

constinit const KernelTable kAvx2Table = make_table<Avx2, kAvx2KvTable>();

}  // namespace lacewing
