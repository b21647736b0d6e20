// Attention by itself, through a paged KV cache: for tests, and timed for benchmarks.
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
#include "engine/cache.h"
#include "ops/limits.h"

namespace lacewing {

int kv_index(const std::string& where, const std::string& name) {
  std::string known;
  for (int i = 0; i < kKvFormatCount; ++i) {
    if (name == kKvInfo[i].name) return i;
    known += (i ? ", `" : "`") + std::string(kKvInfo[i].name) + "`";
  }
  throw nb::value_error((where + ": kv must be one of " + known + ", got `" + name + "`").c_str());
}

namespace {

using Isa = std::optional<std::string>;
using Cube = Array<float, 3>;

template <class A>
int64_t extent(const A& array, size_t axis) {
  return static_cast<int64_t>(array.shape(axis));
}

// ---- one call, for tests

// Stores tokens into a block of any format: of a sealed one, by way of a block of what it is sealed
// from.
struct BlockWriter {
  const KvKernels& kernels;
  const KvKernels& growing;
  int64_t head_dim;
  std::vector<uint8_t> grown;  // empty if tokens are stored at once

  BlockWriter(const KernelTable& table, int kv, int64_t head_dim_)
      : kernels(table.kv->formats[kv]),
        growing(table.kv->formats[kKvInfo[kv].sealed_from < 0 ? kv : kKvInfo[kv].sealed_from]),
        head_dim(head_dim_) {
    const int from = kKvInfo[kv].sealed_from;
    if (from >= 0) grown.resize(static_cast<size_t>(kKvInfo[from].block_bytes(head_dim)));
  }

  void store(const float* k, const float* v, uint8_t* block, int64_t lane) {
    growing.store(k, v, grown.empty() ? block : grown.data(), lane, head_dim);
    if (!grown.empty() && lane == kBlock - 1) kernels.seal(grown.data(), block, head_dim);
  }
};

// The cache of one layer filled with k and v `[tokens, n_kv_heads, head_dim]` through a table.
struct TestCache {
  int64_t block_bytes, head_bytes;
  Memory memory;

  TestCache(const KernelTable& table, int kv, const Cube& k, const Cube& v,
            const Array<int32_t, 1>& blocks) {
    const int64_t heads = extent(k, 1), d = extent(k, 2);
    int32_t last = 0;
    for (size_t i = 0; i < blocks.size(); ++i) last = std::max(last, blocks.data()[i]);
    block_bytes = kKvInfo[kv].block_bytes(d);
    head_bytes = (int64_t{last} + 1) * block_bytes;
    memory = Memory(static_cast<size_t>(heads * head_bytes));
    BlockWriter writer(table, kv, d);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < extent(k, 0); ++t) {
        const int64_t from = (t * heads + h) * d;
        uint8_t* block = head(h) + blocks.data()[t / kBlock] * block_bytes;
        writer.store(k.data() + from, v.data() + from, block, t % kBlock);
      }
  }

