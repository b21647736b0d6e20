// How the tokens of a step are cut into chunks of rows, and each chunk's attention into items.
#pragma once

#include <vector>

#include "engine/model.h"

namespace lacewing {

// Consecutive rows of one sequence inside a chunk that attention takes together.
struct Tile {
  int64_t row, rows;  // in the chunk
  int64_t sequence;
  int64_t position;  // of the first row
};

// Rows of a chunk whose logits are wanted, with consecutive places in the output.
struct LogitRun {
  std::vector<int64_t> rows;  // in the chunk
  int64_t output;
};

struct Chunk {
  int64_t begin, rows;
  bool decode;  // no two rows of one sequence: each row can store its own keys and attend at once
  std::vector<Tile> tiles;  // longest context first
  std::vector<LogitRun> logits;
};

std::vector<Chunk> plan_chunks(const StepInput& input, const Spec& spec);

}  // namespace lacewing
