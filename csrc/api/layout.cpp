#include "api/layout.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "api/fields.h"
#include "api/module.h"

namespace lacewing {
namespace {

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) / 16 - 1;  // slots are int32
constexpr int64_t kHeadFields = 10;

// ---- layouts

KvPlace read_place(const int32_t* at, const KvLayout& layout, bool wanted,
                   const std::string& what) {
  require_range(what + ": store", at[0], wanted ? 0 : -1,
                static_cast<int64_t>(layout.stores.size()) - 1);
  if (at[0] < 0) return {-1, 0};
  require_range(what + ": index", at[1], 0, layout.stores[static_cast<size_t>(at[0])].heads - 1);
  return {at[0], at[1]};
}

// Heads read what their store holds: growing, sealed from just that, labels.
void check_head(const KvLayout& layout, const KvHead& head, const std::string& what) {
  const auto format = [&](const KvPlace& place) {
    return place ? layout.stores[static_cast<size_t>(place.store)].format : kLabels;
  };
  const int growing = format(head.growing);
  require(growing >= 0 && kKvInfo[growing].sealed_from < 0,
          what + ": the first store must be of a format that grows");
  require(!head.sealed ||
              (format(head.sealed) >= 0 && kKvInfo[format(head.sealed)].sealed_from == growing),
          what + ": the second store must be sealed from the first");
  require(!head.labels || format(head.labels) == kLabels,
          what + ": the third store must be labels");
  require(head.span.sinks >= 0 && head.span.window >= 0 && head.span.stride >= 0 &&
              head.span.phase >= 0,
          what + ": a span must not be negative");
}

void read_stores(const std::string& where, const nb::list& stores, KvLayout& layout) {
  const std::string each_of = "`kv.stores`: ";
  for (const nb::handle& each : stores) {
    const auto store = value<nb::tuple>(where, nb::borrow(each), "`kv.stores`", "tuples of three");
    require(store.size() == 3, where + ": `kv.stores` must be tuples (format, blocks, heads)");
    const auto name =
        value<std::string>(where, nb::object(store[0]), each_of + "format", "a string");
    const auto blocks =
        value<int64_t>(where, nb::object(store[1]), each_of + "blocks", "an integer");
    const auto heads = value<int64_t>(where, nb::object(store[2]), each_of + "heads", "an integer");
    require_range(where + ": `kv.stores`: blocks", blocks, 1, kMaxBlocks);
    require_range(where + ": `kv.stores`: heads", heads, 1, kMaxSize);
    layout.stores.push_back({name == "labels" ? kLabels : kv_index(where, name), blocks, heads});
  }
  require(!layout.stores.empty(), where + ": `kv.stores` must not be empty");
}

void read_labels(const std::string& where, const nb::dict& kv, int64_t head_dim, KvLayout& layout) {
  Array<int32_t, 2> channels;
  Array<float, 2> scales;
  require(nb::try_cast(item(where + ": kv", kv, "channels"), channels, false) &&
              nb::try_cast(item(where + ": kv", kv, "scales"), scales, false),
          where + ": `kv.channels` and `kv.scales` must be contiguous arrays, i32 and f32");
  const auto rows = static_cast<size_t>(layout.heads.size());
  layout.channels = static_cast<int64_t>(channels.shape(1));
  require(channels.shape(0) == rows && scales.shape(0) == rows &&
              scales.shape(1) == channels.shape(1) && layout.channels > 0 &&
              layout.channels % 4 == 0 && layout.channels <= std::min(head_dim, kMaxLabelChannels),
          where + ": `kv.channels` and `kv.scales` must be [" + text(static_cast<int64_t>(rows)) +
              ", a multiple of 4 up to head_dim and " + text(kMaxLabelChannels) + "], got " +
              shape_text(channels) + " and " + shape_text(scales));
  for (size_t i = 0; i < channels.size(); ++i) {
    require_range(where + ": `kv.channels`", channels.data()[i], 0, head_dim - 1);
    require(std::isfinite(scales.data()[i]) && scales.data()[i] > 0,
            where + ": `kv.scales` must be positive and finite");
  }
  layout.label_channels.assign(channels.data(), channels.data() + channels.size());
  layout.label_scales.assign(scales.data(), scales.data() + scales.size());
}

// ---- steps

// The tables of sequence b cover what it has in the cache, in every store.
void check_tables(const std::string& where, const CacheArrays& a, int64_t b,
                  const KvLayout& layout) {
  const int64_t rows = a.cu_seqlens.data()[b + 1] - a.cu_seqlens.data()[b];
  if (rows == 0) return;
  require_range(where + ": cached[" + text(b) + "]", a.cached.data()[b], 0, INT32_MAX);
  const int64_t last = int64_t{a.cached.data()[b]} + rows - 1;
  const int64_t max_blocks = static_cast<int64_t>(a.block_tables.shape(2));
  const int64_t columns = last / kBlock + 1;
  require(columns <= max_blocks, where + ": block_tables must have at least " + text(columns) +
                                     " columns for " + text(last + 1) + " tokens, got " +
                                     text(max_blocks));
  for (size_t s = 0; s < layout.stores.size(); ++s) {
    const KvStore& store = layout.stores[s];
    const int64_t blocks = last / (store.format == kLabels ? kLabelTokens : kBlock) + 1;
    const int64_t at = static_cast<int64_t>(s) * a.sequences() + b;
    const int32_t* table = a.block_tables.data() + at * max_blocks;
    for (int64_t j = 0; j < blocks; ++j)
      require_range(
          [&] {
            return where + ": block_tables[" + text(static_cast<int64_t>(s)) + ", " + text(b) +
                   ", " + text(j) + "]";
          },
          table[j], 0, store.blocks - 1);
  }
}

// Sequence b, merged to `keep` tokens.
void check_merge(const std::string& where, const CacheArrays& a, int64_t b, int64_t keep,
                 const KvStore& store) {
  const int64_t rows = a.cu_seqlens.data()[b + 1] - a.cu_seqlens.data()[b];
  const std::string at = "[" + text(b) + "]";
  require(rows >= kMergeRows, where + ": cu_seqlens must give sequence " + text(b) +
                                  ", which keep" + at + " merges, at least " + text(kMergeRows) +
                                  " tokens, got " + text(rows));
  const int64_t tokens = a.cached.data()[b] + rows;
  require(keep > kMergeFirst + kMergeLast && keep <= tokens,
          where + ": keep" + at + " must be 0, or in " + text(kMergeFirst + kMergeLast + 1) + ".." +
              text(tokens) + ", the tokens in the cache, got " + text(keep));
  const int64_t columns = static_cast<int64_t>(a.merged_tables->shape(1));
  const int64_t blocks = (keep + kBlock - 1) / kBlock;
  require(blocks <= columns, where + ": merged_tables must have at least " + text(blocks) +
                                 " columns for " + text(keep) + " tokens, got " + text(columns));
  for (int64_t j = 0; j < blocks; ++j)
    require_range([&] { return where + ": merged_tables[" + text(b) + ", " + text(j) + "]"; },
                  a.merged_tables->data()[b * columns + j], 0, store.blocks - 1);
}

// Merging needs every token of a sequence in one store, where all heads and layers read it.
void check_merges(const std::string& where, const CacheArrays& a, const KvLayout& layout,
                  bool windows) {
  require(a.keep.has_value() == a.merged_tables.has_value(),
          where + ": keep and merged_tables go together");
  if (!a.keep) return;
  require(length(*a.keep) == a.sequences() &&
              static_cast<int64_t>(a.merged_tables->shape(0)) == a.sequences(),
          where + ": keep and merged_tables must have one row per sequence (" +
              text(a.sequences()) + "), got " + text(length(*a.keep)) + " and " +
              shape_text(*a.merged_tables));
  bool all = !windows && layout.stores.size() == 1;
  for (const KvHead& head : layout.heads) all = all && head.span.everything();
  require(all, where + ": keep needs a model with one store, all of which is read");
  for (int64_t b = 0; b < a.sequences(); ++b)
    if (const int64_t keep = a.keep->data()[b]; keep != 0)
      check_merge(where, a, b, keep, layout.stores[0]);
}

}  // namespace

