// The Scalar table of the KV cache. See kv_joint.h.
#include "isa/kv_joint.h"
#include "simd/scalar.h"

namespace lacewing {

constinit const KvTable kScalarKvTable = make_kv_table<Scalar>();

}  // namespace lacewing
