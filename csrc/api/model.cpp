// Model: the native decoder. Whatever passes the checks here cannot make the engine touch memory
// that is not its own.
#include "engine/model.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "api/check.h"
#include "api/module.h"
#include "core/pool.h"
#include "ops/limits.h"

namespace lacewing {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 24;  // of any dimension: products stay in int64
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) / 16 - 1;  // slots are int32

using Indices = Array<int32_t, 1>;

// ---- reading the spec

nb::object item(const nb::dict& spec, const char* key) {
  require(spec.contains(key), std::string("Model: spec needs `") + key + "`");
  return nb::borrow(spec[key]);
}

template <class T>
T value(const nb::object& object, const std::string& what, const char* kind) {
  T result;
  if (!nb::try_cast(object, result))
    throw nb::type_error(("Model: " + what + " must be " + kind).c_str());
  return result;
}

int64_t size(const nb::dict& spec, const char* key) {
  const std::string what = std::string("`") + key + "`";
  const auto result = value<int64_t>(item(spec, key), what, "an integer");
  require_range("Model: " + what, result, 1, kMaxSize);
  return result;
}

float number(const nb::dict& spec, const char* key) {
  return value<float>(item(spec, key), std::string("`") + key + "`", "a number");
}

bool flag(const nb::dict& spec, const char* key) {
  return value<bool>(item(spec, key), std::string("`") + key + "`", "True or False");
}

Activation activation(const nb::dict& spec) {
  const auto name = value<std::string>(item(spec, "activation"), "`activation`", "a string");
  if (name == "silu") return Activation::silu;
  require(name == "gelu_tanh",
          "Model: `activation` must be `silu` or `gelu_tanh`, got `" + name + "`");
  return Activation::gelu_tanh;
}

Spec read_spec(const nb::dict& spec) {
  const Spec s{
      size(spec, "vocab_size"), size(spec, "hidden_size"),       size(spec, "n_heads"),
      size(spec, "n_kv_heads"), size(spec, "head_dim"),          size(spec, "intermediate_size"),
      number(spec, "norm_eps"), number(spec, "embedding_scale"), number(spec, "attention_scale"),
      activation(spec),         flag(spec, "qk_norm"),           flag(spec, "sandwich_norm")};
  require(s.n_heads % s.n_kv_heads == 0, "Model: `n_heads` must be a multiple of `n_kv_heads` (" +
                                             text(s.n_kv_heads) + "), got " + text(s.n_heads));
  require(s.head_dim % 2 == 0 && s.head_dim <= kMaxHeadDim,
          "Model: `head_dim` must be even and at most " + text(kMaxHeadDim) + ", got " +
              text(s.head_dim));
  require(s.n_heads * s.head_dim <= kMaxSize, "Model: `n_heads` times `head_dim` is too large");
  require(s.norm_eps >= 0 && s.norm_eps < 1, "Model: `norm_eps` must be in 0..1");
  require(s.attention_scale > 0 && s.attention_scale < 1e30f,
          "Model: `attention_scale` must be positive and finite");
  require(std::isfinite(s.embedding_scale), "Model: `embedding_scale` must be finite");
  return s;
}

// ---- reading the tensors

// Looks tensors up by name and keeps what the model borrows alive.
class Source {
 public:
  Source(const nb::dict& tensors, std::vector<nb::object>& kept) : tensors_(tensors), kept_(kept) {}

  bool has(const std::string& name) const { return tensors_.contains(name.c_str()); }

  Linear linear(const std::string& name, int64_t n, int64_t k) {
    const nb::object object = find(name + ".weight");
    if (!nb::isinstance<Tensor>(object))
      throw nb::type_error(("Model: `" + name + ".weight` must be a Tensor").c_str());
    const PackedTensor& w = nb::cast<const Tensor&>(object).w;
    require(w.n == n && w.k == k, "Model: `" + name + ".weight` must be [" + text(n) + ", " +
                                      text(k) + "], got [" + text(w.n) + ", " + text(w.k) + "]");
    return {w, has(name + ".bias") ? vector(name + ".bias", n) : nullptr};
  }

