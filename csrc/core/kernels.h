// The joint between dispatch and the ISAs: one KernelTable per ISA, plain function pointers.
// Kernels allocate nothing, start no thread, check no argument and write only their slice.
#pragma once

#include "core/kv.h"
#include "core/types.h"

namespace lacewing {

// y[r, o] = (accumulate ? y[r, o] : 0) + (sum_k x[r, k] * w[o, k] + bias[o]) for the rows of x and
// the outputs of strips [strip_begin, strip_end). y is f32 with `ldy` floats between rows.
// Each output is computed by one thread in one stated order, so the result does not depend on
// m, on the thread count or on the split.
struct LinearArgs {
  const PackedTensor* w;
  const Rows* x;
  const float* bias;  // [n] or null
  float* y;
  int64_t ldy;
  bool accumulate;
  int64_t strip_begin, strip_end;
  void* scratch;  // kLinearScratch bytes, 64-byte aligned, private to the calling thread
};
// One huge page a thread: the drivers of kept columns and of AMX keep 1 MB of activations in it and
// more; the others touch the first 256 KB.
inline constexpr size_t kLinearScratch = 2 * 1024 * 1024;

// Scaled dot-product attention of `rows` query tokens of one sequence against a paged KV cache, for
// the query heads of one KV head. Token i attends the positions first_i..last_i (inclusive), where
// last_i = last + i (last if not causal), first_i = window > 0 ? max(0, last_i - window + 1) : 0.
struct AttentionArgs {
  const float* q;  // token i, head j (0..group_heads): q + i * q_stride + j * head_dim, rotated
  int64_t q_stride;
  const uint8_t* cache;        // of one layer and KV head: [block][block_bytes of the KV format]
  const int32_t* block_table;  // physical block of each logical block
  int64_t head_dim, group_heads;
  int64_t rows, last, window;
  float scale;
  float* out;  // as q, with out_stride
  int64_t out_stride;
  void* scratch;  // kAttentionScratch bytes, 64-byte aligned, private to the calling thread
  bool causal = true;
  float* earlier = nullptr;  // what `attend_partial` gave for the same queries over other tokens
};
inline constexpr size_t kAttentionScratch = 1024 * 1024;
inline constexpr int64_t kSegment = 512;  // tokens of one independent partial result
// Queries (rows x group_heads) of an attention that can be cut into segments.
inline constexpr int64_t kMaxSplitQueries = 16;
// Floats of the partial results of one segment.
inline constexpr int64_t partial_floats(int64_t head_dim) {
  return 4 * 16 + 2 * kMaxSplitQueries * (16 + (head_dim + 15) / 16 * 16);
}
// Floats of the partial results of `queries` queries that are not cut into segments.
inline constexpr int64_t whole_partial_floats(int64_t queries, int64_t head_dim) {
  return (queries + 24) * (16 + 16 + (head_dim + 15) / 16 * 16);
}

// Which blocks one query row is to attend, for the query heads of one KV head: the first `sinks`,
// the last `recent` and, of those between, the most important by their labels (ties: the lower).
// The importance of a block is the sum over the heads of its part in a softmax over all blocks, a
// block's score being the largest of its tokens' up to the row.
struct SelectArgs {
  const float* q;  // head j: q + j * head_dim, rotated
  int64_t head_dim, group_heads;
  float scale;                    // of the attention, > 0
  const uint8_t* labels;          // of one layer and KV head: [label block][label_bytes]
  const int32_t* label_table;     // physical label block of each kLabelTokens tokens
  const int32_t* channels;        // [count] of a key
  const float* channel_scales;    // [count], > 0
  int64_t count;                  // a multiple of 4, at most kMaxLabelChannels
  int64_t last;                   // the row's position; it has last / kBlock + 1 blocks
  int64_t sinks, recent, budget;  // blocks; sinks + recent <= budget
  int32_t* chosen;                // [min(budget, blocks)], ascending
  void* scratch;                  // select_scratch(group_heads, blocks) bytes, 64-byte aligned
};
inline constexpr size_t select_scratch(int64_t group_heads, int64_t blocks) {
  const int64_t row = (blocks + 15) / 16 * 64, head = row + kMaxLabelChannels + 8;
  return static_cast<size_t>(row + group_heads * head + 64);
}

// Merges a finished prompt of one layer and KV head (Elastic Cache): `keep` of its tokens stay, the
// others become part of one that does. The importance of a token is the sum of the softmax weights
// that the last `rows` tokens' queries give it. The first kMergeFirst tokens and the last
// kMergeLast stay as they are; so many of the most important between them (ties: the earlier) that
// `keep` stay, each becoming the mean of the keys and values of the tokens it is nearest to (ties:
// the earlier one).
struct MergeArgs {
  const float* q;  // token i of the last `rows`, head j: q + i * q_stride + j * head_dim, rotated
  int64_t q_stride, rows, head_dim, group_heads;
  float scale;
  const uint8_t* cache;        // of one layer and KV head: [block][block_bytes of the KV format]
  const int32_t* block_table;  // physical block of each logical block
  int64_t tokens;
  uint8_t* out;              // blocks of the same format, other ones
  const int32_t* out_table;  // for ceil(keep / kBlock) blocks
  int64_t keep;              // kMergeFirst + kMergeLast < keep <= tokens
  void* scratch;             // merge_scratch(tokens, head_dim) bytes, 64-byte aligned
};
inline constexpr int64_t kMergeFirst = 4, kMergeLast = 32;
inline constexpr int64_t kMergeQueries = 8;  // that walk the tokens together
inline constexpr size_t merge_scratch(int64_t tokens, int64_t head_dim) {
  const int64_t columns = (tokens + 15) / 16 * 16, pitch = (head_dim + 15) / 16 * 16;
  return static_cast<size_t>((pitch + kMergeQueries + 2) * columns + 4 * pitch) * sizeof(float);
}

struct KvKernels {
  // Writes one token's K and V (f32 `[head_dim]` of one head) into its block, lane 0..15.
  void (*store)(const float* k, const float* v, uint8_t* block, int64_t lane, int64_t head_dim);
  // Reads back what is stored of one token.
  void (*load)(const uint8_t* block, int64_t lane, float* k, float* v, int64_t head_dim);
  void (*attention)(const AttentionArgs&);
  // `attention` up to its partial results, for `earlier` of a call over the rest of the tokens:
  // whole_partial_floats(rows * group_heads, head_dim).
  void (*attend_partial)(const AttentionArgs&, float* partial);
  // `attention` in parts, for several threads: the segments [first, stop) of the sequence's tokens
  // into partials + segment * partial_floats(head_dim); when all are there, their sum.
  void (*attend_segments)(const AttentionArgs&, int64_t first, int64_t stop, float* partials);
  void (*merge_segments)(const AttentionArgs&, float* partials);
  // As `merge_segments`, but what they make together becomes the first, an `earlier`.
  void (*join_segments)(const AttentionArgs&, float* partials);
  void (*merge)(const MergeArgs&);
};

// What an ISA does with the KV cache; a translation unit of its own, since it shares no loop with
// the linear layers.
struct KvTable {
  KvKernels formats[kKvFormatCount];
  // Writes the label of one rotated key (f32 `[head_dim]`) as token 0..255 of its label block.
  void (*store_label)(const float* k, const int32_t* channels, const float* channel_scales,
                      int64_t count, uint8_t* label_block, int64_t token);
  int64_t (*select)(const SelectArgs&);  // how many were chosen: min(budget, blocks)
};

// Up to how many rows a product takes one way rather than the next; set at run time, atomically.
struct Switch {
  int* rows;             // 0..most
  int standard, on_amd;  // what it is before anything is set, elsewhere and on AMD's CPUs
  int most;              // what it may be
};

struct FormatKernels {
  void (*linear)(const LinearArgs&);
  // out[i, :k] = dequantized row ids[i] of w, `ldo` floats between rows.
  void (*gather_rows)(const PackedTensor& w, const int32_t* ids, int64_t count, float* out,
                      int64_t ldo);
  Switch gemv;          // beyond: gemm
  Switch cpu_prefetch;  // beyond: gemv prefetches by software
};

struct KernelTable {
  const char* isa;
  FormatKernels formats[kFormatCount];

