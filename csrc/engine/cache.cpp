#include "engine/cache.h"

#include <cstring>
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

// The next of numbers in -1..1.
float draw(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
}

// A full block of a growing format.
std::vector<uint8_t> draw_block(const KvTable& table, int format, int64_t head_dim,
                                uint32_t& state) {
  const auto d = static_cast<size_t>(head_dim);
  std::vector<float> k(d), v(d);
  Memory block(static_cast<size_t>(kKvInfo[format].block_bytes(head_dim)));
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    for (size_t i = 0; i < d; ++i) k[i] = draw(state), v[i] = draw(state);
    table.formats[format].store(k.data(), v.data(), block.data(), lane, head_dim);
  }
  return {block.data(), block.data() + block.size()};
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

void Cache::fill(const KvTable& table, int64_t head_dim) {
  uint32_t state = 1;
  for (size_t i = 0; i < layout_.stores.size(); ++i) {
    const int format = layout_.stores[i].format;
    const auto bytes = static_cast<size_t>(block_bytes_[i]);
    Memory one(bytes);
    if (format == kLabels) {
      for (size_t b = 0; b < bytes; ++b)
        one.data()[b] = static_cast<uint8_t>(64 * draw(state) + 128);
    } else {
      const int from = kKvInfo[format].sealed_from;
      const auto grown = draw_block(table, from < 0 ? format : from, head_dim, state);
      if (from < 0)
        std::memcpy(one.data(), grown.data(), bytes);
      else
        table.formats[format].seal(grown.data(), one.data(), head_dim);
    }
    for (size_t at = 0; at + bytes <= memory_[i].size(); at += bytes)
      std::memcpy(memory_[i].data() + at, one.data(), bytes);
  }
}

}  // namespace lacewing