  const float* vector(const std::string& name, int64_t n) {
    Array<float, 1> array;
    if (!nb::try_cast(find(name), array, false))
      throw nb::type_error(("Model: `" + name + "` must be a contiguous f32 1-D array").c_str());
    require(static_cast<int64_t>(array.shape(0)) == n,
            "Model: `" + name + "` must be [" + text(n) + "], got " + shape_text(array));
    return array.data();
  }

 private:
  nb::object find(const std::string& name) {
    require(has(name), "Model: needs the tensor `" + name + "`, `tensors` has none");
    kept_.push_back(nb::borrow(tensors_[name.c_str()]));
    return kept_.back();
  }

  const nb::dict& tensors_;
  std::vector<nb::object>& kept_;
};

Layer read_layer(Source& source, const Spec& s, int64_t index, int rope, int64_t window) {
  const std::string at = "model.layers." + text(index) + ".";
  const std::string attention = at + "self_attn.", mlp = at + "mlp.";
  const auto norm = [&](bool wanted, const std::string& name, int64_t n) {
    return wanted ? source.vector(name + ".weight", n) : nullptr;
  };
  return {source.linear(attention + "q_proj", s.q_size(), s.hidden_size),
          source.linear(attention + "k_proj", s.kv_size(), s.hidden_size),
          source.linear(attention + "v_proj", s.kv_size(), s.hidden_size),
          source.linear(attention + "o_proj", s.hidden_size, s.q_size()),
          source.linear(mlp + "gate_proj", s.intermediate_size, s.hidden_size),
          source.linear(mlp + "up_proj", s.intermediate_size, s.hidden_size),
          source.linear(mlp + "down_proj", s.hidden_size, s.intermediate_size),
          norm(true, at + "input_layernorm", s.hidden_size),
          norm(true, at + "post_attention_layernorm", s.hidden_size),
          norm(s.sandwich_norm, at + "pre_feedforward_layernorm", s.hidden_size),
          norm(s.sandwich_norm, at + "post_feedforward_layernorm", s.hidden_size),
          norm(s.qk_norm, attention + "q_norm", s.head_dim),
          norm(s.qk_norm, attention + "k_norm", s.head_dim),
          rope,
          window};
}

Rope read_rope(const nb::handle& pair, int64_t index, int64_t head_dim,
               std::vector<nb::object>& kept) {
  const std::string what = "`ropes[" + text(index) + "]`";
  Array<float, 2> cos, sin;
  const auto both = value<nb::tuple>(nb::borrow(pair), what, "a tuple (cos, sin)");
  if (both.size() != 2 || !nb::try_cast(nb::object(both[0]), cos, false) ||
      !nb::try_cast(nb::object(both[1]), sin, false))
    throw nb::type_error(("Model: " + what + " must be two contiguous f32 2-D arrays").c_str());
  const std::string half = text(head_dim / 2);
  require(static_cast<int64_t>(cos.shape(1)) == head_dim / 2 && cos.shape(0) > 0 &&
              cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1),
          "Model: " + what + " must be two arrays [positions, " + half + "], got " +
              shape_text(cos) + " and " + shape_text(sin));
  kept.push_back(both);
  return {cos.data(), sin.data(), static_cast<int64_t>(cos.shape(0))};
}

std::pair<int, int64_t> read_layer_spec(const nb::handle& pair, int64_t index, int64_t ropes) {
  const std::string what = "`layers[" + text(index) + "]`";
  const auto both = value<nb::tuple>(nb::borrow(pair), what, "a tuple (rope, window)");
  require(both.size() == 2, "Model: " + what + " must be a tuple (rope, window)");
  const auto rope = value<int64_t>(nb::object(both[0]), what + ": rope", "an integer");
  const auto window = value<int64_t>(nb::object(both[1]), what + ": window", "an integer");
  require_range("Model: " + what + ": rope", rope, 0, ropes - 1);
  require_range("Model: " + what + ": window", window, 0, INT32_MAX);
  return {static_cast<int>(rope), window};
}

