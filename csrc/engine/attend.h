// Attention of one layer over the cache: keys and values are stored and sealed, every head's blocks
// are chosen and read, finished prompts are merged. What one thread of a step sees.
#pragma once

#include <atomic>
#include <vector>

#include "core/kernels.h"
#include "core/memory.h"
#include "engine/cache.h"
#include "engine/reads.h"
#include "engine/tiles.h"

namespace lacewing {

// A layer's queries, keys and values of the rows of `Tiles`, rotated, and where its output goes.
struct LayerRows {
  int64_t first_head;  // of the layer's KV heads, in the cache's layout
  int64_t window;      // 0: all tokens
  float scale;
  const float* q;  // row r, head h: q + r * q_stride + h * head_dim
  int64_t q_stride;
  const float *k, *v;  // null: they are stored already
  int64_t kv_stride;
  float* out;  // as q
  int64_t out_stride;
};

// What one thread works in.
struct AttendSpace {
  Reads reads;
  Memory partial;  // of attention to sealed blocks, as large as a tile wants it
  Memory select;   // scratch of choosing blocks
  Memory merge;    // scratch of merging prompts
};

class Attend {
 public:
  // kernel: kAttentionScratch bytes.
  Attend(const Cache& cache, const KvTable& table, const HeadShape& shape, const CacheStep& step,
         AttendSpace& space, void* kernel)
      : cache_(cache), table_(table), shape_(shape), step_(step), space_(space), kernel_(kernel) {}

  // What the threads share of the rows to come. partials: `tiles.partial_floats`; done: parts of
  // every tile and KV head, zeros.
  void begin(const Tiles& tiles, float* partials, std::atomic<int64_t>* done) {
    tiles_ = &tiles;
    partials_ = partials;
    done_ = done;
  }

  // This thread's part of a layer: prepare(row, kv_head) makes k and q of it ready, complete(tile,
  // kv_head) takes the output; meet() waits for the other threads. taken: items, from 0.
  template <class Prepare, class Complete, class Meet>
  void run(const LayerRows& at, std::atomic<int64_t>& taken, int tid, int n, Prepare prepare,
           Complete complete, Meet meet) {
    if (!tiles_->alone && at.k) fill(at, tid, n, prepare, meet);
    const auto items = static_cast<int64_t>(tiles_->items.size());
    for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < items;) {
      const Item& item = tiles_->items[static_cast<size_t>(i)];
      const Tile& tile = tiles_->tiles[static_cast<size_t>(item.tile)];
      if (tiles_->alone && at.k) {
        prepare(tile.row, item.kv_head);
        store(at, tile.row, item.kv_head);
        seal(at, tile.row, item.kv_head);
      }
      if (attend(at, item)) complete(tile, item.kv_head);
    }
  }

  // Merges a KV head of a prompt that ends in the rows; afterwards `step.merged_tables` has it.
  // Needs merge_scratch bytes in the space.
  void merge(const LayerRows& at, const Merge& merge, int64_t kv_head);

 private:
  struct Listed {
    AttentionArgs sealed, growing;
    bool any_sealed;
  };

  template <class Prepare, class Meet>
  void fill(const LayerRows& at, int tid, int n, Prepare prepare, Meet meet) {
    const auto count = static_cast<int64_t>(tiles_->rows.size());
    const int64_t begin = count * tid / n, end = count * (tid + 1) / n;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t h = 0; h < shape_.kv_heads; ++h) {
        prepare(r, h);
        store(at, r, h);
      }
    meet();
    if (!cache_.seals()) return;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t h = 0; h < shape_.kv_heads; ++h) seal(at, r, h);
    meet();
  }

  void store(const LayerRows& at, int64_t row, int64_t kv_head);
  void seal(const LayerRows& at, int64_t row, int64_t kv_head);
  bool attend(const LayerRows& at, const Item& item);
  void attend_lists(const KvHead& head, const AttentionArgs& args, const BlockLists& lists);
  bool attend_part(const KvHead& head, const AttentionArgs& args, const BlockLists& lists,
                   const Item& item);
  void attend_chosen(const LayerRows& at, const Item& item, AttentionArgs args);

  const KvHead& head_of(const LayerRows& at, int64_t kv_head) const;
  const KvKernels& kernels_of(const KvPlace& place) const;
  const Tile& tile_of(const Item& item) const;
  uint8_t* block_of(const KvPlace& place, const CacheRow& row, int64_t tokens = kBlock) const;
  const int32_t* table_of(const KvPlace& place, int64_t sequence) const;
  AttentionArgs args_of(const LayerRows& at, const Item& item) const;
  Listed listed(const KvHead& head, const AttentionArgs& args, const BlockLists& lists) const;
  float* partials_of(const Item& item) const;
  bool last_part(const Item& item);

  const Cache& cache_;
  const KvTable& table_;
  const HeadShape shape_;
  const CacheStep& step_;
  AttendSpace& space_;
  void* kernel_;
  const Tiles* tiles_ = nullptr;
  float* partials_ = nullptr;
  std::atomic<int64_t>* done_ = nullptr;
};

}  // namespace lacewing