  // Groups [group_begin, group_end) of row r of x (k floats) into dst; group = dst.group, or
  // 64 columns at a time when dst.group == 0. scale = max|x| / 127, q = round_even(x * (127 /
  // max|x|)).
  void (*quantize_row)(const float* x, int64_t k, const Rows& dst, int64_t r, int64_t group_begin,
                       int64_t group_end);
  float (*rms_scale)(const float* x, int64_t k, float eps);  // 1 / sqrt(mean(x^2) + eps)
  // y[i] = (x[i] * scale) * weight[i]
  void (*scale_mul)(const float* x, float scale, const float* weight, int64_t n, float* y);
  void (*add)(const float* x, int64_t n, float* y);  // y += x
  void (*scale)(float scale, int64_t n, float* y);   // y *= scale
  // n floats of `type` as f32, and back (nearest even).
  void (*widen)(Float type, const void* from, int64_t n, float* to);
  void (*narrow)(Float type, const float* from, int64_t n, void* to);
  void (*act_mul)(Activation act, const float* gate, const float* up, int64_t n, float* y);
  // Rotates the halves of one head in place: (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin).
  void (*rope)(float* x, const float* cos, const float* sin, int64_t head_dim);
  const KvTable* kv;
  // Reads `bytes` bytes and returns a checksum (bandwidth measurement).
  uint64_t (*read_stream)(const uint8_t* p, size_t bytes);
  // `turns` turns of nothing but the products that integer formats and float formats are made of,
  // on registers; return the operations done, 2 per product (measuring the peak).
  int64_t (*spin_int8)(int64_t turns);
  int64_t (*spin_float)(int64_t turns);
};

// What an ISA with tiles adds to a table: products that send many rows through them.
struct TileKernels {
  const char* isa;
  void (*linear[kFormatCount])(const LinearArgs&);
};

// What a format's header states about itself, independent of the ISA (core/formats.cpp).
struct FormatInfo {
  const char* name;
  int group;  // activation group; kRowGroup: the whole row; 0: float activations
  int64_t (*k_pad)(int64_t k);
  int parts;
  const char* part_names[kMaxParts];
  // Null if the parts hold a valid `[n, k]` tensor (sizes, and for sparse streams every record),
  // else a static message saying what is wrong.
  const char* (*validate)(const PackedTensor&);
};

extern const FormatInfo kFormatInfo[kFormatCount];

// Tables of the ISAs compiled in; dispatch.cpp decides which of them this CPU runs.
extern const KvTable kScalarKvTable;
extern const KvTable kAvx2KvTable;
extern const KvTable kAvx512KvTable;
extern const KernelTable kScalarTable;
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
extern const TileKernels kAmxTable;                // over kAvx512Table
extern const TileKernels kAmxEmulatedTable;        // software tiles, over kScalarTable
extern const TileKernels kAmxEmulatedAvx512Table;  // software tiles, over kAvx512Table

// Slowest first.
struct IsaStatus {
  const char* name;
  const KernelTable* table;
  const char* missing;  // null if usable, else the first missing feature
  bool emulated;        // for tests: runs everywhere, never chosen by itself
};
const IsaStatus* isa_status(int* count);

}  // namespace lacewing