Weights read_weights(const nb::dict& spec, const nb::dict& tensors, std::vector<nb::object>& kept) {
  Weights w{read_spec(spec), {}, {}, nullptr, {}, {}};
  const Spec& s = w.spec;
  Source source(tensors, kept);
  w.embedding = source.linear("model.embed_tokens", s.vocab_size, s.hidden_size);
  w.head = source.has("lm_head.weight") ? source.linear("lm_head", s.vocab_size, s.hidden_size)
                                        : w.embedding;
  w.norm = source.vector("model.norm.weight", s.hidden_size);
  const auto ropes = value<nb::list>(item(spec, "ropes"), "`ropes`", "a list");
  for (const nb::handle& pair : ropes)
    w.ropes.push_back(read_rope(pair, static_cast<int64_t>(w.ropes.size()), s.head_dim, kept));
  const auto layers = value<nb::list>(item(spec, "layers"), "`layers`", "a list");
  require(layers.size() > 0, "Model: `layers` must not be empty");
  for (const nb::handle& pair : layers) {
    const int64_t i = static_cast<int64_t>(w.layers.size());
    const auto [rope, window] = read_layer_spec(pair, i, static_cast<int64_t>(w.ropes.size()));
    w.layers.push_back(read_layer(source, s, i, rope, window));
  }
  return w;
}

// ---- the cache

constexpr int64_t kHeadFields = 10;

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

void read_stores(const nb::list& stores, KvLayout& layout) {
  for (const nb::handle& each : stores) {
    const auto store = value<nb::tuple>(nb::borrow(each), "`kv.stores`", "tuples of three");
    require(store.size() == 3, "Model: `kv.stores` must be tuples (format, blocks, heads)");
    const auto name = value<std::string>(nb::object(store[0]), "`kv.stores`: format", "a string");
    const auto blocks = value<int64_t>(nb::object(store[1]), "`kv.stores`: blocks", "an integer");
    const auto heads = value<int64_t>(nb::object(store[2]), "`kv.stores`: heads", "an integer");
    require_range("Model: `kv.stores`: blocks", blocks, 1, kMaxBlocks);
    require_range("Model: `kv.stores`: heads", heads, 1, kMaxSize);
    layout.stores.push_back({name == "labels" ? kLabels : kv_index("Model", name), blocks, heads});
  }
  require(!layout.stores.empty(), "Model: `kv.stores` must not be empty");
}

void read_labels(const nb::dict& kv, const Spec& s, KvLayout& layout) {
  Array<int32_t, 2> channels;
  Array<float, 2> scales;
  require(nb::try_cast(item(kv, "channels"), channels, false) &&
              nb::try_cast(item(kv, "scales"), scales, false),
          "Model: `kv.channels` and `kv.scales` must be contiguous arrays, i32 and f32");
  const auto rows = static_cast<size_t>(layout.heads.size());
  layout.channels = static_cast<int64_t>(channels.shape(1));
  require(channels.shape(0) == rows && scales.shape(0) == rows &&
              scales.shape(1) == channels.shape(1) && layout.channels > 0 &&
              layout.channels % 4 == 0 && layout.channels <= s.head_dim,
          "Model: `kv.channels` and `kv.scales` must be [" + text(static_cast<int64_t>(rows)) +
              ", a multiple of 4 up to head_dim], got " + shape_text(channels) + " and " +
              shape_text(scales));
  for (size_t i = 0; i < channels.size(); ++i) {
    require_range("Model: `kv.channels`", channels.data()[i], 0, s.head_dim - 1);
    require(std::isfinite(scales.data()[i]) && scales.data()[i] > 0,
            "Model: `kv.scales` must be positive and finite");
  }
  layout.label_channels.assign(channels.data(), channels.data() + channels.size());
  layout.label_scales.assign(scales.data(), scales.data() + scales.size());
}

