// The Avx512 table of the KV cache. See kv_joint.h.
#include "isa/kv_joint.h"
#include "simd/avx512.h"

namespace lacewing {

constinit const KvTable kAvx512KvTable = make_kv_table<Avx512>();

}  // namespace lacewing
