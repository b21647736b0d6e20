#include "engine/forward.h"

#include <algorithm>
#include <utility>

namespace lacewing {
namespace {

// Half-open range of row, strip, ... numbers.
struct Range {
  int64_t begin, end;
};

Range share(int64_t count, int tid, int n) { return {count * tid / n, count * (tid + 1) / n}; }

// Rows of one thread: whole blocks of interleaved rows where there are enough of them.
Range share_rows(int64_t m, int tid, int n) {
  if (m < 2 * kRowBlock * n) return share(m, tid, n);
  const Range blocks = share((m + kRowBlock - 1) / kRowBlock, tid, n);
  return {blocks.begin * kRowBlock, std::min(m, blocks.end * kRowBlock)};
}

size_t bytes_of(const PackedTensor& w) { return w.part_bytes[0] + w.part_bytes[1]; }

// One linear layer of a phase, with where its output goes.
struct Job {
  const Linear* linear;
  float* y;
  int64_t ldy;
};

// Part `tid` of `n` equal parts (by bytes) of the strips of all jobs in a row: calls
// f(job, strips) for what falls into it.
template <class F>
void split_jobs(std::initializer_list<Job> jobs, int tid, int n, F f) {
  double total = 0, before = 0;
  for (const Job& job : jobs) total += static_cast<double>(bytes_of(job.linear->w));
  for (const Job& job : jobs) {
    const int64_t strips = job.linear->w.strips();
    const double mine = static_cast<double>(bytes_of(job.linear->w));
    const auto cut = [&](int part) {  // first strip that belongs to `part` or a later one
      const double at = (total * part / n - before) / mine * static_cast<double>(strips);
      return std::clamp<int64_t>(static_cast<int64_t>(at + 0.5), 0, strips);
    };
    const Range range{tid == 0 ? 0 : cut(tid), tid == n - 1 ? strips : cut(tid + 1)};
    if (range.begin < range.end) f(job, range);
    before += mine;
  }
}

int64_t quantize_steps(const Rows& rows) {
  const int64_t step = rows.group ? rows.group : 64;
  return (rows.k_pad + step - 1) / step;
}

}  // namespace

class Forward::Worker {
 public:
  Worker(Forward& shared, int tid, int n)
      : f_(shared),
        model_(shared.model_),
        spec_(model_.weights_.spec),
        table_(model_.table_),
        space_(model_.thread_[static_cast<size_t>(tid)]),
        shape_(spec_.heads()),
        attend_(model_.cache_, *table_.kv, shape_, f_.input_.cache, space_.attend,
                space_.kernel.data()),
        tid_(tid),
        n_(n) {}

  void chunk(const Chunk& chunk, std::atomic<int64_t>* taken) {
    chunk_ = &chunk;
    m_ = chunk.rows;
    attend_.begin(chunk.tiles, model_.shared_.partials.as<float>(), f_.done_.get());
    embed();
    for (size_t i = 0; i < model_.weights_.layers.size(); ++i) layer(i, taken[i]);
    for (const LogitRun& run : chunk.logits) logits(run);
    meet();  // the next chunk overwrites x
  }

 private:
  // Normalized rows on the grids that the jobs of a phase want; `hidden` is where they are.
  struct Inputs {
    const RowsMemory* memory;
    int64_t m;
    Rows of(const Linear& linear) const { return memory->place(linear.w, m); }
  };

  void meet() { f_.barrier_.wait(); }
  float* x() { return model_.shared_.x.as<float>(); }
  float* qkv() { return model_.shared_.qkv.as<float>(); }

  void embed() {
    const PackedTensor& w = model_.weights_.embedding.w;
    const Range rows = share(m_, tid_, n_);
    float* begin = x() + rows.begin * spec_.hidden_size;
    const int64_t count = rows.end - rows.begin;
    table_.formats[w.format].gather_rows(w, f_.input_.tokens + chunk_->begin + rows.begin, count,
                                         begin, spec_.hidden_size);
    if (spec_.embedding_scale != 1.0f)
      table_.scale(spec_.embedding_scale, count * spec_.hidden_size, begin);
    meet();
  }

