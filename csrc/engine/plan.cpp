#include "engine/plan.h"

#include <algorithm>
#include <numeric>

namespace lacewing {
namespace {

// Rows of a tile: a whole number of the attention kernel's batches of 12 queries, about 96 queries.
int64_t tile_rows(int64_t group_heads) {
  const int64_t unit = 12 / std::gcd<int64_t, int64_t>(group_heads, 12);
  return unit * std::max<int64_t>(1, 96 / (unit * group_heads));
}

// Too few tiles and heads for the threads: the long contexts are cut, in about `kPieces` pieces per
// thread, so that the threads end together.
constexpr int64_t kPieces = 8;

void cut_tiles(Chunk& chunk, const Spec& spec, int threads) {
  const int64_t pairs = static_cast<int64_t>(chunk.tiles.size()) * spec.n_kv_heads;
  if (threads == 1 || pairs >= kPieces * threads) return;
  int64_t segments = 0;
  for (const Tile& tile : chunk.tiles) segments += tile.segments * spec.n_kv_heads;
  const int64_t piece = std::max<int64_t>(1, segments / (kPieces * threads));
  for (Tile& tile : chunk.tiles) {
    if (tile.rows * spec.group_heads() > kMaxSplitQueries) continue;
    tile.parts = (tile.segments + piece - 1) / piece;
    if (tile.parts == 1) continue;
    chunk.alone = false;
    tile.partials = chunk.partial_floats;
    chunk.partial_floats += tile.segments * spec.n_kv_heads * partial_floats(spec.head_dim);
  }
}

void add_items(Chunk& chunk, const Spec& spec) {
  for (int64_t t = 0; t < static_cast<int64_t>(chunk.tiles.size()); ++t) {
    const Tile& tile = chunk.tiles[static_cast<size_t>(t)];
    for (int64_t h = 0; h < spec.n_kv_heads; ++h)
      for (int64_t i = 0; i < tile.parts; ++i)
        chunk.items.push_back(
            {t, h, tile.segments * i / tile.parts, tile.segments * (i + 1) / tile.parts});
  }
}

void add_tiles(Chunk& chunk, const StepInput& input, int64_t sequence, int64_t limit,
               bool by_block) {
  const int64_t first = std::max<int64_t>(input.cu_seqlens[sequence], chunk.begin);
  const int64_t last = std::min<int64_t>(input.cu_seqlens[sequence + 1], chunk.begin + chunk.rows);
  if (last - first > 1) chunk.alone = false;
  const int64_t shift = input.cached[sequence] - input.cu_seqlens[sequence];
  for (int64_t row = first; row < last; ++row) chunk.cache_rows.push_back({sequence, row + shift});
  for (int64_t row = first, rows; row < last; row += rows) {
    const int64_t position = row + shift;
    rows = std::min(limit, last - row);
    if (by_block) rows = std::min(rows, kBlock - position % kBlock);
    chunk.tiles.push_back(
        {row - chunk.begin, rows, sequence, position, 1, 0, (position + rows - 1) / kSegment + 1});
  }
}

// A chunk does not end among the rows whose queries a merge wants together.
int64_t chunk_rows(const StepInput& input, int64_t begin, int64_t sequence) {
  if (input.count - begin <= kChunk) return input.count - begin;
  const int64_t stop = begin + kChunk;
  while (input.cu_seqlens[sequence + 1] < stop) ++sequence;
  const int64_t end = input.cu_seqlens[sequence + 1];
  const bool cut = input.kept(sequence) > 0 && end > stop && end - kMergeRows < stop;
  return (cut ? end - kMergeRows : stop) - begin;
}

void add_merge(Chunk& chunk, const StepInput& input, int64_t sequence) {
  const int64_t begin = input.cu_seqlens[sequence], end = input.cu_seqlens[sequence + 1];
  if (input.kept(sequence) == 0 || end > chunk.begin + chunk.rows) return;
  chunk.merges.push_back({sequence, end - kMergeRows - chunk.begin,
                          input.cached[sequence] + end - begin, input.kept(sequence)});
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
  const int64_t limit = tile_rows(spec.group_heads());
  std::vector<Chunk> chunks;
  int64_t sequence = 0;
  for (int64_t begin = 0; begin < input.count; begin = chunks.back().begin + chunks.back().rows) {
    while (input.cu_seqlens[sequence + 1] <= begin) ++sequence;
    Chunk chunk{begin, chunk_rows(input, begin, sequence), true, {}, {}, {}, 0, {}, {}};
    for (int64_t s = sequence; s < input.sequences && input.cu_seqlens[s] < begin + chunk.rows;
         ++s) {
      add_tiles(chunk, input, s, limit, by_block);
      add_merge(chunk, input, s);
    }
    std::stable_sort(chunk.tiles.begin(), chunk.tiles.end(), [](const Tile& a, const Tile& b) {
      return a.position + a.rows > b.position + b.rows;
    });
    cut_tiles(chunk, spec, threads);
    add_items(chunk, spec);
    add_logits(chunk, input);
    chunks.push_back(std::move(chunk));
  }
  return chunks;
}

}  // namespace lacewing
