// KvCache: the keys and values of one layer of a PyTorch model, in the engine's codecs, and
// attention over them by the engine's kernels (src/lacewing/nn/cache.py).
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "api/check.h"
#include "api/module.h"
#include "api/workspace.h"
#include "core/memory.h"
#include "core/pool.h"
#include "ops/limits.h"

namespace lacewing {
namespace {

using Hyper = Array<float, 4>;
using Isa = std::optional<std::string>;

constexpr int64_t kMaxTokens = int64_t{1} << 30;
constexpr int64_t kFirstBlocks = 4;  // of a sequence, when its first token comes
constexpr int64_t kFewStores = 64;   // heads of tokens that wake no other thread

int64_t extent(const Hyper& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

// The blocks of a batch of sequences, per KV head: logical block j of sequence b is physical block
// j * batch + b, so that a longer batch needs more memory at the end alone.
class Blocks {
 public:
  Blocks(int64_t batch, int64_t heads, int64_t block_bytes)
      : batch_(batch), block_bytes_(block_bytes), heads_(static_cast<size_t>(heads)) {}

  int64_t batch() const { return batch_; }
  uint8_t* head(int64_t h) const { return heads_[static_cast<size_t>(h)].data(); }
  uint8_t* block(int64_t h, int64_t sequence, int64_t index) const {
    return head(h) + (index * batch_ + sequence) * block_bytes_;
  }
  const int32_t* table(int64_t sequence) const { return tables_.data() + sequence * capacity_; }
  int64_t bytes() const {
    return static_cast<int64_t>(heads_.size()) * capacity_ * batch_ * block_bytes_;
  }

  // Room for `blocks` of every sequence. Throws std::bad_alloc and leaves everything as it was.
  void grow(int64_t blocks) {
    if (blocks <= capacity_) return;
    const int64_t capacity = std::max({blocks, 2 * capacity_, kFirstBlocks});
    if (capacity > INT32_MAX / batch_) throw std::bad_alloc();
    std::vector<int32_t> tables(static_cast<size_t>(batch_ * capacity));
    for (int64_t i = 0; i < batch_ * capacity; ++i)
      tables[static_cast<size_t>(i)] = static_cast<int32_t>(i % capacity * batch_ + i / capacity);
    for (Memory& head : heads_) {
      Memory larger(static_cast<size_t>(capacity * batch_ * block_bytes_));
      if (head.size())
        std::memcpy(larger.data(), head.data(), std::min(head.size(), larger.size()));
      head = std::move(larger);
    }
    tables_ = std::move(tables);
    capacity_ = capacity;
  }

  // Copies of the sequences `rows`, their first `blocks`.
  Blocks select(const std::vector<int64_t>& rows, int64_t blocks) const {
    Blocks found(static_cast<int64_t>(rows.size()), static_cast<int64_t>(heads_.size()),
                 block_bytes_);
    found.grow(std::max(blocks, capacity_));
    for (int64_t h = 0; h < static_cast<int64_t>(heads_.size()); ++h)
      for (int64_t j = 0; j < blocks; ++j)
        for (int64_t b = 0; b < found.batch_; ++b)
          std::memcpy(found.block(h, b, j), block(h, rows[static_cast<size_t>(b)], j),
                      static_cast<size_t>(block_bytes_));
    return found;
  }

 private:
  int64_t batch_, block_bytes_, capacity_ = 0;
  std::vector<Memory> heads_;    // [heads][capacity][batch] blocks
  std::vector<int32_t> tables_;  // [batch][capacity]
};

// Rows of one sequence that attention takes together, and the pieces that its context is cut into.
struct Tile {
  int64_t sequence, row, rows;  // row: in the step
  int64_t position;             // of the first row, in the sequence
  int64_t segments, parts;
  int64_t partials;  // where the partial results are, in floats, by KV head; if parts > 1
};

struct Item {
  int64_t tile, kv_head, first, stop;
};

// How one call of `attend` is cut; `threads` decides that, never what is computed.
struct Plan {
  std::vector<Tile> tiles;
  std::vector<Item> items;
  int64_t partial_floats = 0;

  // About 96 queries, in whole batches of the kernel's 12.
  static int64_t tile_rows(int64_t group) {
    const int64_t unit = 12 / std::gcd<int64_t, int64_t>(group, 12);
    return unit * std::max<int64_t>(1, 96 / (unit * group));
  }

  void add(int64_t sequence, int64_t row, int64_t rows, int64_t position, int64_t group) {
    const int64_t step = tile_rows(group);
    for (int64_t at = 0; at < rows; at += step) {
      const int64_t some = std::min(step, rows - at);
      tiles.push_back({sequence, row + at, some, position + at,
                       (position + at + some - 1) / kSegment + 1, 1, 0});
    }
  }

  void cut(int64_t heads, int64_t group, int64_t head_dim, int threads) {
    std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) {
      return a.position + a.rows > b.position + b.rows;
    });
    const int64_t pieces = 8 * threads;
    const bool few = threads > 1 && static_cast<int64_t>(tiles.size()) * heads < pieces;
    int64_t segments = 0;
    for (const Tile& tile : tiles) segments += tile.segments * heads;
    const int64_t piece = std::max<int64_t>(1, segments / pieces);
    for (size_t t = 0; t < tiles.size(); ++t) {
      Tile& tile = tiles[t];
      if (few && tile.rows * group <= kMaxSplitQueries)
        tile.parts = (tile.segments + piece - 1) / piece;
      if (tile.parts > 1) {
        tile.partials = partial_floats;
        partial_floats += tile.segments * heads * lacewing::partial_floats(head_dim);
      }
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < tile.parts; ++i)
          items.push_back({static_cast<int64_t>(t), h, tile.segments * i / tile.parts,
                           tile.segments * (i + 1) / tile.parts});
    }
  }
};

