// The Scalar table of the KV cache. See kv_joint.h.
#include "simd/scalar.h"

#include "isa/kv_joint.h"

namespace lacewing {

constinit const KvTable kScalarKvTable = make_kv_table<Scalar>();

}  // namespace lacewing
