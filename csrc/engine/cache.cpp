#include "engine/cache.h"

#include <new>
#include <utility>

#include "core/kv.h"

namespace lacewing {
namespace {

size_t product(std::initializer_list<int64_t> factors) {
  size_t total = 1;
  for (int64_t f : factors)
    if (__builtin_mul_overflow(total, static_cast<size_t>(f), &total)) throw std::bad_alloc();
  return total;
}

}  // namespace

Cache::Cache(KvLayout layout, int64_t head_dim) : layout_(std::move(layout)) {
  for (const KvStore& store : layout_.stores) {
    block_bytes_.push_back(store.format == kLabels ? label_bytes(layout_.channels)
                                                   : kKvInfo[store.format].block_bytes(head_dim));
    memory_.emplace_back(product({store.heads, store.blocks, block_bytes_.back()}));
  }
  for (const KvHead& head : layout_.heads) {
    seals_ = seals_ || head.sealed;
    lists_ = lists_ || head.lists(topk());
  }
}

}  // namespace lacewing