KvLayout read_layout(const std::string& where, const nb::dict& kv, int64_t layers, int64_t kv_heads,
                     int64_t head_dim) {
  KvLayout layout{};
  const auto field = [&](const char* key) { return item(where + ": kv", kv, key); };
  read_stores(where, value<nb::list>(where, field("stores"), "`kv.stores`", "a list"), layout);
  Array<int32_t, 2> heads;
  const int64_t count = layers * kv_heads;
  require(
      nb::try_cast(field("heads"), heads, false) && static_cast<int64_t>(heads.shape(0)) == count &&
          heads.shape(1) == kHeadFields,
      where + ": `kv.heads` must be an i32 array [" + text(count) + ", " + text(kHeadFields) + "]");
  bool labels = false;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* at = heads.data() + i * kHeadFields;
    const std::string what = where + ": `kv.heads[" + text(i) + "]`";
    const KvHead head{read_place(at, layout, true, what),
                      read_place(at + 2, layout, false, what),
                      read_place(at + 4, layout, false, what),
                      {at[6], at[7], at[8], at[9]}};
    check_head(layout, head, what);
    labels = labels || head.labels;
    layout.heads.push_back(head);
  }
  layout.topk = value<int64_t>(where, field("topk"), "`kv.topk`", "an integer");
  require_range(where + ": `kv.topk`", layout.topk, 0, kMaxSize);
  require(labels == (layout.topk > 0), where + ": `kv.topk` and labels go together");
  if (labels) read_labels(where, kv, head_dim, layout);
  return layout;
}

