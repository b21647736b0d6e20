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
        tid_(tid),
        n_(n) {}

  void chunk(const Chunk& chunk, std::atomic<int64_t>* taken) {
    chunk_ = &chunk;
    m_ = chunk.rows;
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
    attention(index, w, taken);
    merge(index);
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

  // ---- the cache

  const KvHead& head_of(size_t layer, int64_t kv_head) const {
    return model_.cache_.layout().heads[head_index(layer, kv_head)];
  }
  size_t head_index(size_t layer, int64_t kv_head) const {
    return layer * static_cast<size_t>(spec_.n_kv_heads) + static_cast<size_t>(kv_head);
  }
  const KvKernels& kernels_of(const KvPlace& place) const {
    return table_.kv->formats[model_.cache_.format(place)];
  }
  // The block with a position of a sequence.
  uint8_t* block_of(const KvPlace& place, const CacheRow& row, int64_t tokens = kBlock) const {
    const int32_t block = f_.input_.table(place.store, row.sequence)[row.position / tokens];
    return model_.cache_.blocks(place) + block * model_.cache_.block_bytes(place);
  }

  // Turns the queries and the key of one KV head's group and stores key and value.
  void prepare_head(size_t layer, const Layer& w, int64_t row, int64_t kv_head) {
    const Spec& s = spec_;
    const int64_t position = f_.input_.positions[chunk_->begin + row];
    const Rope& rope = model_.weights_.ropes[static_cast<size_t>(w.rope)];
    float* q = qkv() + row * s.qkv_size() + kv_head * s.group_heads() * s.head_dim;
    float* k = qkv() + row * s.qkv_size() + s.q_size() + kv_head * s.head_dim;
    for (int64_t j = 0; j < s.group_heads(); ++j)
      turn(q + j * s.head_dim, w.q_norm, rope, position);
    turn(k, w.k_norm, rope, position);
    const KvHead& head = head_of(layer, kv_head);
    const CacheRow& at = chunk_->cache_rows[static_cast<size_t>(row)];
    kernels_of(head.growing)
        .store(k, k + s.kv_size(), block_of(head.growing, at), at.position % kBlock, s.head_dim);
    if (head.labels) {
      const KvLayout& layout = model_.cache_.layout();
      const size_t first = head_index(layer, kv_head) * static_cast<size_t>(layout.channels);
      table_.kv->store_label(k, layout.label_channels.data() + first,
                             layout.label_scales.data() + first, layout.channels,
                             block_of(head.labels, at, kLabelTokens), at.position % kLabelTokens);
    }
  }

  // Seals the block that the row has filled.
  void seal_head(size_t layer, int64_t row, int64_t kv_head) {
    const KvHead& head = head_of(layer, kv_head);
    const CacheRow& at = chunk_->cache_rows[static_cast<size_t>(row)];
    if (head.sealed && at.position % kBlock == kBlock - 1)
      kernels_of(head.sealed)
          .seal(block_of(head.growing, at), block_of(head.sealed, at), spec_.head_dim);
  }

  // ---- what a row attends

  AttentionArgs attention_of(size_t layer, const Layer& w, const Tile& tile, int64_t kv_head) {
    const Spec& s = spec_;
    const int64_t column = kv_head * s.group_heads() * s.head_dim;
    const KvPlace& place = head_of(layer, kv_head).growing;
    float* out = model_.shared_.attended.as<float>() + tile.row * s.q_size() + column;
    return {qkv() + tile.row * s.qkv_size() + column,
            s.qkv_size(),
            model_.cache_.blocks(place),
            f_.input_.table(place.store, tile.sequence),
            s.head_dim,
            s.group_heads(),
            tile.rows,
            tile.position,
            w.window,
            s.attention_scale,
            out,
            s.q_size(),
            space_.kernel.data()};
  }

  // Whether the item's tile and head are complete with it: the last of its parts merges them.
  bool attend(size_t layer, const Layer& w, const Item& item) {
    const Tile& tile = chunk_->tiles[static_cast<size_t>(item.tile)];
    const KvHead& head = head_of(layer, item.kv_head);
    const AttentionArgs args = attention_of(layer, w, tile, item.kv_head);
    if (head.labels) {
      if (item.first == 0) attend_chosen(layer, head, args, tile, item.kv_head);
      return item.first == 0;
    }
    if (head.lists()) {
      space_.reads.choose(head.span, tile.position / kBlock);
      if (tile.parts == 1) {
        attend_reads(head, args, tile.sequence);
        return true;
      }
      return attend_part(head, args, item);
    }
    if (tile.parts == 1) {
      kernels_of(head.growing).attention(args);
      return true;
    }
    float* partials = partials_of(item);
    kernels_of(head.growing).attend_segments(args, item.first, item.stop, partials);
    if (!last_part(item)) return false;
    kernels_of(head.growing).merge_segments(args, partials);
    return true;
  }

  float* partials_of(const Item& item) const {
    const Tile& tile = chunk_->tiles[static_cast<size_t>(item.tile)];
    return model_.shared_.partials.as<float>() + tile.partials +
           item.kv_head * tile.segments * partial_floats(spec_.head_dim);
  }

  bool last_part(const Item& item) {
    const Tile& tile = chunk_->tiles[static_cast<size_t>(item.tile)];
    std::atomic<int64_t>& done =
        f_.done_[static_cast<size_t>(item.tile * spec_.n_kv_heads + item.kv_head)];
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < tile.parts) return false;
    done.store(0, std::memory_order_relaxed);  // for the next layer
    return true;
  }

  // The arguments for the sealed and the growing ones of the blocks in space_.reads.
  struct Listed {
    AttentionArgs sealed, growing;
    bool any_sealed;
  };
  Listed listed(const KvHead& head, const AttentionArgs& args, int64_t sequence) {
    Reads& reads = space_.reads;
    reads.place(head, args.last / kBlock,
                head.sealed ? f_.input_.table(head.sealed.store, sequence) : nullptr,
                f_.input_.table(head.growing.store, sequence));
    Listed found{args, args, !reads.sealed.empty()};
    found.growing.block_table = reads.growing.data();
    found.growing.last =
        (static_cast<int64_t>(reads.growing.size()) - 1) * kBlock + args.last % kBlock;
    if (found.any_sealed) {
      found.sealed.cache = model_.cache_.blocks(head.sealed);
      found.sealed.block_table = reads.sealed.data();
      found.sealed.last = static_cast<int64_t>(reads.sealed.size()) * kBlock - 1;
      found.sealed.causal = false;
    }
    return found;
  }

  // Rows of one query block against the blocks in space_.reads.
  void attend_reads(const KvHead& head, const AttentionArgs& args, int64_t sequence) {
    Listed to = listed(head, args, sequence);
    if (to.any_sealed) {
      const size_t bytes =
          static_cast<size_t>(whole_partial_floats(args.rows * args.group_heads, args.head_dim)) *
          sizeof(float);
      if (space_.partial.size() < bytes) space_.partial = Memory(bytes);
      to.growing.earlier = space_.partial.as<float>();
      kernels_of(head.sealed).attend_partial(to.sealed, to.growing.earlier);
    }
    kernels_of(head.growing).attention(to.growing);
  }

  // As `attend_reads`, in parts: of the sealed blocks, if there are any, else of the growing ones.
  bool attend_part(const KvHead& head, const AttentionArgs& args, const Item& item) {
    const Tile& tile = chunk_->tiles[static_cast<size_t>(item.tile)];
    Listed to = listed(head, args, tile.sequence);
    const AttentionArgs& main = to.any_sealed ? to.sealed : to.growing;
    const KvKernels& kernels = kernels_of(to.any_sealed ? head.sealed : head.growing);
    const int64_t segments = main.last / kSegment + 1;
    float* partials = partials_of(item);
    if (item.first < segments)
      kernels.attend_segments(main, item.first, std::min(item.stop, segments), partials);
    if (!last_part(item)) return false;
    if (!to.any_sealed) {
      kernels.merge_segments(main, partials);
      return true;
    }
    kernels.join_segments(main, partials);
    to.growing.earlier = partials;
    kernels_of(head.growing).attention(to.growing);
    return true;
  }

  // Every row against the blocks that its labels choose.
  void attend_chosen(size_t layer, const KvHead& head, AttentionArgs args, const Tile& tile,
                     int64_t kv_head) {
    const KvLayout& layout = model_.cache_.layout();
    const size_t first = head_index(layer, kv_head) * static_cast<size_t>(layout.channels);
    args.rows = 1;
    for (int64_t r = 0; r < tile.rows; ++r) {
      std::vector<int32_t>& blocks = space_.reads.blocks;
      const int64_t count = args.last / kBlock + 1, budget = topk_budget(count, layout.topk);
      blocks.resize(static_cast<size_t>(std::min(count, budget)));
      const size_t scratch = select_scratch(args.group_heads, count);
      if (space_.select.size() < scratch) space_.select = Memory(scratch);
      table_.kv->select(
          {args.q, args.head_dim, args.group_heads, args.scale, model_.cache_.blocks(head.labels),
           f_.input_.table(head.labels.store, tile.sequence), layout.label_channels.data() + first,
           layout.label_scales.data() + first, layout.channels, args.last, kTopkSinks, kTopkRecent,
           budget, blocks.data(), space_.select.data()});
      attend_reads(head, args, tile.sequence);
      args.q += args.q_stride;
      args.out += args.out_stride;
      ++args.last;
    }
  }

  // The columns [begin, end) of attention's output as o_proj wants them.
  void quantize_heads(const Layer& w, int64_t row, int64_t begin, int64_t end) {
    const Rows dst = model_.shared_.heads.place(w.o.w, m_);
    const int64_t group = slice_columns(w.o.w);
    const float* from = model_.shared_.attended.as<float>() + row * spec_.q_size();
    table_.quantize_row(from, w.o.w.k, dst, row, begin / group, (end + group - 1) / group);
  }

  void attention(size_t layer, const Layer& w, std::atomic<int64_t>& taken) {
    const Spec& s = spec_;
    const int64_t columns = s.group_heads() * s.head_dim;
    const int64_t group = slice_columns(w.o.w);
    const bool whole_groups = group && columns % group == 0;
    if (!chunk_->alone) {
      const Range mine = share(m_, tid_, n_);
      for (int64_t r = mine.begin; r < mine.end; ++r)
        for (int64_t h = 0; h < s.n_kv_heads; ++h) prepare_head(layer, w, r, h);
      meet();
      if (model_.cache_.seals()) {
        for (int64_t r = mine.begin; r < mine.end; ++r)
          for (int64_t h = 0; h < s.n_kv_heads; ++h) seal_head(layer, r, h);
        meet();
      }
    }
    const int64_t items = static_cast<int64_t>(chunk_->items.size());
    for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < items;) {
      const Item& item = chunk_->items[static_cast<size_t>(i)];
      const Tile& tile = chunk_->tiles[static_cast<size_t>(item.tile)];
      if (chunk_->alone) {
        prepare_head(layer, w, tile.row, item.kv_head);
        seal_head(layer, tile.row, item.kv_head);
      }
      const bool complete = attend(layer, w, item);
      for (int64_t r = 0; complete && whole_groups && r < tile.rows; ++r)
        quantize_heads(w, tile.row + r, item.kv_head * columns, (item.kv_head + 1) * columns);
    }
    meet();
    if (whole_groups) return;
    quantize_all(w.o, model_.shared_.attended.as<float>(), model_.shared_.heads);
  }

  // Merges the prompts that end in the chunk, each KV head by one thread. The others go on: until
  // they have met again, nobody writes queries or blocks, and nobody reads the merged blocks in
  // this step.
  void merge(size_t layer) {
    const int64_t heads = spec_.n_kv_heads;
    const int64_t count = static_cast<int64_t>(chunk_->merges.size()) * heads;
    for (int64_t i = (tid_ + static_cast<int64_t>(layer)) % n_; i < count; i += n_)
      merge_head(layer, chunk_->merges[static_cast<size_t>(i / heads)], i % heads);
  }

  void merge_head(size_t layer, const Merge& merge, int64_t kv_head) {
    const Spec& s = spec_;
    const KvPlace& place = head_of(layer, kv_head).growing;
    uint8_t* blocks = model_.cache_.blocks(place);
    kernels_of(place).merge(
        {qkv() + merge.row * s.qkv_size() + kv_head * s.group_heads() * s.head_dim, s.qkv_size(),
         kMergeRows, s.head_dim, s.group_heads(), s.attention_scale, blocks,
         f_.input_.table(place.store, merge.sequence), merge.tokens, blocks,
         f_.input_.merged_tables + merge.sequence * f_.input_.max_merged, merge.keep,
         space_.merge.data()});
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
    pairs = std::max(pairs, static_cast<int64_t>(chunk.tiles.size()));
    floats = std::max(floats, chunk.partial_floats);
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
