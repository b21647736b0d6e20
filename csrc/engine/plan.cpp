#include "engine/plan.h"

#include <algorithm>
#include <numeric>

namespace lacewing {
namespace {

// Rows of a tile: a whole number of the attention kernel's batches of 6 queries, about 48 queries.
int64_t tile_rows(int64_t group_heads) {
  const int64_t unit = 6 / std::gcd<int64_t, int64_t>(group_heads, 6);
  return unit * std::max<int64_t>(1, 48 / (unit * group_heads));
}

void add_tiles(Chunk& chunk, const StepInput& input, int64_t sequence, int64_t limit) {
  const int64_t first = std::max<int64_t>(input.cu_seqlens[sequence], chunk.begin);
  const int64_t last = std::min<int64_t>(input.cu_seqlens[sequence + 1], chunk.begin + chunk.rows);
  if (last - first > 1) chunk.decode = false;
  for (int64_t row = first; row < last; row += limit)
    chunk.tiles.push_back({row - chunk.begin, std::min(limit, last - row), sequence,
                           static_cast<int64_t>(input.positions[row])});
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

std::vector<Chunk> plan_chunks(const StepInput& input, const Spec& spec) {
  const int64_t limit = tile_rows(spec.group_heads());
  std::vector<Chunk> chunks;
  int64_t sequence = 0;
  for (int64_t begin = 0; begin < input.count; begin += kChunk) {
    Chunk chunk{begin, std::min(kChunk, input.count - begin), true, {}, {}};
    while (input.cu_seqlens[sequence + 1] <= begin) ++sequence;
    for (int64_t s = sequence; s < input.sequences && input.cu_seqlens[s] < begin + chunk.rows; ++s)
      add_tiles(chunk, input, s, limit);
    std::stable_sort(chunk.tiles.begin(), chunk.tiles.end(), [](const Tile& a, const Tile& b) {
      return a.position + a.rows > b.position + b.rows;
    });
    add_logits(chunk, input);
    chunks.push_back(std::move(chunk));
  }
  return chunks;
}

}  // namespace lacewing
