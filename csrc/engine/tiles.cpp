#include "engine/tiles.h"

#include <algorithm>
#include <numeric>

#include "core/kernels.h"

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

void cut_tiles(Tiles& all, const HeadShape& shape, int threads) {
  const int64_t pairs = static_cast<int64_t>(all.tiles.size()) * shape.kv_heads;
  if (threads == 1 || pairs >= kPieces * threads) return;
  int64_t segments = 0;
  for (const Tile& tile : all.tiles) segments += tile.segments * shape.kv_heads;
  const int64_t piece = std::max<int64_t>(1, segments / (kPieces * threads));
  for (Tile& tile : all.tiles) {
    if (tile.rows * shape.group_heads > kMaxSplitQueries) continue;
    tile.parts = (tile.segments + piece - 1) / piece;
    if (tile.parts == 1) continue;
    all.alone = false;
    tile.partials = all.partial_floats;
    all.partial_floats += tile.segments * shape.kv_heads * partial_floats(shape.head_dim);
  }
}

}  // namespace

void Tiles::add(int64_t sequence, int64_t count, int64_t position, const HeadShape& shape,
                bool by_block) {
  if (count > 1) alone = false;
  const int64_t limit = tile_rows(shape.group_heads);
  for (const int64_t end = position + count; position < end;) {
    int64_t some = std::min(limit, end - position);
    if (by_block) some = std::min(some, kBlock - position % kBlock);
    tiles.push_back({static_cast<int64_t>(rows.size()), some, sequence, position, 1, 0,
                     (position + some - 1) / kSegment + 1});
    for (; some > 0; --some) rows.push_back({sequence, position++});
  }
}

void Tiles::cut(const HeadShape& shape, int threads) {
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) {
    return a.position + a.rows > b.position + b.rows;
  });
  cut_tiles(*this, shape, threads);
  for (int64_t t = 0; t < static_cast<int64_t>(tiles.size()); ++t) {
    const Tile& tile = tiles[static_cast<size_t>(t)];
    for (int64_t h = 0; h < shape.kv_heads; ++h)
      for (int64_t i = 0; i < tile.parts; ++i)
        items.push_back(
            {t, h, tile.segments * i / tile.parts, tile.segments * (i + 1) / tile.parts});
  }
}

}  // namespace lacewing
