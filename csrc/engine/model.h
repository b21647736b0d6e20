// A decoder: borrowed weights, its KV cache and work space, and one step over a batch of tokens.
#pragma once

#include <mutex>
#include <vector>

#include "core/kernels.h"
#include "core/memory.h"
#include "engine/attend.h"
#include "engine/cache.h"
#include "engine/tiles.h"

namespace lacewing {

struct Spec {
  int64_t vocab_size, hidden_size, n_heads, n_kv_heads, head_dim, intermediate_size;
  float norm_eps, embedding_scale, attention_scale;
  Activation activation;
  bool qk_norm, sandwich_norm;

  int64_t q_size() const { return n_heads * head_dim; }
  int64_t kv_size() const { return n_kv_heads * head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
  HeadShape heads() const { return {n_kv_heads, n_heads / n_kv_heads, head_dim}; }
};

struct Linear {
  PackedTensor w;
  const float* bias;  // [n] or null
};

struct Layer {
  Linear q, k, v, o, gate, up, down;
  const float* input_norm;             // [hidden_size]
  const float* post_attention_norm;    // before the MLP; with sandwich_norm: of attention's output
  const float* pre_feedforward_norm;   // sandwich_norm only
  const float* post_feedforward_norm;  // sandwich_norm only
  const float* q_norm;                 // [head_dim], qk_norm only
  const float* k_norm;
  int rope;        // index into Weights::ropes
  int64_t window;  // 0: all tokens
};

struct Rope {
  const float* cos;  // [positions, head_dim / 2]
  const float* sin;
  int64_t positions;
};

struct Weights {
  Spec spec;
  Linear embedding, head;
  const float* norm;
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
};

// Flat arrays of one step (see `_C.pyi`); the caller has checked every index.
struct StepInput {
  CacheStep cache;
  const int32_t* tokens;     // [count]
  const int32_t* positions;  // [count]
  int64_t logit_count;
  const int32_t* logit_rows;  // [logit_count]
  float* logits;              // [logit_count, vocab_size]
};

inline constexpr int64_t kChunk = 512;  // rows computed at once
// What a linear layer may want its input to be: floats padded to 2 or to 64, int8 groups of 32, 64
// or 128, or int8 rows padded to 64 or to 320.
inline constexpr int kGrids = 7;
inline int grid_of(const PackedTensor& w) {
  const FormatInfo& format = kFormatInfo[w.format];
  if (format.group == 0) return format.k_pad(1) == 2 ? 0 : 6;
  if (format.group == kRowGroup) return format.k_pad(1) == 64 ? 4 : 5;
  return format.group == 32 ? 1 : format.group == 64 ? 2 : 3;
}
// Columns of w's input that can be quantized apart from the others; 0: none.
inline int64_t slice_columns(const PackedTensor& w) {
  const int group = kFormatInfo[w.format].group;
  return group == 0 ? 64 : group == kRowGroup ? 0 : group;
}

// Activations on every grid that some linear layer reads them on.
struct RowsMemory {
  Memory memory[kGrids];

  // Room for `m` rows of `k` columns on the grid of w.
  void reserve(const PackedTensor& w, int64_t m);
  // The first m rows' worth, laid out for w.
  Rows place(const PackedTensor& w, int64_t m) const;
};

// What one thread works in.
struct ThreadSpace {
  Memory kernel;      // kLinearScratch bytes, also attention's scratch
  Memory row;         // one row of hidden_size
  Memory gate, up;    // a tile of the MLP
  RowsMemory hidden;  // normalized rows, if every thread makes its own copy
  AttendSpace attend;
};

// What the threads share.
struct SharedSpace {
  Memory x;                         // [kChunk, hidden_size], the residual stream
  Memory qkv;                       // [kChunk, q_size + 2 kv_size]
  Memory attended;                  // [kChunk, q_size]
  Memory activated;                 // [kChunk, intermediate_size], if down has one scale per row
  Memory projected;                 // [kChunk, hidden_size], sandwich_norm only
  Memory partials;                  // of attention, as many as a chunk needs; see `Tiles`
  RowsMemory hidden, heads, inner;  // inputs of q|k|v|gate|up|head, of o, of down
};

class Model {
 public:
  // Borrows everything `weights` points to. Throws std::bad_alloc.
  Model(Weights weights, KvLayout layout, const KernelTable& table, int threads);

  // Calls from several threads are served one after another.
  void step(const StepInput& input);

  const Weights& weights() const { return weights_; }
  void fill_cache() { cache_.fill(*table_.kv, weights_.spec.head_dim); }
  const KvLayout& layout() const { return cache_.layout(); }
  int threads() const { return static_cast<int>(thread_.size()); }

 private:
  friend class Forward;

  Weights weights_;
  const KernelTable& table_;
  Cache cache_;
  SharedSpace shared_;
  std::vector<ThreadSpace> thread_;
  std::mutex stepping_;

  void reserve_shared();
  void reserve_thread(ThreadSpace& space);
  // Room for partial results of attention. Throws std::bad_alloc.
  void reserve_partials(int64_t floats);
  // Room for every thread to merge prompts of up to `tokens` tokens. Throws std::bad_alloc.
  void reserve_merge(int64_t tokens);
};

// Rows of hidden_size that a thread normalizes for itself instead of meeting the others.
int64_t private_rows(const Spec& spec);
// Strips of a tile of the MLP with m rows.
int64_t tile_strips(int64_t m);

}  // namespace lacewing