KvLayout read_kv(const nb::dict& kv, const Weights& w) {
  KvLayout layout{};
  read_stores(value<nb::list>(item(kv, "stores"), "`kv.stores`", "a list"), layout);
  Array<int32_t, 2> heads;
  const auto count = static_cast<int64_t>(w.layers.size()) * w.spec.n_kv_heads;
  require(
      nb::try_cast(item(kv, "heads"), heads, false) &&
          static_cast<int64_t>(heads.shape(0)) == count && heads.shape(1) == kHeadFields,
      "Model: `kv.heads` must be an i32 array [" + text(count) + ", " + text(kHeadFields) + "]");
  bool labels = false;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* at = heads.data() + i * kHeadFields;
    const std::string what = "Model: `kv.heads[" + text(i) + "]`";
    const KvHead head{read_place(at, layout, true, what),
                      read_place(at + 2, layout, false, what),
                      read_place(at + 4, layout, false, what),
                      {at[6], at[7], at[8], at[9]}};
    check_head(layout, head, what);
    const int64_t window = w.layers[static_cast<size_t>(i / w.spec.n_kv_heads)].window;
    require(window == 0 || !head.lists(), what + ": a layer with a window reads all of it");
    labels = labels || head.labels;
    layout.heads.push_back(head);
  }
  layout.topk = value<int64_t>(item(kv, "topk"), "`kv.topk`", "an integer");
  require_range("Model: `kv.topk`", layout.topk, 0, kMaxSize);
  require(labels == (layout.topk > 0), "Model: `kv.topk` and labels go together");
  if (labels) read_labels(kv, w.spec, layout);
  return layout;
}

// ---- the class

struct NativeModel {
  std::vector<nb::object> kept;
  std::unique_ptr<Model> model;
  int64_t context;
};

void init_model(NativeModel* self, const nb::dict& spec, const nb::dict& tensors,
                const nb::dict& kv, const std::optional<std::string>& isa, int threads) {
  require_range("Model: threads", threads, 0, Pool::kMaxThreads);
  std::vector<nb::object> kept;
  Weights weights = read_weights(spec, tensors, kept);
  int64_t context = INT32_MAX;
  for (const Layer& layer : weights.layers)
    context = std::min(context, weights.ropes[static_cast<size_t>(layer.rope)].positions);
  KvLayout layout = read_kv(kv, weights);
  auto model =
      std::make_unique<Model>(std::move(weights), std::move(layout), table_of(isa), threads);
  new (self) NativeModel{std::move(kept), std::move(model), context};
}

struct StepArrays {
  const Indices& tokens;
  const Indices& positions;
  const Indices& cached;
  const Array<int32_t, 3>& block_tables;
  const Indices& cu_seqlens;
  const Indices& logit_rows;
  const std::optional<Indices>& keep;
  const std::optional<Array<int32_t, 2>>& merged_tables;

  int64_t sequences() const { return static_cast<int64_t>(block_tables.shape(1)); }
};

int64_t length(const Indices& array) { return static_cast<int64_t>(array.shape(0)); }

void check_sequences(const StepArrays& a, int64_t count) {
  const int64_t sequences = a.sequences();
  require(length(a.cu_seqlens) == sequences + 1,
          "step: cu_seqlens must have one value more than block_tables has sequences (" +
              text(sequences) + "), got " + text(length(a.cu_seqlens)));
  require(length(a.cached) == sequences, "step: cached must have one value per sequence (" +
                                             text(sequences) + "), got " + text(length(a.cached)));
  const int32_t* cu = a.cu_seqlens.data();
  require(cu[0] == 0, "step: cu_seqlens must start at 0, got " + text(cu[0]));
  for (int64_t b = 0; b < sequences; ++b)
    require(cu[b] <= cu[b + 1],
            "step: cu_seqlens must not decrease, got " + text(cu[b + 1]) + " after " + text(cu[b]));
  require(cu[sequences] == count, "step: cu_seqlens must end at the number of tokens (" +
                                      text(count) + "), got " + text(cu[sequences]));
}

// Positions of sequence b go up one by one inside the context.
void check_positions(const StepArrays& a, int64_t b, int64_t context) {
  const int64_t begin = a.cu_seqlens.data()[b], end = a.cu_seqlens.data()[b + 1];
  const int32_t* positions = a.positions.data();
  for (int64_t t = begin; t < end; ++t) {
    const int64_t wanted = t == begin ? positions[t] : positions[t - 1] + int64_t{1};
    require(positions[t] == wanted, "step: positions of sequence " + text(b) +
                                        " must be consecutive, got " + text(positions[t]) +
                                        " after " + text(wanted - 1));
    require_range("step: positions[" + text(t) + "]", positions[t], 0, context - 1);
  }
  require_range("step: cached[" + text(b) + "]", a.cached.data()[b], 0, positions[begin]);
}