  void layer(size_t index, std::atomic<int64_t>& taken) {
    const Layer& w = model_.weights_.layers[index];
    const Spec& s = spec_;
    const Inputs in = normalize(m_, nullptr, w.input_norm, {&w.q, &w.k, &w.v});
    const int64_t ld = s.qkv_size();
    multiply(in, false,
             {{&w.q, qkv(), ld},
              {&w.k, qkv() + s.q_size(), ld},
              {&w.v, qkv() + s.q_size() + s.kv_size(), ld}});
    meet();
    const LayerRows at = rows_of(index, w);
    attention(w, at, taken);
    merge(index, at);
    project(w.o, model_.shared_.heads, w.post_attention_norm);
    const float* norm = s.sandwich_norm ? w.pre_feedforward_norm : w.post_attention_norm;
    gate_up(w, normalize(m_, nullptr, norm, {&w.gate, &w.up}));
    project(w.down, model_.shared_.inner, w.post_feedforward_norm);
  }

  // ---- norm and linear layers

  // RMS-normalized rows of x (rows[i], or all), on every grid the readers want. A few rows are
  // made by every thread for itself, which is cheaper than waiting for each other.
  Inputs normalize(int64_t m, const int64_t* rows, const float* norm,
                   std::initializer_list<const Linear*> readers) {
    const bool alone = m <= private_rows(spec_);
    const RowsMemory& memory = alone ? space_.hidden : model_.shared_.hidden;
    const Range mine = alone ? Range{0, m} : share_rows(m, tid_, n_);
    float* row = space_.row.as<float>();
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const float* from = x() + (rows ? rows[r] : r) * spec_.hidden_size;
      const float scale = table_.rms_scale(from, spec_.hidden_size, spec_.norm_eps);
      table_.scale_mul(from, scale, norm, spec_.hidden_size, row);
      quantize(row, r, m, memory, readers);
    }
    if (!alone) meet();
    return {&memory, m};
  }

  void quantize(const float* row, int64_t r, int64_t m, const RowsMemory& memory,
                std::initializer_list<const Linear*> readers) {
    bool done[kGrids] = {};
    for (const Linear* reader : readers) {
      if (std::exchange(done[grid_of(reader->w)], true)) continue;
      const Rows dst = memory.place(reader->w, m);
      table_.quantize_row(row, reader->w.k, dst, r, 0, quantize_steps(dst));
    }
  }

  void strips(const Job& job, const Rows& rows, bool accumulate, Range range) {
    const PackedTensor& w = job.linear->w;
    table_.formats[w.format].linear({&w, &rows, job.linear->bias, job.y, job.ldy, accumulate,
                                     range.begin, range.end, space_.kernel.data()});
  }

  void multiply(const Inputs& in, bool accumulate, std::initializer_list<Job> jobs) {
    split_jobs(jobs, tid_, n_, [&](const Job& job, Range range) {
      strips(job, in.of(*job.linear), accumulate, range);
    });
  }

