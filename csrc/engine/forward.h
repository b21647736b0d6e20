// One step: every thread runs the whole forward pass on its share, meeting the others at barriers.
#pragma once

#include <atomic>
#include <initializer_list>
#include <memory>

#include "core/pool.h"
#include "engine/plan.h"

namespace lacewing {

// Shared by the threads of one run. `Worker` is what one of them sees.
class Forward {
 public:
  Forward(Model& model, const StepInput& input);
  void run(int tid, int n);

 private:
  class Worker;

  Model& model_;
  const StepInput& input_;
  std::vector<Chunk> chunks_;
  std::unique_ptr<std::atomic<int64_t>[]> taken_;  // attention items, by chunk and layer
  std::unique_ptr<std::atomic<int64_t>[]> done_;   // parts done of a tile and KV head
  Barrier barrier_;
};

}  // namespace lacewing