// The tables of sequence b cover what it has in the cache, in every store.
void check_tables(const StepArrays& a, int64_t b, const KvLayout& layout) {
  const int64_t rows = a.cu_seqlens.data()[b + 1] - a.cu_seqlens.data()[b];
  const int64_t last = a.cached.data()[b] + rows - 1;
  const int64_t max_blocks = static_cast<int64_t>(a.block_tables.shape(2));
  const int64_t columns = last / kBlock + 1;
  require(columns <= max_blocks, "step: block_tables must have at least " + text(columns) +
                                     " columns for " + text(last + 1) + " tokens, got " +
                                     text(max_blocks));
  for (size_t s = 0; s < layout.stores.size(); ++s) {
    const KvStore& store = layout.stores[s];
    const int64_t blocks = last / (store.format == kLabels ? kLabelTokens : kBlock) + 1;
    const int64_t at = static_cast<int64_t>(s) * a.sequences() + b;
    const int32_t* table = a.block_tables.data() + at * max_blocks;
    for (int64_t j = 0; j < blocks; ++j)
      require_range("step: block_tables[" + text(static_cast<int64_t>(s)) + ", " + text(b) + ", " +
                        text(j) + "]",
                    table[j], 0, store.blocks - 1);
  }
}

// Merging needs every token of a sequence in one store, where all heads and layers read it.
void check_mergeable(const NativeModel& self) {
  const KvLayout& layout = self.model->layout();
  bool all = layout.stores.size() == 1;
  for (const KvHead& head : layout.heads) all = all && head.span.everything();
  for (const Layer& layer : self.model->weights().layers)
    all = all && (layer.window == 0 || layer.window >= self.context);
  require(all, "step: keep needs a model with one store, all of which is read");
}

// Sequence b, merged to `keep` tokens.
void check_merge(const StepArrays& a, int64_t b, int64_t keep, const KvStore& store) {
  const int64_t rows = a.cu_seqlens.data()[b + 1] - a.cu_seqlens.data()[b];
  const std::string at = "[" + text(b) + "]";
  require(rows >= kMergeRows, "step: cu_seqlens must give sequence " + text(b) + ", which keep" +
                                  at + " merges, at least " + text(kMergeRows) + " tokens, got " +
                                  text(rows));
  const int64_t tokens = a.cached.data()[b] + rows;
  require(keep > kMergeFirst + kMergeLast && keep <= tokens,
          "step: keep" + at + " must be 0, or in " + text(kMergeFirst + kMergeLast + 1) + ".." +
              text(tokens) + ", the tokens in the cache, got " + text(keep));
  const int64_t columns = static_cast<int64_t>(a.merged_tables->shape(1));
  const int64_t blocks = (keep + kBlock - 1) / kBlock;
  require(blocks <= columns, "step: merged_tables must have at least " + text(blocks) +
                                 " columns for " + text(keep) + " tokens, got " + text(columns));
  for (int64_t j = 0; j < blocks; ++j)
    require_range("step: merged_tables[" + text(b) + ", " + text(j) + "]",
                  a.merged_tables->data()[b * columns + j], 0, store.blocks - 1);
}

void check_merges(const StepArrays& a, const NativeModel& self) {
  require(a.keep.has_value() == a.merged_tables.has_value(),
          "step: keep and merged_tables go together");
  if (!a.keep) return;
  require(length(*a.keep) == a.sequences() &&
              static_cast<int64_t>(a.merged_tables->shape(0)) == a.sequences(),
          "step: keep and merged_tables must have one row per sequence (" + text(a.sequences()) +
              "), got " + text(length(*a.keep)) + " and " + shape_text(*a.merged_tables));
  check_mergeable(self);
  for (int64_t b = 0; b < a.sequences(); ++b)
    if (const int64_t keep = a.keep->data()[b]; keep != 0)
      check_merge(a, b, keep, self.model->layout().stores[0]);
}

