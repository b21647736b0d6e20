// The Avx512 table. See joint.h.
#include "simd/avx512.h"

#include "isa/joint.h"

namespace lacewing {

constinit const KernelTable kAvx512Table = make_table<Avx512, kAvx512KvTable>();

}  // namespace lacewing
