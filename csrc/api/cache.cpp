// KvCache: one layer's KV cache and its attention, for models whose other layers run in PyTorch
// (src/lacewing/nn/cache.py). Block tables are the caller's, as in `Model`.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "api/check.h"
#include "api/layout.h"
#include "api/module.h"
#include "core/pool.h"
#include "engine/attend.h"
#include "ops/limits.h"

namespace lacewing {
namespace {

using Rows = Array<float, 3>;

int64_t extent(const Rows& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

// What threads work in; it stays with the calling thread, whose layers take turns.
struct Space {
  Memory kernel{kAttentionScratch};
  AttendSpace attend;
};
thread_local std::vector<Space> spaces;

class KvCache {
 public:
  KvCache(const nb::dict& kv, int64_t kv_heads, int64_t head_dim,
          const std::optional<std::string>& isa)
      : kv_heads_(checked("n_kv_heads", kv_heads, 1 << 16)),
        head_dim_(checked("head_dim", head_dim, kMaxHeadDim)),
        table_(*table_of(isa).kv),
        cache_(read_layout("KvCache", kv, 1, kv_heads, head_dim), head_dim) {}

  // Every verb lets go of the GIL before it takes the lock: who holds the lock never waits for it.
  void grow(const std::vector<int64_t>& blocks) {
    const nb::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    check_blocks("KvCache.grow", cache_.layout(), blocks);
    cache_.grow(blocks);
  }

  void copy(int64_t store, const Indices& from, const Indices& to) {
    const nb::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    const auto& stores = cache_.layout().stores;
    require_range("KvCache.copy: store", store, 0, static_cast<int64_t>(stores.size()) - 1);
    require(length(from) == length(to), "KvCache.copy: from and to must have the same length");
    const int64_t last = stores[static_cast<size_t>(store)].blocks - 1;
    for (const Indices* each : {&from, &to})
      for (int64_t i = 0; i < length(*each); ++i)
        require_range("KvCache.copy: block", each->data()[i], 0, last);
    for (int64_t i = 0; i < length(from); ++i)
      cache_.copy(static_cast<int>(store), from.data()[i], to.data()[i]);
  }

  nb::object step(const Rows& q, const std::optional<Rows>& k, const std::optional<Rows>& v,
                  float scale, int64_t window, const Indices& cached,
                  const Array<int32_t, 3>& block_tables, const Indices& cu_seqlens,
                  const std::optional<Indices>& keep,
                  const std::optional<Array<int32_t, 2>>& merged_tables, int threads) {
    Buffer<float> y(q.size());
    {
      const nb::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      const CacheArrays a{cached, block_tables, cu_seqlens, keep, merged_tables};
      check_rows(q, k, v);
      require(scale > 0 && std::isfinite(scale), "KvCache.step: scale must be positive, finite");
      require_range("KvCache.step: window", window, 0, INT32_MAX);
      require_range("KvCache.step: threads", threads, 0, Pool::kMaxThreads);
      require(window == 0 || !cache_.lists(),
              "KvCache.step: a layer with a window must read all of it");
      check_sequences("KvCache.step", a, extent(q, 0));
      check_cache("KvCache.step", a, cache_.layout(), window > 0);
      const int64_t q_stride = extent(q, 1) * head_dim_;
      const LayerRows at{0,
                         window,
                         scale,
                         q.data(),
                         q_stride,
                         k ? k->data() : nullptr,
                         v ? v->data() : nullptr,
                         kv_heads_ * head_dim_,
                         y.data.get(),
                         q_stride};
      run(a.view(), at, extent(q, 1) / kv_heads_, Pool::instance().resolve(threads));
    }
    return nb::cast(y.numpy(extent(q, 0), extent(q, 1), extent(q, 2)));
  }

  int64_t bytes() const { return cache_.bytes(); }

 private:
  static int64_t checked(const char* what, int64_t value, int64_t most) {
    require_range(std::string("KvCache: ") + what, value, 1, most);
    return value;
  }

  void check_rows(const Rows& q, const std::optional<Rows>& k, const std::optional<Rows>& v) const {
    require(extent(q, 1) > 0 && extent(q, 1) % kv_heads_ == 0 && extent(q, 2) == head_dim_,
            "KvCache.step: q must be [rows, a multiple of " + text(kv_heads_) + ", " +
                text(head_dim_) + "], got " + shape_text(q));
    require(k.has_value() == v.has_value(), "KvCache.step: k and v go together");
    for (const auto* each : {&k, &v})
      if (*each)
        require(extent(**each, 0) == extent(q, 0) && extent(**each, 1) == kv_heads_ &&
                    extent(**each, 2) == head_dim_,
                "KvCache.step: k and v must be [" + text(extent(q, 0)) + ", " + text(kv_heads_) +
                    ", " + text(head_dim_) + "], got " + shape_text(**each));
  }

  void run(const CacheStep& step, const LayerRows& at, int64_t group_heads, int threads) {
    const HeadShape shape{kv_heads_, group_heads, head_dim_};
    Tiles tiles;
    int64_t merged = 0;
    for (int64_t b = 0; b < step.sequences; ++b) {
      const int64_t rows = step.cu_seqlens[b + 1] - step.cu_seqlens[b];
      tiles.add(b, rows, step.cached[b], shape, cache_.lists());
      if (step.kept(b)) merged = std::max(merged, step.merge(b, 0).tokens);
    }
    tiles.cut(shape, threads);
    std::vector<Space>& mine = spaces;  // of this thread, not of those that run
    while (mine.size() < static_cast<size_t>(threads)) mine.emplace_back();
    const size_t merging = merged ? merge_scratch(merged, head_dim_) : 0;
    if (mine[0].attend.merge.size() < merging) mine[0].attend.merge = Memory(merging);
    const Memory partials(static_cast<size_t>(tiles.partial_floats) * sizeof(float));
    const size_t pairs = tiles.tiles.size() * static_cast<size_t>(kv_heads_);
    const std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[pairs]());
    std::atomic<int64_t> taken{0};
    Barrier barrier(threads, Pool::instance().may_spin(threads));
    Pool::instance().run(threads, [&](int tid, int n) {
      Space& space = mine[static_cast<size_t>(tid)];
      Attend attend(cache_, table_, shape, step, space.attend, space.kernel.data());
      attend.begin(tiles, partials.as<float>(), done.get());
      attend.run(
          at, taken, tid, n, [](int64_t, int64_t) {}, [](const Tile&, int64_t) {},
          [&] { barrier.wait(); });
    });
    if (merged) merge(step, at, shape, mine[0]);
  }

  void merge(const CacheStep& step, const LayerRows& at, const HeadShape& shape, Space& space) {
    Attend attend(cache_, table_, shape, step, space.attend, space.kernel.data());
    for (int64_t b = 0; b < step.sequences; ++b)
      for (int64_t h = 0; step.kept(b) && h < kv_heads_; ++h) attend.merge(at, step.merge(b, 0), h);
  }

  const int64_t kv_heads_, head_dim_;
  const KvTable& table_;
  Cache cache_;
  std::mutex mutex_;
};

}  // namespace

void register_cache(nb::module_& m) {
  nb::class_<KvCache>(m, "KvCache", "One layer's KV cache, paged, and its attention.")
      .def(nb::init<const nb::dict&, int64_t, int64_t, const std::optional<std::string>&>(),
           nb::arg("kv"), nb::arg("n_kv_heads"), nb::arg("head_dim"), nb::arg("isa") = nb::none())
      .def("grow", &KvCache::grow, nb::arg("blocks"))
      .def("copy", &KvCache::copy, nb::arg("store"), nb::arg("from_").noconvert(),
           nb::arg("to").noconvert())
      .def("step", &KvCache::step, nb::arg("q").noconvert(), nb::arg("k").noconvert().none(),
           nb::arg("v").noconvert().none(), nb::arg("scale"), nb::arg("window"),
           nb::arg("cached").noconvert(), nb::arg("block_tables").noconvert(),
           nb::arg("cu_seqlens").noconvert(), nb::arg("keep").noconvert() = nb::none(),
           nb::arg("merged_tables").noconvert() = nb::none(), nb::arg("threads") = 0)
      .def_prop_ro("bytes", &KvCache::bytes);
}

}  // namespace lacewing
