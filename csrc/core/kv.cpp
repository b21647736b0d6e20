#include "core/kv.h"

#include "formats/kv.h"

namespace lacewing {

#define LACEWING_KV_INFO(name, type) {name, type::block_bytes, -1},
const KvInfo kKvInfo[kKvFormatCount] = {LACEWING_KV_FORMATS(LACEWING_KV_INFO)};
#undef LACEWING_KV_INFO

}  // namespace lacewing
