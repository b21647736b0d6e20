// Attention that reads some of the cache: blocks chosen by labels, prompts merged. One call for
// tests, and timed for benchmarks.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "api/check.h"
#include "api/module.h"
#include "core/draw.h"
#include "core/memory.h"
#include "core/pool.h"
#include "ops/limits.h"

namespace lacewing {
namespace {

using Isa = std::optional<std::string>;

template <class A>
int64_t extent(const A& array, size_t axis) {
  return static_cast<int64_t>(array.shape(axis));
}

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to; }

int growing_index(const std::string& where, const std::string& kv) {
  const int format = kv_index(where, kv);
  require(kKvInfo[format].sealed_from < 0,
          where + ": kv must store token by token, got `" + kv + "`");
  return format;
}

void check_channels(const std::string& where, int64_t count, int64_t head_dim) {
  require_range(where + ": head_dim", head_dim, 1, kMaxHeadDim);
  require(count > 0 && count % 4 == 0 && count <= kMaxLabelChannels,
          where + ": channels must be a multiple of 4, at most " + text(kMaxLabelChannels) +
              ", got " + text(count));
}

void check_blocks(const std::string& where, const Array<int32_t, 1>& table, int64_t least) {
  require(extent(table, 0) >= least,
          where + " must have at least " + text(least) + " values, got " + text(extent(table, 0)));
  for (size_t i = 0; i < table.size(); ++i) require_range(where, table.data()[i], 0, 1 << 16);
}

int64_t highest(const Array<int32_t, 1>& table) {
  int32_t highest = 0;
  for (size_t i = 0; i < table.size(); ++i) highest = std::max(highest, table.data()[i]);
  return highest;
}

// ---- one call, for tests

nb::object select_blocks(const Array<float, 2>& q, const Array<float, 2>& k,
                         const Array<int32_t, 1>& label_table, const Array<int32_t, 1>& channels,
                         const Array<float, 1>& scales, float scale, int64_t last, int64_t sinks,
                         int64_t recent, int64_t budget, const Isa& isa) {
  const int64_t tokens = extent(k, 0), d = extent(k, 1), count = extent(channels, 0);
  check_channels("select_blocks", count, d);
  require(extent(q, 0) > 0 && extent(q, 1) == d,
          "select_blocks: q must be [heads, " + text(d) + "], got " + shape_text(q));
  for (size_t i = 0; i < channels.size(); ++i)
    require_range("select_blocks: channels", channels.data()[i], 0, d - 1);
  require(extent(scales, 0) == count, "select_blocks: scales must have " + text(count) +
                                          " values, got " + text(extent(scales, 0)));
  require_range("select_blocks: last", last, 0, tokens - 1);
  check_blocks("select_blocks: label_table", label_table, up(tokens, kLabelTokens));
  require_range("select_blocks: budget", budget, 1, INT32_MAX);
  require_range("select_blocks: sinks", sinks, 0, budget);
  require_range("select_blocks: recent", recent, 0, budget - sinks);
  const KvTable& table = *table_of(isa).kv;

  const int64_t bytes = label_bytes(count), blocks = last / kBlock + 1;
  const Memory labels(static_cast<size_t>((highest(label_table) + 1) * bytes));
  std::memset(labels.data(), 255, labels.size());  // what is not stored must not matter
  for (int64_t t = 0; t < tokens; ++t)
    table.store_label(k.data() + t * d, channels.data(), scales.data(), count,
                      labels.data() + label_table.data()[t / kLabelTokens] * bytes,
                      t % kLabelTokens);
  const Memory scratch(select_scratch(extent(q, 0), blocks));
  const int64_t chosen = std::min(budget, blocks);
  Buffer<int32_t> found(static_cast<size_t>(chosen));
  const int64_t n = table.select({q.data(), d, extent(q, 0), scale, labels.data(),
                                  label_table.data(), channels.data(), scales.data(), count, last,
                                  sinks, recent, budget, found.data.get(), scratch.data()});
  return nb::cast(found.numpy(n));
}

nb::object merge(const Array<float, 3>& q, const Array<float, 2>& k, const Array<float, 2>& v,
                 const Array<int32_t, 1>& block_table, const Array<int32_t, 1>& out_table,
                 float scale, int64_t keep, const std::string& kv, const Isa& isa) {
  const int64_t tokens = extent(k, 0), d = extent(k, 1);
  require_range("merge: head_dim", d, 1, kMaxHeadDim);
  require(shape_text(k) == shape_text(v), "merge: k and v must have the same shape, got " +
                                              shape_text(k) + " and " + shape_text(v));
  require(q.size() > 0 && extent(q, 0) <= tokens && extent(q, 2) == d,
          "merge: q must be [at most tokens, heads, head_dim] for k " + shape_text(k) + ", got " +
              shape_text(q));
  require_range("merge: keep", keep, kMergeFirst + kMergeLast + 1, tokens);
  check_blocks("merge: block_table", block_table, up(tokens, kBlock));
  check_blocks("merge: out_table", out_table, up(keep, kBlock));
  const int format = growing_index("merge", kv);
  const KvKernels& kernels = table_of(isa).kv->formats[format];

  const int64_t bytes = kKvInfo[format].block_bytes(d);
  const Memory cache(static_cast<size_t>((highest(block_table) + 1) * bytes));
  const Memory out(static_cast<size_t>((highest(out_table) + 1) * bytes));
  const Memory scratch(merge_scratch(tokens, d));
  for (int64_t t = 0; t < tokens; ++t)
    kernels.store(k.data() + t * d, v.data() + t * d,
                  cache.data() + block_table.data()[t / kBlock] * bytes, t % kBlock, d);
  kernels.merge({q.data(), extent(q, 1) * d, extent(q, 0), d, extent(q, 1), scale, cache.data(),
                 block_table.data(), tokens, out.data(), out_table.data(), keep, scratch.data()});
  Buffer<float> found(static_cast<size_t>(2 * keep * d));
  for (int64_t t = 0; t < keep; ++t)
    kernels.load(out.data() + out_table.data()[t / kBlock] * bytes, t % kBlock,
                 found.data.get() + t * d, found.data.get() + (keep + t) * d, d);
  return nb::cast(found.numpy(2, keep, d));
}

// ---- timed, for benchmarks

class Topk {
 public:
  Topk(const KernelTable& table, int kv, int64_t layers, int64_t kv_heads, int64_t group,
       int64_t head_dim, int64_t tokens, int64_t count, int64_t budget, int threads)
      : table_(*table.kv),
        kernels_(table.kv->formats[kv]),
        heads_(layers * kv_heads),
        group_(group),
        head_dim_(head_dim),
        tokens_(tokens),
        blocks_(up(tokens, kBlock)),
        budget_(std::min(budget, blocks_)),
        count_(count),
        threads_(threads),
        block_bytes_(kKvInfo[kv].block_bytes(head_dim)),
        cache_(static_cast<size_t>(heads_ * blocks_ * block_bytes_)),
        labels_(static_cast<size_t>(heads_ * label_blocks() * label_bytes(count))) {
    const auto size = static_cast<size_t>(heads_ * group * head_dim);
    q_.resize(size), out_.resize(size);
    chosen_.resize(static_cast<size_t>(heads_ * budget_));
    for (int32_t b = 0; b < blocks_; ++b) block_table_.push_back(b);
    for (int32_t c = 0; c < count; ++c)
      channels_.push_back(static_cast<int32_t>(c * head_dim / count));
    scales_.assign(channels_.size(), 1.0f / 127);
    for (int i = 0; i < Pool::instance().resolve(threads); ++i)
      scratch_.emplace_back(std::max(kAttentionScratch, select_scratch(group, blocks_)));
    fill();
  }

