#include "engine/cache.h"

#include <cstring>
#include <utility>

#include "core/draw.h"
#include "core/kv.h"

namespace lacewing {
namespace {

// A full block of a growing format.
std::vector<uint8_t> draw_block(const KvTable& table, int format, int64_t head_dim, Draw& draw) {
  const auto d = static_cast<size_t>(head_dim);
  std::vector<float> k(d), v(d);
  Memory block(static_cast<size_t>(kKvInfo[format].block_bytes(head_dim)));
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    for (size_t i = 0; i < d; ++i) k[i] = draw.next(), v[i] = draw.next();
    table.formats[format].store(k.data(), v.data(), block.data(), lane, head_dim);
  }
  return {block.data(), block.data() + block.size()};
}

}  // namespace

Cache::Cache(KvLayout layout, int64_t head_dim) : layout_(std::move(layout)) {
  for (const KvStore& store : layout_.stores) {
    block_bytes_.push_back(store.format == kLabels ? label_bytes(layout_.channels)
                                                   : kKvInfo[store.format].block_bytes(head_dim));
    memory_.emplace_back(checked_product({store.heads, store.blocks, block_bytes_.back()}));
  }
  for (const KvHead& head : layout_.heads) {
    seals_ = seals_ || head.sealed;
    lists_ = lists_ || head.lists();
  }
}

Cache::Cache(const Cache& other)
    : layout_(other.layout_),
      block_bytes_(other.block_bytes_),
      seals_(other.seals_),
      lists_(other.lists_) {
  for (const Memory& each : other.memory_) {
    memory_.emplace_back(each.size());
    std::memcpy(memory_.back().data(), each.data(), each.size());
  }
}

void Cache::grow(const std::vector<int64_t>& blocks) {
  std::vector<Memory> larger(memory_.size());
  for (size_t i = 0; i < memory_.size(); ++i)
    if (blocks[i] > layout_.stores[i].blocks)
      larger[i] = Memory(checked_product({layout_.stores[i].heads, blocks[i], block_bytes_[i]}));
  for (size_t i = 0; i < memory_.size(); ++i) {
    KvStore& store = layout_.stores[i];
    if (blocks[i] == store.blocks) continue;
    const auto from = static_cast<size_t>(store.blocks * block_bytes_[i]);
    const auto to = static_cast<size_t>(blocks[i] * block_bytes_[i]);
    for (size_t h = 0; h < static_cast<size_t>(store.heads); ++h)
      std::memcpy(larger[i].data() + h * to, memory_[i].data() + h * from, from);
    store.blocks = blocks[i];
    memory_[i] = std::move(larger[i]);
  }
}

void Cache::copy(int store, int64_t from, int64_t to) {
  const auto i = static_cast<size_t>(store);
  const int64_t bytes = block_bytes_[i], head = layout_.stores[i].blocks * bytes;
  for (int64_t h = 0; h < layout_.stores[i].heads; ++h) {
    uint8_t* at = memory_[i].data() + h * head;
    std::memmove(at + to * bytes, at + from * bytes, static_cast<size_t>(bytes));
  }
}

int64_t Cache::bytes() const {
  size_t all = 0;
  for (const Memory& each : memory_) all += each.size();
  return static_cast<int64_t>(all);
}

void Cache::fill(const KvTable& table, int64_t head_dim) {
  Draw draw;
  for (size_t i = 0; i < layout_.stores.size(); ++i) {
    const int format = layout_.stores[i].format;
    const auto bytes = static_cast<size_t>(block_bytes_[i]);
    Memory one(bytes);
    if (format == kLabels) {
      for (size_t b = 0; b < bytes; ++b)
        one.data()[b] = static_cast<uint8_t>(64 * draw.next() + 128);
    } else {
      const int from = kKvInfo[format].sealed_from;
      const auto grown = draw_block(table, from < 0 ? format : from, head_dim, draw);
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