  uint8_t* head(int64_t h) const { return memory.data() + h * head_bytes; }
};

void check_attention(const Cube& q, const Cube& k, const Cube& v, const Array<int32_t, 1>& table) {
  require(shape_text(k) == shape_text(v), "attention: k and v must have the same shape, got " +
                                              shape_text(k) + " and " + shape_text(v));
  require(k.size() > 0 && extent(q, 2) == extent(k, 2) && extent(q, 1) % extent(k, 1) == 0 &&
              extent(q, 0) <= extent(k, 0),
          "attention: q must be [at most tokens, a multiple of n_kv_heads, head_dim] for k " +
              shape_text(k) + ", got " + shape_text(q));
  require_range("attention: head_dim", extent(q, 2), 1, kMaxHeadDim);
  const int64_t blocks = (extent(k, 0) + kBlock - 1) / kBlock;
  require(extent(table, 0) >= blocks, "attention: block_table must have at least " + text(blocks) +
                                          " values, got " + text(extent(table, 0)));
  for (size_t i = 0; i < table.size(); ++i)
    require_range("attention: block_table", table.data()[i], 0, 1 << 16);
}

// Segment by segment, last to first, as several threads might.
void attend_in_parts(const KvKernels& kernels, const AttentionArgs& a, int64_t tokens) {
  const int64_t segments = (tokens - 1) / kSegment + 1;
  const Memory partials(static_cast<size_t>(segments * partial_floats(a.head_dim)) * 4);
  for (int64_t i = segments; i-- > 0;) kernels.attend_segments(a, i, i + 1, partials.as<float>());
  kernels.merge_segments(a, partials.as<float>());
}

nb::object attention(const Cube& q, const Cube& k, const Cube& v,
                     const Array<int32_t, 1>& block_table, float scale, int64_t window,
                     const Isa& isa, const std::string& kv, bool parts) {
  check_attention(q, k, v, block_table);
  require_range("attention: window", window, 0, INT32_MAX);
  const int format = kv_index("attention", kv);
  require(kKvInfo[format].sealed_from < 0 || extent(k, 0) % kBlock == 0,
          "attention: `" + kv + "` needs whole blocks of " + text(kBlock) + " tokens, got " +
              text(extent(k, 0)) + " tokens");
  const KernelTable& table = table_of(isa);
  const int64_t rows = extent(q, 0), heads = extent(q, 1), d = extent(q, 2);
  const int64_t group = heads / extent(k, 1);
  require(!parts || rows * group <= kMaxSplitQueries, "attention: parts are for at most " +
                                                          text(kMaxSplitQueries) +
                                                          " queries, got " + text(rows * group));
  const TestCache cache(table, format, k, v, block_table);
  const Memory scratch(kAttentionScratch);
  Buffer<float> y(q.size());
  for (int64_t h = 0; h < extent(k, 1); ++h) {
    const int64_t column = h * group * d;
    const AttentionArgs a{q.data() + column,
                          heads * d,
                          cache.head(h),
                          block_table.data(),
                          d,
                          group,
                          rows,
                          extent(k, 0) - rows,
                          window,
                          scale,
                          y.data.get() + column,
                          heads * d,
                          scratch.data()};
    if (parts)
      attend_in_parts(table.kv->formats[format], a, extent(k, 0));
    else
      table.kv->formats[format].attention(a);
  }
  return nb::cast(y.numpy(rows, heads, d));
}

// ---- timed, for benchmarks

struct Timed {
  int64_t layers, kv_heads, group, head_dim, tokens, rows, blocks, block_bytes;
  const KvKernels& kernels;
  Memory cache;
  std::vector<float> q, out;
  std::vector<int32_t> block_table;

  Timed(const KernelTable& table, int kv, int64_t layers_, int64_t kv_heads_, int64_t group_,
        int64_t head_dim_, int64_t tokens_, int64_t rows_)
      : layers(layers_),
        kv_heads(kv_heads_),
        group(group_),
        head_dim(head_dim_),
        tokens(tokens_),
        rows(rows_),
        blocks((tokens_ + kBlock - 1) / kBlock),
        block_bytes(kKvInfo[kv].block_bytes(head_dim_)),
        kernels(table.kv->formats[kv]) {
    cache = Memory(static_cast<size_t>(layers * kv_heads * head_bytes()));
    q.resize(static_cast<size_t>(rows * kv_heads * group * head_dim));
    out.resize(q.size());
    for (int64_t b = 0; b < blocks; ++b) block_table.push_back(static_cast<int32_t>(b));
    fill(BlockWriter(table, kv, head_dim));
  }

  int64_t head_bytes() const { return blocks * block_bytes; }

  // One head of numbers in -1..1; copies for the others.
  void fill(BlockWriter writer) {
    Draw draw;
    std::vector<float> k(static_cast<size_t>(head_dim)), v(k.size());
    for (float& x : q) x = draw.next();
    for (int64_t t = 0; t < blocks * kBlock; ++t) {
      for (float& x : k) x = draw.next();
      for (float& x : v) x = draw.next();
      writer.store(k.data(), v.data(), cache.data() + t / kBlock * block_bytes, t % kBlock);
    }
    for (int64_t i = 1; i < layers * kv_heads; ++i)
      std::memcpy(cache.data() + i * head_bytes(), cache.data(), static_cast<size_t>(head_bytes()));
  }

  AttentionArgs args(int64_t i, int64_t row, int64_t count, void* scratch) {
    const int64_t width = kv_heads * group * head_dim;
    const int64_t at = row * width + i % kv_heads * group * head_dim;
    return {q.data() + at,
            width,
            cache.data() + i * head_bytes(),
            block_table.data(),
            head_dim,
            group,
            count,
            tokens - rows + row,
            0,
            1 / std::sqrt(static_cast<float>(head_dim)),
            out.data() + at,
            width,
            scratch};
  }

