// Tensor, linear, gather_rows, quantize_rows, and which ISAs and formats there are.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "api/module.h"
#include "api/workspace.h"
#include "core/dispatch.h"

namespace lacewing {
namespace {

using Floats1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints1 = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes1 = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Isa = std::optional<std::string>;

std::string str(int64_t x) { return std::to_string(x); }

std::string format_list() {
  std::string all;
  for (const FormatInfo& f : kFormatInfo)
    all += (all.empty() ? "`" : ", `") + std::string(f.name) + "`";
  return all;
}

void require(bool ok, const std::string& message) {
  if (!ok) throw nb::value_error(message.c_str());
}

// ---- Tensor

void init_tensor(Tensor* self, const std::string& format, int64_t n, int64_t k,
                 const std::vector<nb::object>& parts) {
  const int index = format_index(format);
  const FormatInfo& info = kFormatInfo[index];
  require(static_cast<int>(parts.size()) == info.parts,
          "Tensor: `" + format + "` has " + str(info.parts) + " parts, got " +
              str(static_cast<int64_t>(parts.size())));
  Tensor t{format, {index, n, k, {}, {}}, {}};
  for (int p = 0; p < info.parts; ++p) {
    Bytes1 bytes;
    if (!nb::try_cast(parts[p], bytes, false))
      throw nb::type_error(("Tensor: part `" + std::string(info.part_names[p]) +
                            "` must be a contiguous 1-D uint8 array")
                               .c_str());
    require(reinterpret_cast<uintptr_t>(bytes.data()) % 8 == 0,
            "Tensor: part `" + std::string(info.part_names[p]) + "` must be 8-byte aligned");
    t.w.parts[p] = bytes.data();
    t.w.part_bytes[p] = bytes.size();
    t.arrays[p] = parts[p];
  }
  const char* error = info.validate(t.w);
  require(!error,
          "Tensor: `" + format + "` [" + str(n) + ", " + str(k) + "]: " + (error ? error : ""));
  new (self) Tensor(std::move(t));
}

// ---- linear

// Quantizes rows tid, tid + threads, ...
void quantize_share(const KernelTable& table, const float* x, int64_t k, const Rows& rows, int tid,
                    int threads) {
  const int64_t groups = row_groups(rows);
  for (int64_t r = tid; r < rows.m; r += threads)
    table.quantize_row(x + r * k, k, rows, r, 0, groups);
}

struct LinearRun {
  const KernelTable& table;
  const Tensor& weight;
  const float* x;
  const float* bias;
  int64_t m;
  float* y;

