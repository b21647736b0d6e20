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
#include "api/fields.h"
#include "api/layout.h"
#include "api/module.h"
#include "core/pool.h"
#include "ops/limits.h"

namespace lacewing {
namespace {

// ---- reading the spec

nb::object item(const nb::dict& spec, const char* key) {
  return lacewing::item("Model: spec", spec, key);
}

template <class T>
T value(const nb::object& object, const std::string& what, const char* kind) {
  return lacewing::value<T>("Model", object, what, kind);
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

// ---- the class

struct NativeModel {
  std::vector<nb::object> kept;
  std::unique_ptr<Model> model;
  int64_t context;
};

void check_windows(const Weights& w, const KvLayout& layout) {
  for (size_t i = 0; i < layout.heads.size(); ++i)
    require(w.layers[i / static_cast<size_t>(w.spec.n_kv_heads)].window == 0 ||
                !layout.heads[i].lists(),
            "Model: `kv.heads[" + text(static_cast<int64_t>(i)) +
                "]`: a layer with a window reads all of it");
}

void init_model(NativeModel* self, const nb::dict& spec, const nb::dict& tensors,
                const nb::dict& kv, const std::optional<std::string>& isa, int threads) {
  require_range("Model: threads", threads, 0, Pool::kMaxThreads);
  std::vector<nb::object> kept;
  Weights weights = read_weights(spec, tensors, kept);
  int64_t context = INT32_MAX;
  for (const Layer& layer : weights.layers)
    context = std::min(context, weights.ropes[static_cast<size_t>(layer.rope)].positions);
  KvLayout layout = read_layout("Model", kv, static_cast<int64_t>(weights.layers.size()),
                                weights.spec.n_kv_heads, weights.spec.head_dim);
  check_windows(weights, layout);
  auto model =
      std::make_unique<Model>(std::move(weights), std::move(layout), table_of(isa), threads);
  new (self) NativeModel{std::move(kept), std::move(model), context};
}

// Positions of sequence b go up one by one inside the context.
void check_positions(const CacheArrays& a, const Indices& positions, int64_t b, int64_t context) {
  const int64_t begin = a.cu_seqlens.data()[b], end = a.cu_seqlens.data()[b + 1];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = positions.data()[t];
    const int64_t wanted = t == begin ? at : positions.data()[t - 1] + int64_t{1};
    require(at == wanted, "step: positions of sequence " + text(b) + " must be consecutive, got " +
                              text(at) + " after " + text(wanted - 1));
    require_range([&] { return "step: positions[" + text(t) + "]"; }, at, 0, context - 1);
  }
  if (begin < end)
    require_range("step: cached[" + text(b) + "]", a.cached.data()[b], 0, positions.data()[begin]);
}

void check_step(const NativeModel& self, const Indices& tokens, const Indices& positions,
                const Indices& logit_rows, const CacheArrays& a) {
  const int64_t count = length(tokens);
  require(length(positions) == count, "step: tokens and positions must have the same length, got " +
                                          text(count) + " and " + text(length(positions)));
  check_sequences("step", a, count);
  const int64_t vocab = self.model->weights().spec.vocab_size;
  for (int64_t t = 0; t < count; ++t)
    require_range([&] { return "step: tokens[" + text(t) + "]"; }, tokens.data()[t], 0, vocab - 1);
  for (int64_t b = 0; b < a.sequences(); ++b) check_positions(a, positions, b, self.context);
  bool windows = false;
  for (const Layer& layer : self.model->weights().layers)
    windows = windows || (layer.window > 0 && layer.window < self.context);
  check_cache("step", a, self.model->layout(), windows);
  for (int64_t r = 0; r < length(logit_rows); ++r)
    require_range("step: logit_rows[" + text(r) + "]", logit_rows.data()[r], 0, count - 1);
}

nb::object step(NativeModel& self, const Indices& tokens, const Indices& positions,
                const Indices& cached, const Array<int32_t, 3>& block_tables,
                const Indices& cu_seqlens, const Indices& logit_rows,
                const std::optional<Indices>& keep,
                const std::optional<Array<int32_t, 2>>& merged_tables) {
  const CacheArrays a{cached, block_tables, cu_seqlens, keep, merged_tables};
  check_step(self, tokens, positions, logit_rows, a);
  const int64_t vocab = self.model->weights().spec.vocab_size, rows = length(logit_rows);
  Buffer<float> logits(static_cast<size_t>(rows * vocab));
  const StepInput input{a.view(), tokens.data(),     positions.data(),
                        rows,     logit_rows.data(), logits.data.get()};
  if (input.cache.count > 0) {
    nb::gil_scoped_release release;
    self.model->step(input);
  }
  return nb::cast(logits.numpy(rows, vocab));
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
