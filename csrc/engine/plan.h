// How the tokens of a step are cut into chunks of rows, and each chunk's attention into items.
#pragma once

#include <vector>

#include "engine/model.h"

namespace lacewing {

// Consecutive rows of one sequence inside a chunk that attention takes together.
struct Tile {
  int64_t row, rows;  // in the chunk
  int64_t sequence;
  int64_t position;  // of the first row, in the cache
  int64_t parts;     // that its attention is cut into; 1: whole
  int64_t partials;  // cut: where its segments' partial results are, in floats, by KV head
  int64_t segments;  // of the sequence up to the last row
};

// What one thread does at a time: a tile's attention for one KV head, or some of its segments.
struct Item {
  int64_t tile, kv_head, first, stop;
};

// Rows of a chunk whose logits are wanted, with consecutive places in the output.
struct LogitRun {
  std::vector<int64_t> rows;  // in the chunk
  int64_t output;
};

// Where a row's keys and values go.
struct CacheRow {
  int64_t sequence, position;
};

// A sequence whose prompt ends in the chunk and is merged.
struct Merge {
  int64_t sequence;
  int64_t row;           // in the chunk, the first of its last kMergeRows
  int64_t tokens, keep;  // in the cache, before and after
};

struct Chunk {
  int64_t begin, rows;
  bool alone;  // one item per row of every sequence: it can store its keys and attend at once
  std::vector<CacheRow> cache_rows;  // of every row
  std::vector<Tile> tiles;           // longest context first
  std::vector<Item> items;
  int64_t partial_floats;
  std::vector<LogitRun> logits;
  std::vector<Merge> merges;
};

// `threads` decides how the work is cut, never what is computed. `by_block`: tiles do not cross a
// block of the cache.
std::vector<Chunk> plan_chunks(const StepInput& input, const Spec& spec, int threads,
                               bool by_block);

}  // namespace lacewing