class KvCache {
 public:
  KvCache(const std::string& kv, int64_t batch, int64_t heads, int64_t head_dim, const Isa& isa)
      : heads_(heads),
        head_dim_(head_dim),
        kernels_(checked(kv, batch, heads, head_dim, isa)),
        blocks_(batch, heads, kKvInfo[kv_index("KvCache", kv)].block_bytes(head_dim)),
        starts_(static_cast<size_t>(batch)) {}

  // Every verb lets go of the GIL before it takes the lock: who holds the lock never waits for it.
  void append(const Hyper& k, const Hyper& v, const Array<int32_t, 1>& starts, int threads) {
    const nb::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    require(shape_text(k) == shape_text(v),
            "KvCache.append: k and v must have the same shape, got " + shape_text(k) + " and " +
                shape_text(v));
    require(extent(k, 0) == batch() && extent(k, 2) == heads_ && extent(k, 3) == head_dim_ &&
                extent(k, 1) > 0,
            "KvCache.append: k must be [" + text(batch()) + ", tokens, " + text(heads_) + ", " +
                text(head_dim_) + "], got " + shape_text(k));
    check_threads("append", threads);
    require_range("KvCache.append: tokens in all", length_ + extent(k, 1), 1, kMaxTokens);
    const std::vector<int64_t> wanted = check_starts(starts);
    const int64_t n = extent(k, 1);
    blocks_.grow(blocks_for(length_ + n - *std::min_element(wanted.begin(), wanted.end())));
    starts_ = wanted;
    length_ += n;
    store(k.data(), v.data(), n, threads);
  }

  nb::object attend(const Hyper& q, float scale, int64_t window, int threads) {
    Buffer<float> y(q.size());
    {
      const nb::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      check_queries(q, window, threads);
      run(q, y.data.get(), scale, window, threads);
    }
    return nb::cast(y.numpy(extent(q, 0), extent(q, 1), extent(q, 2), extent(q, 3)));
  }

  void crop(int64_t length) {
    const nb::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    require_range("KvCache.crop: length", length, 0, length_);
    length_ = length;
  }

