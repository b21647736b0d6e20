#include "engine/model.h"

#include <algorithm>
#include <utility>

#include "core/pool.h"
#include "core/rows.h"
#include "engine/forward.h"

namespace lacewing {
namespace {

constexpr int64_t kPrivateFloats = 4096;  // normalizing these costs about as much as a barrier
constexpr int64_t kTileCells = 4096;      // rows x strips of a tile: 256 KB each for gate and up

Memory floats(std::initializer_list<int64_t> shape) {
  return Memory(checked_product(shape) * sizeof(float));
}

}  // namespace

int64_t private_rows(const Spec& spec) {
  return std::clamp<int64_t>(kPrivateFloats / spec.hidden_size, 1, kRowBlock);
}

int64_t tile_strips(int64_t m) { return std::max<int64_t>(8, kTileCells / m / 8 * 8); }

void RowsMemory::reserve(const PackedTensor& w, int64_t m) {
  memory[grid_of(w)].reserve(rows_bytes(kFormatInfo[w.format], m, w.k));
}

Rows RowsMemory::place(const PackedTensor& w, int64_t m) const {
  return place_rows(kFormatInfo[w.format], m, w.k, memory[grid_of(w)].data());
}

Model::Model(Weights weights, KvLayout layout, const KernelTable& table, int threads)
    : weights_(std::move(weights)),
      table_(table),
      cache_(std::move(layout), weights_.spec.head_dim),
      thread_(static_cast<size_t>(Pool::instance().resolve(threads))) {
  reserve_shared();
  for (ThreadSpace& space : thread_) reserve_thread(space);
}

void Model::reserve_shared() {
  const Spec& s = weights_.spec;
  shared_.x = floats({kChunk, s.hidden_size});
  shared_.qkv = floats({kChunk, s.qkv_size()});
  shared_.attended = floats({kChunk, s.q_size()});
  if (s.sandwich_norm) shared_.projected = floats({kChunk, s.hidden_size});
  for (const Layer& layer : weights_.layers) {
    for (const Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.gate, &layer.up})
      shared_.hidden.reserve(linear->w, kChunk);
    shared_.heads.reserve(layer.o.w, kChunk);
    shared_.inner.reserve(layer.down.w, kChunk);
    if (slice_columns(layer.down.w) == 0 && shared_.activated.size() == 0)
      shared_.activated = floats({kChunk, s.intermediate_size});
  }
  shared_.hidden.reserve(weights_.head.w, kChunk);
}

void Model::reserve_thread(ThreadSpace& space) {
  const Spec& s = weights_.spec;
  space.kernel = Memory(std::max(kLinearScratch, kAttentionScratch));
  space.row = floats({s.hidden_size});
  const int64_t strips = (s.intermediate_size + kStrip - 1) / kStrip;
  int64_t cells = 0;
  for (int64_t m = 1; m <= kChunk; ++m)
    cells = std::max(cells, m * std::min(strips, tile_strips(m)));
  space.gate = floats({cells, kStrip});
  space.up = floats({cells, kStrip});
  const int64_t rows = private_rows(s);
  for (const Layer& layer : weights_.layers)
    for (const Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.gate, &layer.up})
      space.hidden.reserve(linear->w, rows);
  space.hidden.reserve(weights_.head.w, rows);
}

void Model::reserve_partials(int64_t floats) {
  shared_.partials.reserve(static_cast<size_t>(floats) * sizeof(float));
}

void Model::reserve_merge(int64_t tokens) {
  if (tokens == 0) return;
  const size_t bytes = merge_scratch(tokens, weights_.spec.head_dim);
  for (ThreadSpace& space : thread_) space.attend.merge.reserve(bytes);
}

void Model::step(const StepInput& input) {
  const std::lock_guard lock(stepping_);
  Forward forward(*this, input);
  Pool::instance().run(threads(), [&](int tid, int n) { forward.run(tid, n); });
}

}  // namespace lacewing
