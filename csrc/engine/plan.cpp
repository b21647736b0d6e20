#include "engine/plan.h"

#include <algorithm>
#include <utility>

namespace lacewing {
namespace {

void add_rows(Chunk& chunk, const CacheStep& step, int64_t sequence, const Spec& spec,
              bool by_block) {
  const int64_t begin = step.cu_seqlens[sequence];
  const int64_t first = std::max(begin, chunk.begin);
  const int64_t last = std::min<int64_t>(step.cu_seqlens[sequence + 1], chunk.begin + chunk.rows);
  chunk.tiles.add(sequence, last - first, step.cached[sequence] + first - begin, spec.heads(),
                  by_block);
}

// A chunk does not end among the rows whose queries a merge wants together.
int64_t chunk_rows(const CacheStep& step, int64_t begin, int64_t sequence) {
  if (step.count - begin <= kChunk) return step.count - begin;
  const int64_t stop = begin + kChunk;
  while (step.cu_seqlens[sequence + 1] < stop) ++sequence;
  const int64_t end = step.cu_seqlens[sequence + 1];
  const bool cut = step.kept(sequence) > 0 && end > stop && end - kMergeRows < stop;
  return (cut ? end - kMergeRows : stop) - begin;
}

void add_merge(Chunk& chunk, const CacheStep& step, int64_t sequence) {
  const int64_t end = step.cu_seqlens[sequence + 1];
  if (step.kept(sequence) > 0 && end <= chunk.begin + chunk.rows)
    chunk.merges.push_back(step.merge(sequence, chunk.begin));
}

void add_logits(Chunk& chunk, const StepInput& input) {
  for (int64_t i = 0; i < input.logit_count; ++i) {
    const int64_t row = input.logit_rows[i] - chunk.begin;
    if (row < 0 || row >= chunk.rows) continue;
    const bool next =
        !chunk.logits.empty() && static_cast<int64_t>(chunk.logits.back().rows.size()) < kChunk &&
        chunk.logits.back().output + static_cast<int64_t>(chunk.logits.back().rows.size()) == i;
    if (!next) chunk.logits.push_back({{}, i});
    chunk.logits.back().rows.push_back(row);
  }
}

}  // namespace

std::vector<Chunk> plan_chunks(const StepInput& input, const Spec& spec, int threads,
                               bool by_block) {
  const CacheStep& step = input.cache;
  std::vector<Chunk> chunks;
  int64_t sequence = 0;
  for (int64_t begin = 0; begin < step.count; begin = chunks.back().begin + chunks.back().rows) {
    while (step.cu_seqlens[sequence + 1] <= begin) ++sequence;
    Chunk chunk{begin, chunk_rows(step, begin, sequence), {}, {}, {}};
    for (int64_t s = sequence; s < step.sequences && step.cu_seqlens[s] < begin + chunk.rows; ++s) {
      add_rows(chunk, step, s, spec, by_block);
      add_merge(chunk, step, s);
    }
    chunk.tiles.cut(spec.heads(), threads);
    add_logits(chunk, input);
    chunks.push_back(std::move(chunk));
  }
  return chunks;
}

}  // namespace lacewing