  void select(const Array<int64_t, 1>& rows) {
    const nb::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    require(rows.size() > 0, "KvCache.select: needs at least one sequence");
    std::vector<int64_t> wanted(rows.data(), rows.data() + rows.size());
    for (int64_t each : wanted) require_range("KvCache.select: sequence", each, 0, batch() - 1);
    int64_t most = 0;
    std::vector<int64_t> starts;
    for (int64_t each : wanted) {
      most = std::max(most, tokens(each));
      starts.push_back(starts_[static_cast<size_t>(each)]);
    }
    std::vector<int64_t> all(static_cast<size_t>(batch()));
    std::iota(all.begin(), all.end(), 0);
    if (wanted == all) return;
    blocks_ = blocks_.select(wanted, blocks_for(most));
    starts_ = std::move(starts);
  }

  int64_t length() const { return length_; }
  int64_t batch() const { return blocks_.batch(); }
  int64_t bytes() const { return blocks_.bytes(); }

 private:
  static int64_t blocks_for(int64_t tokens) { return (std::max<int64_t>(tokens, 0) + 15) / kBlock; }

  static const KvKernels& checked(const std::string& kv, int64_t batch, int64_t heads,
                                  int64_t head_dim, const Isa& isa) {
    require_range("KvCache: batch", batch, 1, 1 << 20);
    require_range("KvCache: n_kv_heads", heads, 1, 1 << 16);
    require_range("KvCache: head_dim", head_dim, 1, kMaxHeadDim);
    const KvKernels& kernels = table_of(isa).kv->formats[kv_index("KvCache", kv)];
    require(kernels.store != nullptr, "KvCache: kv must store token by token, got `" + kv + "`");
    return kernels;
  }

  static void check_threads(const char* verb, int threads) {
    require_range(std::string("KvCache.") + verb + ": threads", threads, 0, Pool::kMaxThreads);
  }

  void check_queries(const Hyper& q, int64_t window, int threads) const {
    require(extent(q, 0) == batch() && extent(q, 2) > 0 && extent(q, 2) % heads_ == 0 &&
                extent(q, 3) == head_dim_ && extent(q, 1) > 0 && extent(q, 1) <= length_,
            "KvCache.attend: q must be [" + text(batch()) + ", at most " + text(length_) +
                ", a multiple of " + text(heads_) + ", " + text(head_dim_) + "], got " +
                shape_text(q));
    require_range("KvCache.attend: window", window, 0, INT32_MAX);
    check_threads("attend", threads);
  }

  int64_t tokens(int64_t sequence) const {
    return std::max<int64_t>(0, length_ - starts_[static_cast<size_t>(sequence)]);
  }

  // Where each sequence begins; only one that has no token yet may begin elsewhere than before.
  std::vector<int64_t> check_starts(const Array<int32_t, 1>& starts) const {
    require(static_cast<int64_t>(starts.size()) == batch(),
            "KvCache.append: starts must be [" + text(batch()) + "], got " + shape_text(starts));
    std::vector<int64_t> wanted(starts.data(), starts.data() + starts.size());
    for (int64_t b = 0; b < batch(); ++b) {
      const int64_t start = wanted[static_cast<size_t>(b)];
      const bool moves = start != starts_[static_cast<size_t>(b)];
      require(start >= (moves ? length_ : 0) && start <= kMaxTokens && !(moves && tokens(b)),
              "KvCache.append: sequence " + text(b) + " began at " +
                  text(starts_[static_cast<size_t>(b)]) + ", not at " + text(start));
    }
    return wanted;
  }

