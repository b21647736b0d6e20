#include "core/kv.h"

#include <type_traits>

#include "formats/kv.h"
#include "formats/kv_int4.h"
#include "formats/kv_sparse.h"

namespace lacewing {
namespace {

template <class Kv>
constexpr int index_of() {
  int index = -1, found = -1;
#define LACEWING_KV_INDEX(name, type) \
  if (++index, std::is_same_v<Kv, type>) found = index;
  LACEWING_KV_FORMATS(LACEWING_KV_INDEX)
#undef LACEWING_KV_INDEX
  return found;
}

template <class Kv>
constexpr KvInfo info(const char* name) {
  if constexpr (requires { typename Kv::Growing; })
    return {name, Kv::block_bytes, index_of<typename Kv::Growing>()};
  else
    return {name, Kv::block_bytes, -1};
}

}  // namespace

#define LACEWING_KV_INFO(name, type) info<type>(name),
const KvInfo kKvInfo[kKvFormatCount] = {LACEWING_KV_FORMATS(LACEWING_KV_INFO)};
#undef LACEWING_KV_INFO

}  // namespace lacewing
