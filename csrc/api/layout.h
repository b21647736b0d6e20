// The KV cache as Python describes it: its layout, and where a step's tokens are in it. `where` is
// what the messages begin with.
#pragma once

#include <optional>
#include <string>

#include "api/check.h"
#include "engine/cache.h"

namespace lacewing {

using Indices = Array<int32_t, 1>;

inline int64_t length(const Indices& array) { return static_cast<int64_t>(array.shape(0)); }

// kv: see `_C.Model`.
KvLayout read_layout(const std::string& where, const nanobind::dict& kv, int64_t layers,
                     int64_t kv_heads, int64_t head_dim);

// Blocks of every store, as many as there are stores and as many as there may be.
void check_blocks(const std::string& where, const KvLayout& layout,
                  const std::vector<int64_t>& blocks);

struct CacheArrays {
  const Indices& cached;
  const Array<int32_t, 3>& block_tables;
  const Indices& cu_seqlens;
  const std::optional<Indices>& keep;
  const std::optional<Array<int32_t, 2>>& merged_tables;

  int64_t sequences() const { return static_cast<int64_t>(block_tables.shape(1)); }
  CacheStep view() const;
};

// That `count` rows belong to the sequences.
void check_sequences(const std::string& where, const CacheArrays& a, int64_t count);
// That block tables, and those of merged prompts, are inside the stores. windows: some layer does
// not read everything. After `check_sequences`.
void check_cache(const std::string& where, const CacheArrays& a, const KvLayout& layout,
                 bool windows);

}  // namespace lacewing
