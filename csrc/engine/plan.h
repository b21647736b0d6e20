// How the tokens of a step are cut into chunks of rows.
#pragma once

#include <vector>

#include "engine/attend.h"
#include "engine/model.h"

namespace lacewing {

// Rows of a chunk whose logits are wanted, with consecutive places in the output.
struct LogitRun {
  std::vector<int64_t> rows;  // in the chunk
  int64_t output;
};

struct Chunk {
  int64_t begin, rows;
  Tiles tiles;
  std::vector<LogitRun> logits;
  std::vector<Merge> merges;
};

// `threads` and `by_block`: see `Tiles`.
std::vector<Chunk> plan_chunks(const StepInput& input, const Spec& spec, int threads,
                               bool by_block);

}  // namespace lacewing
