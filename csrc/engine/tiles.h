// How attention of a step's rows is cut: a sequence's rows into tiles, tiles and KV heads into
// items for the threads.
#pragma once

#include <cstdint>
#include <vector>

namespace lacewing {

struct HeadShape {
  int64_t kv_heads, group_heads, head_dim;
};

// Where a row's keys and values go.
struct CacheRow {
  int64_t sequence, position;
};

// Consecutive rows of one sequence that attention takes together.
struct Tile {
  int64_t row, rows;
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

struct Tiles {
  std::vector<CacheRow> rows;
  std::vector<Tile> tiles;  // longest context first
  std::vector<Item> items;
  int64_t partial_floats = 0;
  // One item per row of every sequence: it can store its keys and attend at once.
  bool alone = true;

  // The next `count` rows, which follow `position` tokens of a sequence. `by_block`: tiles do not
  // cross a block of the cache.
  void add(int64_t sequence, int64_t count, int64_t position, const HeadShape& shape,
           bool by_block);
  // Makes the items once all rows are there. `threads` decides how the work is cut, never what is
  // computed.
  void cut(const HeadShape& shape, int threads);
};

}  // namespace lacewing