  void operator()(int threads) {
    const PackedTensor& w = weight.w;
    const Rows rows = take_rows(w.format, m, w.k);
    Pool& pool = Pool::instance();
    const int count = pool.resolve(threads);
    uint8_t* scratch = scratch_space.take(kLinearScratch * static_cast<size_t>(count));
    Barrier quantized(count, pool.may_spin(count));
    pool.run(count, [&](int tid, int n) {
      quantize_share(table, x, w.k, rows, tid, n);
      quantized.wait();
      const int64_t strips = w.strips(), begin = strips * tid / n, end = strips * (tid + 1) / n;
      if (begin < end)
        table.formats[w.format].linear({&w, &rows, bias, y, w.n, false, begin, end,
                                        scratch + kLinearScratch * static_cast<size_t>(tid)});
    });
  }
};

void check_linear(const Floats2& x, const Tensor& w, const std::optional<Floats1>& bias) {
  const int64_t k = static_cast<int64_t>(x.shape(1));
  require(k == w.w.k, "linear: x must have " + str(w.w.k) + " columns, got " + str(k));
  require(!bias || static_cast<int64_t>(bias->shape(0)) == w.w.n,
          "linear: bias must have " + str(w.w.n) + " values");
}

nb::object linear(const Floats2& x, const Tensor& w, const std::optional<Floats1>& bias,
                  const Isa& isa, int threads) {
  const int64_t m = static_cast<int64_t>(x.shape(0));
  check_linear(x, w, bias);
  require(threads >= 0, "linear: threads must be at least 0, got " + str(threads));
  const KernelTable& table = table_of(isa);
  Buffer<float> y(static_cast<size_t>(m * w.w.n));
  if (m > 0) {
    const float* px = x.data();
    const float* pb = bias ? bias->data() : nullptr;
    nb::gil_scoped_release release;
    LinearRun{table, w, px, pb, m, y.data.get()}(threads);
  }
  return nb::cast(y.numpy(m, w.w.n));
}

// Strips [first, last) of x w^T + bias into y or onto it: how the engine calls a kernel.
void linear_into(const Floats2& x, const Tensor& w, const Output& y,
                 const std::optional<Floats1>& bias, bool accumulate,
                 const std::optional<std::pair<int64_t, int64_t>>& strips, const Isa& isa) {
  const int64_t m = static_cast<int64_t>(x.shape(0));
  check_linear(x, w, bias);
  require(static_cast<int64_t>(y.shape(0)) == m && static_cast<int64_t>(y.shape(1)) >= w.w.n,
          "linear_into: y must be [" + str(m) + ", at least " + str(w.w.n) + "]");
  const auto [first, last] = strips.value_or(std::pair<int64_t, int64_t>{0, w.w.strips()});
  require(0 <= first && first <= last && last <= w.w.strips(),
          "linear_into: strips must lie in 0.." + str(w.w.strips()));
  const KernelTable& table = table_of(isa);
  if (m == 0 || first == last) return;
  const Rows rows = take_rows(w.w.format, m, w.w.k);
  quantize_share(table, x.data(), w.w.k, rows, 0, 1);
  table.formats[w.w.format].linear({&w.w, &rows, bias ? bias->data() : nullptr, y.data(),
                                    static_cast<int64_t>(y.shape(1)), accumulate, first, last,
                                    scratch_space.take(kLinearScratch)});
}

nb::object gather(const Tensor& w, const Ints1& ids, const Isa& isa) {
  const KernelTable& table = table_of(isa);
  const int64_t count = static_cast<int64_t>(ids.shape(0));
  for (int64_t i = 0; i < count; ++i)
    require(ids.data()[i] >= 0 && ids.data()[i] < w.w.n,
            "gather_rows: ids must be in 0.." + str(w.w.n - 1) + ", got " + str(ids.data()[i]));
  Buffer<float> out(static_cast<size_t>(count * w.w.k));
  {
    const int32_t* p = ids.data();
    nb::gil_scoped_release release;
    table.formats[w.w.format].gather_rows(w.w, p, count, out.data.get(), w.w.k);
  }
  return nb::cast(out.numpy(count, w.w.k));
}

// Undoes the interleaving of `Rows` for a look from Python.
nb::tuple plain_rows(const Rows& rows) {
  const int64_t groups = rows.k_pad / rows.group;
  Buffer<int8_t> q(static_cast<size_t>(rows.m * rows.k_pad));
  Buffer<float> scale(static_cast<size_t>(rows.m * groups));
  Buffer<int32_t> sum(static_cast<size_t>(rows.m * groups));
  for (int64_t r = 0; r < rows.m; ++r) {
    const int64_t block = r / kRowBlock, lane = r % kRowBlock, lanes = rows.rows_in(block);
    const int8_t* from = rows.q + block * kRowBlock * rows.k_pad;
    for (int64_t i = 0; i < rows.k_pad; ++i)
      q.data[r * rows.k_pad + i] = from[(i / 4 * lanes + lane) * 4 + i % 4];
    for (int64_t j = 0; j < groups; ++j) {
      const int64_t at = block * kRowBlock * groups + j * lanes + lane;
      scale.data[r * groups + j] = rows.scale[at];
      sum.data[r * groups + j] = rows.sum[at];
    }
  }
  return nb::make_tuple(q.numpy(rows.m, rows.k_pad), scale.numpy(rows.m, groups),
                        sum.numpy(rows.m, groups));
}

nb::object quantize(const Floats2& x, int group, const Isa& isa) {
  const FormatInfo* found =
      std::find_if(std::begin(kFormatInfo), std::end(kFormatInfo),
                   [&](const FormatInfo& format) { return group > 0 && format.group == group; });
  require(found != std::end(kFormatInfo),
          "quantize_rows: group must be 32, 64, 128 or 131072 (the whole row), got " + str(group));
  const KernelTable& table = table_of(isa);
  const FormatInfo& info = *found;
  const int64_t m = static_cast<int64_t>(x.shape(0)), k = static_cast<int64_t>(x.shape(1));
  require(k > 0, "quantize_rows: x must have at least 1 column");
  Memory memory(rows_bytes(info, m, k));
  const Rows rows = place_rows(info, m, k, memory.data());
  {
    nb::gil_scoped_release release;
    quantize_share(table, x.data(), k, rows, 0, 1);
  }
  return plain_rows(rows);
}

nb::list isa_list() {
  int count;
  const IsaStatus* isas = isa_status(&count);
  nb::list all;
  for (int i = 0; i < count; ++i) {
    nb::dict d;
    d["name"] = isas[i].name;
    d["usable"] = !isas[i].missing;
    d["missing"] = isas[i].missing ? nb::cast(isas[i].missing) : nb::none();
    d["emulated"] = isas[i].emulated;
    all.append(d);
  }
  return all;
}

std::string default_isa() { return default_table().isa; }

nb::list format_names() {
  nb::list all;
  for (const FormatInfo& f : kFormatInfo) all.append(f.name);
  return all;
}

}  // namespace

int format_index(const std::string& name) {
  for (int i = 0; i < kFormatCount; ++i)
    if (name == kFormatInfo[i].name) return i;
  throw nb::value_error(
      ("format must be one of " + format_list() + ", got `" + name + "`").c_str());
}

const KernelTable& table_of(const std::optional<std::string>& isa) {
  if (!isa) return default_table();
  const IsaStatus* status = find_isa(*isa);
  require(status, "isa must be one of " + isa_names() + ", got `" + *isa + "`");
  require(!status->missing, "isa `" + *isa + "` needs " + (status->missing ? status->missing : "") +
                                ", which is missing here");
  return *status->table;
}

void register_linear(nb::module_& m) {
  nb::class_<Tensor>(m, "Tensor", "A packed weight `[n, k]`; borrows and keeps its parts.")
      .def("__init__", &init_tensor, nb::arg("format"), nb::arg("n"), nb::arg("k"),
           nb::arg("parts"))
      .def_ro("format", &Tensor::format)
      .def_prop_ro("n", [](const Tensor& t) { return t.w.n; })
      .def_prop_ro("k", [](const Tensor& t) { return t.w.k; });
  m.def("linear", &linear, nb::arg("x"), nb::arg("w"), nb::arg("bias") = nb::none(),
        nb::arg("isa") = nb::none(), nb::arg("threads") = 0,
        "x f32 [m, k] times w [n, k] transposed, plus bias f32 [n]: f32 [m, n].");
  m.def("linear_into", &linear_into, nb::arg("x"), nb::arg("w"), nb::arg("y").noconvert(),
        nb::arg("bias") = nb::none(), nb::arg("accumulate") = false, nb::arg("strips") = nb::none(),
        nb::arg("isa") = nb::none(),
        "Outputs of strips [first, last) (16 each) into y f32 [m, >= n], or added to it.");
  m.def("gather_rows", &gather, nb::arg("w"), nb::arg("ids"), nb::arg("isa") = nb::none(),
        "Rows `ids` int32 [c] of w [n, k] as f32 [c, k].");
  m.def("quantize_rows", &quantize, nb::arg("x"), nb::arg("group"), nb::arg("isa") = nb::none(),
        "x f32 [m, k] as (q int8 [m, k_pad], scale f32 [m, groups], sum int32 [m, groups]).");
  m.def("isas", &isa_list,
        "Every ISA: name, usable, missing (the first missing feature), emulated.");
  m.def("default_isa", &default_isa, "The ISA in use; obeys LACEWING_ISA.");
  m.def("format_names", &format_names, "Every packed format.");
}

}  // namespace lacewing
