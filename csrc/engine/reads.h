// Which blocks the rows of one query block read, as attention wants them: block tables without
// holes, of the sealed blocks and of the growing ones.
#pragma once

#include <vector>

#include "engine/cache.h"

namespace lacewing {

// Physical blocks, in the order of the text.
struct BlockLists {
  const int32_t* sealed;
  int64_t sealed_count;
  const int32_t* growing;
  int64_t growing_count;
};

// Of a head that reads all blocks 0..i: pieces of its block tables.
BlockLists all_blocks(const KvHead& head, int64_t i, const int32_t* sealed_table,
                      const int32_t* growing_table);

struct Reads {
  std::vector<int32_t> blocks;  // logical, ascending: all that are read

  // The blocks that `span` lets query block i read.
  void choose(const KvSpan& span, int64_t i);
  // Where they are, by the block tables of the head's stores; until the next call.
  BlockLists place(const KvHead& head, int64_t i, const int32_t* sealed_table,
                   const int32_t* growing_table);

 private:
  std::vector<int32_t> sealed_, growing_;
};

}  // namespace lacewing
