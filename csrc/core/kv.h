// KV cache formats as everything outside the kernels sees them: a name and a block's size.
#pragma once

#include <cstdint>

namespace lacewing {

// Every KV cache format: X(name, C++ codec in formats/kv*.h). One line registers one.
#define LACEWING_KV_FORMATS(X)   \
  X("f16", F16Kv)                \
  X("bf16", Bf16Kv)              \
  X("f32", F32Kv)                \
  X("int8", Int8Kv)              \
  X("int4", Int4Kv)              \
  X("int8_sp50", Int8Sparse<50>) \
  X("int8_sp70", Int8Sparse<70>)

#define LACEWING_COUNT(name, type) +1
inline constexpr int kKvFormatCount = 0 LACEWING_KV_FORMATS(LACEWING_COUNT);
#undef LACEWING_COUNT

inline constexpr int64_t kBlock = 16;  // tokens of one KV cache block

// Labels (Double Sparsity): some channels of every key as int8, to guess scores from. A label block
// holds those of 16 cache blocks of one head.
inline constexpr int64_t kLabelTokens = 16 * kBlock;
inline constexpr int64_t kMaxLabelChannels = 64;  // and a multiple of 4
inline constexpr int64_t label_bytes(int64_t channels) { return kLabelTokens * channels; }

struct KvInfo {
  const char* name;
  // Bytes of the keys and values of one block and one head; a multiple of 64.
  int64_t (*block_bytes)(int64_t head_dim);
  // The format whose full blocks are sealed into this one's; -1: tokens are stored one by one.
  int sealed_from;
};

extern const KvInfo kKvInfo[kKvFormatCount];

}  // namespace lacewing
