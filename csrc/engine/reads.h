// Which blocks the rows of one query block read, as attention wants them: block tables without
// holes, of the sealed blocks and of the growing ones.
#pragma once

#include <vector>

#include "engine/cache.h"

namespace lacewing {

struct Reads {
  std::vector<int32_t> blocks;           // logical, ascending: all that are read
  std::vector<int32_t> sealed, growing;  // physical, in the same order

  // The blocks that `span` lets query block i read.
  void choose(const KvSpan& span, int64_t i);
  // Where they are, by the block tables of the head's stores.
  void place(const KvHead& head, int64_t i, const int32_t* sealed_table,
             const int32_t* growing_table);
};

}  // namespace lacewing
