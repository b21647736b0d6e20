// The KV cache of a model: stores of blocks, and which of them every head reads.
//
// A store holds blocks of one format for some heads; a sequence has one block table per store, so
// heads that keep less of a text than others are in a store of their own. What a row reads depends
// on its query block (position / 16) only, never on how the tokens were cut into steps.
#pragma once

#include <cstdint>
#include <vector>

#include "core/kernels.h"
#include "core/memory.h"

namespace lacewing {

inline constexpr int kLabels = -1;  // the format of a store of labels
// Query block i reads the key blocks i - kRecent + 1..i as they grow, older ones sealed.
inline constexpr int64_t kRecent = 2;

struct KvStore {
  int format;  // index into LACEWING_KV_FORMATS, or kLabels
  int64_t blocks;
  int64_t heads;
};

// Query block i reads the key blocks j <= i with j < sinks, i - j < window, or
// j % stride == phase (stride > 0); all of them if window is 0.
struct KvSpan {
  int64_t sinks, window, stride, phase;

  bool everything() const { return window == 0; }
  bool reads(int64_t i, int64_t j) const {
    return window == 0 || j < sinks || i - j < window || (stride > 0 && j % stride == phase);
  }
};

// Where a head's blocks are: a store, and the head's number in it; -1: none.
struct KvPlace {
  int store;
  int64_t index;

  explicit operator bool() const { return store >= 0; }
};

struct KvHead {
  KvPlace growing, sealed, labels;
  KvSpan span;

  // Whether it reads other than all blocks, or sealed ones.
  bool lists() const { return !span.everything() || sealed || labels; }
};

struct KvLayout {
  std::vector<KvStore> stores;
  std::vector<KvHead> heads;  // [layers * n_kv_heads]
  // Heads with labels read one block of so many, by their labels; 0: all.
  int64_t topk;
  int64_t channels;                     // of a key, that are labels
  std::vector<int32_t> label_channels;  // [layers * n_kv_heads][channels]
  std::vector<float> label_scales;
};

// With labels, the first and the last blocks are always read, and never fewer than kTopkLeast.
inline constexpr int64_t kTopkSinks = 1, kTopkRecent = 4, kTopkLeast = 32;
inline int64_t topk_budget(int64_t blocks, int64_t topk) {
  const int64_t share = (blocks + topk - 1) / topk;
  return share > kTopkLeast ? share : kTopkLeast;
}

// Rows at a prompt's end whose queries say which of its tokens are important to a merge.
inline constexpr int64_t kMergeRows = 32;

// A sequence whose prompt ends in some rows and is merged.
struct Merge {
  int64_t sequence;
  int64_t row;           // the first of its last kMergeRows
  int64_t tokens, keep;  // in the cache, before and after
};

// How a step's rows belong to sequences, and where the cache has these; the caller has checked
// every index.
struct CacheStep {
  int64_t count, sequences, max_blocks;
  const int32_t* cached;        // [sequences], tokens in the cache before this step
  const int32_t* block_tables;  // [stores, sequences, max_blocks]
  const int32_t* cu_seqlens;    // [sequences + 1]
  // Sequences whose prompt is complete with this step and is merged to so many tokens (0: not), and
  // where these go; there is one store then. Null: none is merged.
  const int32_t* keep;           // [sequences]
  const int32_t* merged_tables;  // [sequences, max_merged]
  int64_t max_merged;

  const int32_t* table(int store, int64_t sequence) const {
    return block_tables + (store * sequences + sequence) * max_blocks;
  }
  const int32_t* merged_table(int64_t sequence) const {
    return merged_tables + sequence * max_merged;
  }
  int64_t kept(int64_t sequence) const { return keep ? keep[sequence] : 0; }
  // Of a sequence that keeps less; rows are counted from row `begin` of the step.
  Merge merge(int64_t sequence, int64_t begin) const {
    const int64_t first = cu_seqlens[sequence], end = cu_seqlens[sequence + 1];
    return {sequence, end - kMergeRows - begin, cached[sequence] + end - first, keep[sequence]};
  }
};

class Cache {
 public:
  // Throws std::bad_alloc.
  Cache(KvLayout layout, int64_t head_dim);
  Cache(const Cache& other);
  Cache& operator=(const Cache&) = delete;

  // Stores of so many blocks, no fewer than they have. Throws std::bad_alloc, and is then as it
  // was.
  void grow(const std::vector<int64_t>& blocks);
  // Block `from` of a store becomes block `to`, of all its heads.
  void copy(int store, int64_t from, int64_t to);
  int64_t bytes() const;

  const KvLayout& layout() const { return layout_; }
  bool seals() const { return seals_; }
  // Whether tiles of rows must not cross a block: some head does not read all of them.
  bool lists() const { return lists_; }
  // Numbers without meaning in every block, as after a long text: for benchmarks.
  void fill(const KvTable& table, int64_t head_dim);
  int format(const KvPlace& place) const { return store(place).format; }
  int64_t block_bytes(const KvPlace& place) const {
    return block_bytes_[static_cast<size_t>(place.store)];
  }
  // The first of the head's blocks.
  uint8_t* blocks(const KvPlace& place) const {
    return memory_[static_cast<size_t>(place.store)].data() +
           place.index * store(place).blocks * block_bytes(place);
  }

 private:
  const KvStore& store(const KvPlace& place) const {
    return layout_.stores[static_cast<size_t>(place.store)];
  }

  KvLayout layout_;
  std::vector<int64_t> block_bytes_;
  // By store: [heads][blocks][block_bytes]. One head's tokens follow each other, which the
  // hardware's prefetcher wants.
  std::vector<Memory> memory_;
  bool seals_ = false, lists_ = false;
};

}  // namespace lacewing