void check_step(const StepArrays& a, const NativeModel& self) {
  const int64_t count = length(a.tokens);
  require(length(a.positions) == count,
          "step: tokens and positions must have the same length, got " + text(count) + " and " +
              text(length(a.positions)));
  const KvLayout& layout = self.model->layout();
  const auto stores = static_cast<int64_t>(layout.stores.size());
  require(static_cast<int64_t>(a.block_tables.shape(0)) == stores,
          "step: block_tables must be [" + text(stores) + ", sequences, blocks], got " +
              shape_text(a.block_tables));
  check_sequences(a, count);
  const int64_t vocab = self.model->weights().spec.vocab_size;
  for (int64_t t = 0; t < count; ++t)
    require_range("step: tokens[" + text(t) + "]", a.tokens.data()[t], 0, vocab - 1);
  for (int64_t b = 0; b < a.sequences(); ++b) {
    if (a.cu_seqlens.data()[b] == a.cu_seqlens.data()[b + 1]) continue;
    check_positions(a, b, self.context);
    check_tables(a, b, layout);
  }
  check_merges(a, self);
  for (int64_t r = 0; r < length(a.logit_rows); ++r)
    require_range("step: logit_rows[" + text(r) + "]", a.logit_rows.data()[r], 0, count - 1);
}

nb::object step(NativeModel& self, const Indices& tokens, const Indices& positions,
                const Indices& cached, const Array<int32_t, 3>& block_tables,
                const Indices& cu_seqlens, const Indices& logit_rows,
                const std::optional<Indices>& keep,
                const std::optional<Array<int32_t, 2>>& merged_tables) {
  const StepArrays a{tokens,     positions,  cached, block_tables,
                     cu_seqlens, logit_rows, keep,   merged_tables};
  check_step(a, self);
  const int64_t vocab = self.model->weights().spec.vocab_size, rows = length(logit_rows);
  std::unique_ptr<float[]> logits(
      new float[static_cast<size_t>(std::max<int64_t>(1, rows * vocab))]);
  const StepInput input{length(tokens),
                        a.sequences(),
                        static_cast<int64_t>(block_tables.shape(2)),
                        rows,
                        tokens.data(),
                        positions.data(),
                        cached.data(),
                        block_tables.data(),
                        cu_seqlens.data(),
                        logit_rows.data(),
                        logits.get(),
                        keep ? keep->data() : nullptr,
                        keep ? merged_tables->data() : nullptr,
                        keep ? static_cast<int64_t>(merged_tables->shape(1)) : 0};
  if (input.count > 0) {
    nb::gil_scoped_release release;
    self.model->step(input);
  }
  float* data = logits.release();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, float>(
      data, {static_cast<size_t>(rows), static_cast<size_t>(vocab)}, owner));
}

}  // namespace

void register_model(nb::module_& m) {
  nb::class_<NativeModel>(m, "Model", "A decoder over packed weights, with its paged KV cache.")
      .def("__init__", &init_model, nb::arg("spec"), nb::arg("tensors"), nb::arg("kv"),
           nb::arg("isa") = nb::none(), nb::arg("threads") = 0)
      .def("step", &step, nb::arg("tokens").noconvert(), nb::arg("positions").noconvert(),
           nb::arg("cached").noconvert(), nb::arg("block_tables").noconvert(),
           nb::arg("cu_seqlens").noconvert(), nb::arg("logit_rows").noconvert(),
           nb::arg("keep").noconvert() = nb::none(),
           nb::arg("merged_tables").noconvert() = nb::none(),
           "Runs the tokens through the model and returns the logits f32 [R, vocab] of rows "
           "`logit_rows`.")
      .def(
          "fill_cache", [](NativeModel& self) { self.model->fill_cache(); },
          "Puts numbers without meaning into the whole cache, as after a long text.")
      .def_prop_ro("threads", [](const NativeModel& m) { return m.model->threads(); })
      .def_prop_ro("context", [](const NativeModel& m) { return m.context; });
}

}  // namespace lacewing
