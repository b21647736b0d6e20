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

// What one thread works in.
struct Space {
  Memory kernel{kAttentionScratch};
  AttendSpace attend;
};

// What a step works in; it stays with the calling thread, whose layers take turns.
struct Workplace {
  std::vector<Space> threads;
  Memory partials;

  void reserve(int count, size_t partial_bytes, size_t merge_bytes) {
    while (threads.size() < static_cast<size_t>(count)) threads.emplace_back();
    partials.reserve(partial_bytes);
    for (Space& space : threads) space.attend.merge.reserve(merge_bytes);
  }
};
thread_local Workplace workplace;

class KvCache {
 public:
  KvCache(const nb::dict& kv, int64_t kv_heads, int64_t head_dim,
          const std::optional<std::string>& isa)
      : kv_heads_(checked("n_kv_heads", kv_heads, 1 << 16)),
        head_dim_(checked("head_dim", head_dim, kMaxHeadDim)),
        table_(*table_of(isa).kv),
        cache_(read_layout("KvCache", kv, 1, kv_heads, head_dim), head_dim) {}

  // One with blocks of its own. Throws std::bad_alloc.
  KvCache* clone() const {
    const nb::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    return new KvCache(*this);
  }

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
  KvCache(const KvCache& other)
      : kv_heads_(other.kv_heads_),
        head_dim_(other.head_dim_),
        table_(other.table_),
        cache_(other.cache_) {}

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
    std::vector<Merge> merges;
    size_t merging = 0;
    for (int64_t b = 0; b < step.sequences; ++b) {
      const int64_t rows = step.cu_seqlens[b + 1] - step.cu_seqlens[b];
      tiles.add(b, rows, step.cached[b], shape, cache_.lists());
      if (step.kept(b) == 0) continue;
      merges.push_back(step.merge(b, 0));
      merging = std::max(merging, merge_scratch(merges.back().tokens, head_dim_));
    }
    tiles.cut(shape, threads);
    Workplace& place = workplace;  // of this thread, not of those that run
    place.reserve(threads, static_cast<size_t>(tiles.partial_floats) * sizeof(float), merging);
    const size_t pairs = tiles.tiles.size() * static_cast<size_t>(kv_heads_);
    const std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[pairs]());
    const int64_t merged = static_cast<int64_t>(merges.size()) * kv_heads_;
    std::atomic<int64_t> taken{0};
    Barrier barrier(threads, Pool::instance().may_spin(threads));
    Pool::instance().run(threads, [&](int tid, int n) {
      Space& space = place.threads[static_cast<size_t>(tid)];
      Attend attend(cache_, table_, shape, step, space.attend, space.kernel.data());
      attend.begin(tiles, place.partials.as<float>(), done.get());
      attend.run(
          at, taken, tid, n, [](int64_t, int64_t) {}, [](const Tile&, int64_t) {},
          [&] { barrier.wait(); });
      for (int64_t i = tid; i < merged; i += n)  // nobody reads merged blocks in this step
        attend.merge(at, merges[static_cast<size_t>(i / kv_heads_)], i % kv_heads_);
    });
  }

  const int64_t kv_heads_, head_dim_;
  const KvTable& table_;
  Cache cache_;
  mutable std::mutex mutex_;
};

}  // namespace

void register_cache(nb::module_& m) {
  nb::class_<KvCache>(m, "KvCache", "One layer's KV cache, paged, and its attention.")
      .def(nb::init<const nb::dict&, int64_t, int64_t, const std::optional<std::string>&>(),
           nb::arg("kv"), nb::arg("n_kv_heads"), nb::arg("head_dim"), nb::arg("isa") = nb::none())
      .def("clone", &KvCache::clone, nb::rv_policy::take_ownership)
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