  int64_t label_read() const { return heads_ * label_blocks() * label_bytes(count_); }
  int64_t cache_read() const { return heads_ * budget_ * block_bytes_; }

  // Seconds of one pass over all heads.
  double pass(bool select, bool attend) {
    std::atomic<int64_t> taken{0};
    const auto begin = std::chrono::steady_clock::now();
    Pool::instance().run(threads_, [&](int tid, int) {
      void* scratch = scratch_[static_cast<size_t>(tid)].data();
      for (int64_t i; (i = taken.fetch_add(1)) < heads_;) {
        if (select) choose(i, scratch);
        if (attend) attend_chosen(i, scratch);
      }
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

 private:
  int64_t label_blocks() const { return up(tokens_, kLabelTokens); }
  uint8_t* cache_of(int64_t i) const { return cache_.data() + i * blocks_ * block_bytes_; }
  uint8_t* labels_of(int64_t i) const {
    return labels_.data() + i * label_blocks() * label_bytes(count_);
  }

  // One head of numbers in -1..1; copies for the others. Every head has its own queries.
  void fill() {
    Draw draw;
    std::vector<float> k(static_cast<size_t>(head_dim_)), v(k.size());
    for (float& x : q_) x = draw.next();
    for (int64_t t = 0; t < tokens_; ++t) {
      for (float& x : k) x = draw.next();
      for (float& x : v) x = draw.next();
      kernels_.store(k.data(), v.data(), cache_of(0) + t / kBlock * block_bytes_, t % kBlock,
                     head_dim_);
      table_.store_label(k.data(), channels_.data(), scales_.data(), count_,
                         labels_of(0) + t / kLabelTokens * label_bytes(count_), t % kLabelTokens);
    }
    for (int64_t i = 1; i < heads_; ++i) {
      std::memcpy(cache_of(i), cache_of(0), static_cast<size_t>(cache_of(1) - cache_of(0)));
      std::memcpy(labels_of(i), labels_of(0), static_cast<size_t>(labels_of(1) - labels_of(0)));
    }
  }

  float scale() const { return 1 / std::sqrt(static_cast<float>(head_dim_)); }
  int32_t* chosen_of(int64_t i) { return chosen_.data() + i * budget_; }

  void choose(int64_t i, void* scratch) {
    table_.select({q_.data() + i * group_ * head_dim_, head_dim_, group_, scale(), labels_of(i),
                   block_table_.data(), channels_.data(), scales_.data(), count_, tokens_ - 1, 1, 4,
                   budget_, chosen_of(i), scratch});
  }

  // The chosen blocks are a short sequence of their own.
  void attend_chosen(int64_t i, void* scratch) {
    const int64_t at = i * group_ * head_dim_, width = group_ * head_dim_;
    kernels_.attention({q_.data() + at, width, cache_of(i), chosen_of(i), head_dim_, group_, 1,
                        (budget_ - 1) * kBlock + (tokens_ - 1) % kBlock, 0, scale(),
                        out_.data() + at, width, scratch});
  }

  const KvTable& table_;
  const KvKernels& kernels_;
  const int64_t heads_, group_, head_dim_, tokens_, blocks_, budget_, count_;
  const int threads_;
  const int64_t block_bytes_;
  Memory cache_, labels_;
  std::vector<Memory> scratch_;
  std::vector<float> q_, out_, scales_;
  std::vector<int32_t> block_table_, channels_, chosen_;
};

nb::object time_topk(const std::string& kv, int64_t layers, int64_t kv_heads, int64_t group,
                     int64_t head_dim, int64_t tokens, int64_t channels, double fraction,
                     int passes, int threads, const Isa& isa) {
  const int format = growing_index("time_topk", kv);
  for (int64_t size : {layers, kv_heads, group, tokens})
    require_range("time_topk: sizes", size, 1, 1 << 20);
  check_channels("time_topk", channels, head_dim);
  require(channels <= head_dim, "time_topk: channels must be at most head_dim " + text(head_dim) +
                                    ", got " + text(channels));
  require(fraction > 0 && fraction <= 1, "time_topk: fraction must be in 0..1, above 0");
  require_range("time_topk: passes", passes, 1, 1000);
  require_range("time_topk: threads", threads, 0, Pool::kMaxThreads);
  const auto share =
      static_cast<int64_t>(std::ceil(fraction * static_cast<double>(up(tokens, kBlock))));
  const KernelTable& table = table_of(isa);
  std::vector<double> seconds[3];
  int64_t bytes[2];
  {
    nb::gil_scoped_release release;
    Topk topk(table, format, layers, kv_heads, group, head_dim, tokens, channels,
              std::max<int64_t>(share, 32), threads);
    topk.pass(true, true);
    for (int i = 0; i < passes; ++i) {
      seconds[0].push_back(topk.pass(true, true));
      seconds[1].push_back(topk.pass(true, false));
      seconds[2].push_back(topk.pass(false, true));
    }
    bytes[0] = topk.label_read(), bytes[1] = topk.cache_read();
  }
  nb::list found[3];
  for (int i = 0; i < 3; ++i)
    for (double each : seconds[i]) found[i].append(each);
  return nb::make_tuple(found[0], found[1], found[2], bytes[0], bytes[1]);
}

}  // namespace

void register_select(nb::module_& m) {
  m.def("select_blocks", &select_blocks, nb::arg("q"), nb::arg("k"), nb::arg("label_table"),
        nb::arg("channels"), nb::arg("scales"), nb::arg("scale"), nb::arg("last"), nb::arg("sinks"),
        nb::arg("recent"), nb::arg("budget"), nb::arg("isa") = nb::none(),
        "Blocks that one row's heads of one KV head would attend, chosen by labels of the keys.");
  m.def("merge", &merge, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("block_table"),
        nb::arg("out_table"), nb::arg("scale"), nb::arg("keep"), nb::arg("kv") = "f16",
        nb::arg("isa") = nb::none(), "Keys and values of a prompt merged to `keep` tokens.");
  m.def("time_topk", &time_topk, nb::arg("kv"), nb::arg("layers"), nb::arg("kv_heads"),
        nb::arg("group"), nb::arg("head_dim"), nb::arg("tokens"), nb::arg("channels"),
        nb::arg("fraction"), nb::arg("passes") = 5, nb::arg("threads") = 0,
        nb::arg("isa") = nb::none(),
        "Seconds of every pass of choosing and attending, of either alone, and what they read.");
}

}  // namespace lacewing