  void store(const float* k, const float* v, int64_t n, int threads) {
    const int64_t count = batch() * n, first = length_ - n;
    const auto rows = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / n, at = first + i % n - starts_[static_cast<size_t>(b)];
        for (int64_t h = 0; at >= 0 && h < heads_; ++h) {
          const int64_t from = (i * heads_ + h) * head_dim_;
          kernels_.store(k + from, v + from, blocks_.block(h, b, at / kBlock), at % kBlock,
                         head_dim_);
        }
      }
    };
    if (count * heads_ <= kFewStores) return rows(0, count);
    Pool::instance().run(
        threads, [&](int tid, int total) { rows(count * tid / total, count * (tid + 1) / total); });
  }

  void run(const Hyper& q, float* y, float scale, int64_t window, int threads) {
    const int64_t n = extent(q, 1), width = extent(q, 2) * head_dim_;
    const int64_t group = extent(q, 2) / heads_;
    Plan plan;
    for (int64_t b = 0; b < batch(); ++b) {
      const int64_t rows = std::min(n, tokens(b)), padding = n - rows;
      std::fill_n(y + b * n * width, padding * width, 0.0f);
      plan.add(b, padding, rows, tokens(b) - rows, group);
    }
    const int used = Pool::instance().resolve(threads);
    plan.cut(heads_, group, head_dim_, used);
    const Memory partials(static_cast<size_t>(plan.partial_floats) * sizeof(float));
    uint8_t* scratch = scratch_space.take(static_cast<size_t>(used) * kAttentionScratch);
    const std::unique_ptr<std::atomic<int64_t>[]> done(
        new std::atomic<int64_t>[plan.tiles.size() * static_cast<size_t>(heads_)]());
    std::atomic<int64_t> taken{0};
    Pool::instance().run(used, [&](int tid, int) {
      for (size_t i; (i = static_cast<size_t>(taken.fetch_add(1))) < plan.items.size();) {
        const Item& item = plan.items[i];
        const Tile& tile = plan.tiles[static_cast<size_t>(item.tile)];
        const int64_t at =
            (tile.sequence * n + tile.row) * width + item.kv_head * group * head_dim_;
        AttentionArgs args{};
        args.q = q.data() + at;
        args.q_stride = args.out_stride = width;
        args.cache = blocks_.head(item.kv_head);
        args.block_table = blocks_.table(tile.sequence);
        args.head_dim = head_dim_;
        args.group_heads = group;
        args.rows = tile.rows;
        args.last = tile.position;
        args.window = window;
        args.scale = scale;
        args.out = y + at;
        args.scratch = scratch + static_cast<size_t>(tid) * kAttentionScratch;
        attend_item(args, item, tile, partials.as<float>(), done.get());
      }
    });
  }

  void attend_item(const AttentionArgs& args, const Item& item, const Tile& tile, float* partials,
                   std::atomic<int64_t>* done) const {
    if (tile.parts == 1) return kernels_.attention(args);
    float* mine = partials + tile.partials +
                  item.kv_head * tile.segments * lacewing::partial_floats(head_dim_);
    kernels_.attend_segments(args, item.first, item.stop, mine);
    std::atomic<int64_t>& parts = done[item.tile * heads_ + item.kv_head];
    if (parts.fetch_add(1, std::memory_order_acq_rel) + 1 == tile.parts)
      kernels_.merge_segments(args, mine);
  }

  const int64_t heads_, head_dim_;
  const KvKernels& kernels_;
  Blocks blocks_;
  std::vector<int64_t> starts_;  // [batch], the column of each sequence's first token
  int64_t length_ = 0;           // columns, padding included
  std::mutex mutex_;
};

}  // namespace

void register_cache(nb::module_& m) {
  nb::class_<KvCache>(m, "KvCache",
                      "The keys and values of one layer of a batch of sequences, and attention.")
      .def(nb::init<const std::string&, int64_t, int64_t, int64_t, const Isa&>(), nb::arg("kv"),
           nb::arg("batch"), nb::arg("n_kv_heads"), nb::arg("head_dim"),
           nb::arg("isa") = nb::none())
      .def("append", &KvCache::append, nb::arg("k"), nb::arg("v"), nb::arg("starts"),
           nb::arg("threads") = 0)
      .def("attend", &KvCache::attend, nb::arg("q"), nb::arg("scale"), nb::arg("window") = 0,
           nb::arg("threads") = 0)
      .def("crop", &KvCache::crop, nb::arg("length"))
      .def("select", &KvCache::select, nb::arg("rows"))
      .def_prop_ro("length", &KvCache::length)
      .def_prop_ro("batch", &KvCache::batch)
      .def_prop_ro("bytes", &KvCache::bytes);
}

}  // namespace lacewing
