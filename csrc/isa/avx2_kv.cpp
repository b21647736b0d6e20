// The Avx2 table of the KV cache. See kv_joint.h.
#include "isa/kv_joint.h"
#include "simd/avx2.h"

namespace lacewing {

constinit const KvTable kAvx2KvTable = make_kv_table<Avx2>();

}  // namespace lacewing