  // Seconds of one pass: tiles of about 96 queries, the longest first.
  double pass(int threads, const std::vector<Memory>& scratch) {
    const int64_t step = std::max<int64_t>(1, 96 / group), tiles = (rows + step - 1) / step;
    std::atomic<int64_t> taken{0};
    const auto begin = std::chrono::steady_clock::now();
    Pool::instance().run(threads, [&](int tid, int) {
      for (int64_t i; (i = taken.fetch_add(1)) < tiles * layers * kv_heads;) {
        const int64_t row = (tiles - 1 - i / (layers * kv_heads)) * step;
        kernels.attention(args(i % (layers * kv_heads), row, std::min(step, rows - row),
                               scratch[static_cast<size_t>(tid)].data()));
      }
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
};

nb::object time_attention(const std::string& kv, int64_t layers, int64_t kv_heads, int64_t group,
                          int64_t head_dim, int64_t tokens, int64_t rows, int passes, int threads,
                          const Isa& isa) {
  const int format = kv_index("time_attention", kv);
  for (int64_t size : {layers, kv_heads, group, tokens})
    require_range("time_attention: sizes", size, 1, 1 << 20);
  require_range("time_attention: head_dim", head_dim, 1, kMaxHeadDim);
  require_range("time_attention: rows", rows, 1, tokens);
  require_range("time_attention: passes", passes, 1, 1000);
  require_range("time_attention: threads", threads, 0, Pool::kMaxThreads);
  const KernelTable& table = table_of(isa);
  std::vector<double> seconds;
  {
    nb::gil_scoped_release release;
    Timed timed(table, format, layers, kv_heads, group, head_dim, tokens, rows);
    std::vector<Memory> scratch;
    for (int i = 0; i < Pool::instance().resolve(threads); ++i)
      scratch.emplace_back(kAttentionScratch);
    timed.pass(threads, scratch);
    for (int i = 0; i < passes; ++i) seconds.push_back(timed.pass(threads, scratch));
  }
  nb::list found;
  for (double each : seconds) found.append(each);
  return nb::make_tuple(found, layers * kv_heads * ((tokens + kBlock - 1) / kBlock) *
                                   kKvInfo[format].block_bytes(head_dim));
}

int64_t kv_block_bytes(const std::string& kv, int64_t head_dim) {
  require_range("kv_block_bytes: head_dim", head_dim, 1, kMaxHeadDim);
  return kKvInfo[kv_index("kv_block_bytes", kv)].block_bytes(head_dim);
}

}  // namespace

void register_attention(nb::module_& m) {
  nb::list names;
  for (const KvInfo& info : kKvInfo) names.append(info.name);
  m.attr("KV_FORMATS") = nb::tuple(names);
  nb::dict sealed;
  for (const KvInfo& info : kKvInfo)
    if (info.sealed_from >= 0) sealed[info.name] = kKvInfo[info.sealed_from].name;
  m.attr("KV_SEALED_FROM") = sealed;
  nb::dict sizes;
  sizes["block"] = kBlock;
  sizes["label_block"] = kLabelTokens;
  sizes["label_channels"] = kMaxLabelChannels;
  sizes["recent"] = kRecent;
  sizes["merge_rows"] = kMergeRows;
  sizes["merge_least"] = kMergeFirst + kMergeLast + 1;
  m.attr("KV_SIZES") = sizes;
  m.def("kv_block_bytes", &kv_block_bytes, nb::arg("kv"), nb::arg("head_dim"),
        "Bytes of the keys and values of 16 tokens and one head.");
  m.def("attention", &attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("block_table"),
        nb::arg("scale"), nb::arg("window") = 0, nb::arg("isa") = nb::none(), nb::arg("kv") = "f16",
        nb::arg("parts") = false,
        "Causal attention of the last rows of a sequence, through a paged KV cache.");
  m.def("time_attention", &time_attention, nb::arg("kv"), nb::arg("layers"), nb::arg("kv_heads"),
        nb::arg("group"), nb::arg("head_dim"), nb::arg("tokens"), nb::arg("rows"),
        nb::arg("passes") = 5, nb::arg("threads") = 0, nb::arg("isa") = nb::none(),
        "Seconds of every pass of attention over all layers, and the bytes of their cache.");
}

}  // namespace lacewing