  // x += linear(rows), or x += norm(linear(rows)) with sandwich_norm.
  void project(const Linear& linear, const RowsMemory& rows, const float* norm) {
    const Inputs in{&rows, m_};
    if (!spec_.sandwich_norm) {
      multiply(in, true, {{&linear, x(), spec_.hidden_size}});
      return meet();
    }
    float* y = model_.shared_.projected.as<float>();
    multiply(in, false, {{&linear, y, spec_.hidden_size}});
    meet();
    const Range mine = share_rows(m_, tid_, n_);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      float* row = y + r * spec_.hidden_size;
      const float scale = table_.rms_scale(row, spec_.hidden_size, spec_.norm_eps);
      table_.scale_mul(row, scale, norm, spec_.hidden_size, row);
      table_.add(row, spec_.hidden_size, x() + r * spec_.hidden_size);
    }
    meet();
  }

  // Gate, up, activation and quantization of this thread's columns, tile by tile. If down has one
  // scale per row, the columns are kept as floats until all threads have theirs.
  void gate_up(const Layer& w, const Inputs& in) {
    // 128 columns: whole groups of every grid.
    const Range units = share((w.gate.w.strips() + 7) / 8, tid_, n_);
    const int64_t end = std::min(units.end * 8, w.gate.w.strips());
    const int64_t step = tile_strips(m_);
    for (int64_t s = units.begin * 8; s < end; s += step)
      gate_up_tile(w, in, {s, std::min(s + step, end)});
    meet();
    if (slice_columns(w.down.w)) return;
    quantize_all(w.down, model_.shared_.activated.as<float>(), model_.shared_.inner);
  }

  // Rows of floats `[m, k]` as `reader` wants them.
  void quantize_all(const Linear& reader, const float* rows, const RowsMemory& memory) {
    const Rows dst = memory.place(reader.w, m_);
    const Range mine = share_rows(m_, tid_, n_);
    for (int64_t r = mine.begin; r < mine.end; ++r)
      table_.quantize_row(rows + r * reader.w.k, reader.w.k, dst, r, 0, quantize_steps(dst));
    meet();
  }

  void gate_up_tile(const Layer& w, const Inputs& in, Range range) {
    const int64_t ld = (range.end - range.begin) * kStrip, first = range.begin * kStrip;
    const int64_t columns = std::min(w.gate.w.n, range.end * kStrip) - first;
    // Kernels address outputs by their number: the tiles' column `first` is their column 0.
    float* gate = space_.gate.as<float>() - first;
    float* up = space_.up.as<float>() - first;
    strips({&w.gate, gate, ld}, in.of(w.gate), false, range);
    strips({&w.up, up, ld}, in.of(w.up), false, range);
    const Rows dst = model_.shared_.inner.place(w.down.w, m_);
    const int64_t group = slice_columns(w.down.w);
    for (int64_t r = 0; r < m_; ++r) {
      float* g = group ? gate + r * ld : model_.shared_.activated.as<float>() + r * w.down.w.k;
      table_.act_mul(spec_.activation, gate + r * ld + first, up + r * ld + first, columns,
                     g + first);
      if (group)
        table_.quantize_row(g, w.down.w.k, dst, r, first / group,
                            (first + columns + group - 1) / group);
    }
  }

  // ---- attention

  // One head of q or k, normalized and turned.
  void turn(float* head, const float* norm, const Rope& rope, int64_t position) {
    if (spec_.qk_norm) {
      const float scale = table_.rms_scale(head, spec_.head_dim, spec_.norm_eps);
      table_.scale_mul(head, scale, norm, spec_.head_dim, head);
    }
    const int64_t at = position * (spec_.head_dim / 2);
    table_.rope(head, rope.cos + at, rope.sin + at, spec_.head_dim);
  }

  // Turns the queries and the key of one KV head's group.
  void turn_head(const Layer& w, int64_t row, int64_t kv_head) {
    const Spec& s = spec_;
    const int64_t position = f_.input_.positions[chunk_->begin + row];
    const Rope& rope = model_.weights_.ropes[static_cast<size_t>(w.rope)];
    const int64_t group = shape_.group_heads;
    float* q = qkv() + row * s.qkv_size() + kv_head * group * s.head_dim;
    float* k = qkv() + row * s.qkv_size() + s.q_size() + kv_head * s.head_dim;
    for (int64_t j = 0; j < group; ++j) turn(q + j * s.head_dim, w.q_norm, rope, position);
    turn(k, w.k_norm, rope, position);
  }

  // The columns [begin, end) of attention's output as o_proj wants them.
  void quantize_heads(const Layer& w, int64_t row, int64_t begin, int64_t end) {
    const Rows dst = model_.shared_.heads.place(w.o.w, m_);
    const int64_t group = slice_columns(w.o.w);
    const float* from = model_.shared_.attended.as<float>() + row * spec_.q_size();
    table_.quantize_row(from, w.o.w.k, dst, row, begin / group, (end + group - 1) / group);
  }

  LayerRows rows_of(size_t layer, const Layer& w) {
    const Spec& s = spec_;
    const float* k = qkv() + s.q_size();
    return {static_cast<int64_t>(layer) * s.n_kv_heads,
            w.window,
            s.attention_scale,
            qkv(),
            s.qkv_size(),
            k,
            k + s.kv_size(),
            s.qkv_size(),
            model_.shared_.attended.as<float>(),
            s.q_size()};
  }

  void attention(const Layer& w, const LayerRows& at, std::atomic<int64_t>& taken) {
    const int64_t columns = shape_.group_heads * shape_.head_dim;
    const int64_t group = slice_columns(w.o.w);
    const bool whole_groups = group && columns % group == 0;
    attend_.run(
        at, taken, tid_, n_, [&](int64_t row, int64_t kv_head) { turn_head(w, row, kv_head); },
        [&](const Tile& tile, int64_t kv_head) {
          for (int64_t r = 0; whole_groups && r < tile.rows; ++r)
            quantize_heads(w, tile.row + r, kv_head * columns, (kv_head + 1) * columns);
        },
        [&] { meet(); });
    meet();
    if (whole_groups) return;
    quantize_all(w.o, model_.shared_.attended.as<float>(), model_.shared_.heads);
  }

  // Merges the prompts that end in the chunk, each KV head by one thread. The others go on: until
  // they have met again, nobody writes queries or blocks, and nobody reads the merged blocks in
  // this step.
  void merge(size_t layer, const LayerRows& at) {
    const int64_t heads = spec_.n_kv_heads;
    const int64_t count = static_cast<int64_t>(chunk_->merges.size()) * heads;
    for (int64_t i = (tid_ + static_cast<int64_t>(layer)) % n_; i < count; i += n_)
      attend_.merge(at, chunk_->merges[static_cast<size_t>(i / heads)], i % heads);
  }

  // ---- head

  void logits(const LogitRun& run) {
    const Linear& head = model_.weights_.head;
    const int64_t m = static_cast<int64_t>(run.rows.size());
    const Inputs in = normalize(m, run.rows.data(), model_.weights_.norm, {&head});
    float* y = f_.input_.logits + run.output * spec_.vocab_size;
    multiply(in, false, {{&head, y, spec_.vocab_size}});
    if (m > private_rows(spec_)) meet();  // the next run overwrites the rows
  }

  Forward& f_;
  Model& model_;
  const Spec& spec_;
  const KernelTable& table_;
  ThreadSpace& space_;
  const HeadShape shape_;
  Attend attend_;
  const int tid_, n_;
  const Chunk* chunk_ = nullptr;
  int64_t m_ = 0;
};

Forward::Forward(Model& model, const StepInput& input)
    : model_(model),
      input_(input),
      chunks_(plan_chunks(input, model.weights_.spec, model.threads(), model.cache_.lists())),
      taken_(new std::atomic<int64_t>[chunks_.size() * model.weights_.layers.size()]()),
      barrier_(Pool::instance().resolve(model.threads()),
               Pool::instance().may_spin(model.threads())) {
  int64_t pairs = 0, floats = 0, merged = 0;
  for (const Chunk& chunk : chunks_) {
    pairs = std::max(pairs, static_cast<int64_t>(chunk.tiles.tiles.size()));
    floats = std::max(floats, chunk.tiles.partial_floats);
    for (const Merge& merge : chunk.merges) merged = std::max(merged, merge.tokens);
  }
  done_.reset(
      new std::atomic<int64_t>[static_cast<size_t>(pairs * model.weights_.spec.n_kv_heads)]());
  model.reserve_partials(floats);
  model.reserve_merge(merged);
}

void Forward::run(int tid, int n) {
  Worker worker(*this, tid, n);
  for (size_t i = 0; i < chunks_.size(); ++i)
    worker.chunk(chunks_[i], taken_.get() + i * model_.weights_.layers.size());
}

}  // namespace lacewing