void check_blocks(const std::string& where, const KvLayout& layout,
                  const std::vector<int64_t>& blocks) {
  const auto stores = static_cast<int64_t>(layout.stores.size());
  require(static_cast<int64_t>(blocks.size()) == stores,
          where + ": blocks must have one number per store (" + text(stores) + "), got " +
              text(static_cast<int64_t>(blocks.size())));
  for (size_t i = 0; i < blocks.size(); ++i)
    require_range(where + ": blocks[" + text(static_cast<int64_t>(i)) + "]", blocks[i],
                  layout.stores[i].blocks, kMaxBlocks);
}

CacheStep CacheArrays::view() const {
  return {cu_seqlens.data()[sequences()],
          sequences(),
          static_cast<int64_t>(block_tables.shape(2)),
          cached.data(),
          block_tables.data(),
          cu_seqlens.data(),
          keep ? keep->data() : nullptr,
          keep ? merged_tables->data() : nullptr,
          keep ? static_cast<int64_t>(merged_tables->shape(1)) : 0};
}

void check_sequences(const std::string& where, const CacheArrays& a, int64_t count) {
  const int64_t sequences = a.sequences();
  require(length(a.cu_seqlens) == sequences + 1,
          where + ": cu_seqlens must have one value more than block_tables has sequences (" +
              text(sequences) + "), got " + text(length(a.cu_seqlens)));
  require(length(a.cached) == sequences, where + ": cached must have one value per sequence (" +
                                             text(sequences) + "), got " + text(length(a.cached)));
  const int32_t* cu = a.cu_seqlens.data();
  require(cu[0] == 0, where + ": cu_seqlens must start at 0, got " + text(cu[0]));
  for (int64_t b = 0; b < sequences; ++b)
    require(cu[b] <= cu[b + 1], where + ": cu_seqlens must not decrease, got " + text(cu[b + 1]) +
                                    " after " + text(cu[b]));
  require(cu[sequences] == count, where + ": cu_seqlens must end at the number of tokens (" +
                                      text(count) + "), got " + text(cu[sequences]));
}

void check_cache(const std::string& where, const CacheArrays& a, const KvLayout& layout,
                 bool windows) {
  const auto stores = static_cast<int64_t>(layout.stores.size());
  require(static_cast<int64_t>(a.block_tables.shape(0)) == stores,
          where + ": block_tables must be [" + text(stores) + ", sequences, blocks], got " +
              shape_text(a.block_tables));
  for (int64_t b = 0; b < a.sequences(); ++b) check_tables(where, a, b, layout);
  check_merges(where, a, layout, windows);
}

}  // namespace lacewing
