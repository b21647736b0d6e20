// `lacewing::linear`, an operator of PyTorch's: activations of any float type and strides, threads
// of PyTorch's own (docs/adr/0007-torch.md).
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "api/check.h"
#include "api/module.h"
#include "api/torch_abi.h"
#include "api/workspace.h"
#include "core/dispatch.h"

namespace lacewing::torch {
namespace {

Api api;

// PyTorch turns it into a RuntimeError.
void require(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error("lacewing::linear: " + message);
}

// The interface only fails for arguments that no tensor has.
void check(Error error) { require(error == 0, "a call to PyTorch failed"); }

template <class T>
T read(Error (*function)(Tensor, T*), Tensor tensor) {
  T value;
  check(function(tensor, &value));
  return value;
}

// ---- what the stack holds

class OwnedTensor {
 public:
  explicit OwnedTensor(Value value) : handle_(reinterpret_cast<Tensor>(value)) {}
  ~OwnedTensor() {
    if (handle_) api.aoti_torch_delete_tensor_object(handle_);
  }
  OwnedTensor(const OwnedTensor&) = delete;
  OwnedTensor& operator=(const OwnedTensor&) = delete;

  explicit operator bool() const { return handle_ != nullptr; }
  Tensor get() const { return handle_; }
  Tensor release() { return std::exchange(handle_, nullptr); }
  void* data() const { return read(api.aoti_torch_get_data_ptr, handle_); }
  bool contiguous() const { return read(api.aoti_torch_is_contiguous, handle_); }
  int32_t dtype() const { return read(api.aoti_torch_get_dtype, handle_); }
  size_t bytes() const {
    return static_cast<size_t>(read(api.aoti_torch_get_numel, handle_)) *
           api.aoti_torch_dtype_element_size(dtype());
  }

 private:
  Tensor handle_;
};

Value unbox(Value optional) {
  auto* box = reinterpret_cast<Value*>(optional);
  if (!box) return 0;
  const Value value = *box;
  if (api.torch_delete_stable_ivalue)
    api.torch_delete_stable_ivalue(box);
  else
    delete box;
  return value;
}

class OwnedString {
 public:
  explicit OwnedString(Value value) : handle_(reinterpret_cast<String>(value)) {}
  ~OwnedString() { api.torch_delete_string(handle_); }
  OwnedString(const OwnedString&) = delete;
  OwnedString& operator=(const OwnedString&) = delete;

  std::string_view view() const {
    const char* text;
    size_t length;
    check(api.torch_string_c_str(handle_, &text));
    check(api.torch_string_length(handle_, &length));
    return {text, length};
  }

 private:
  String handle_;
};

// ---- weights

int find_format(std::string_view name) {
  for (int i = 0; i < kFormatCount; ++i)
    if (name == kFormatInfo[i].name) return i;
  throw std::runtime_error("lacewing::linear: there is no weight format `" + std::string(name) +
                           "`");
}

bool same(const PackedTensor& a, const PackedTensor& b) {
  return a.format == b.format && a.n == b.n && a.k == b.k &&
         std::equal(a.parts, a.parts + kMaxParts, b.parts) &&
         std::equal(a.part_bytes, a.part_bytes + kMaxParts, b.part_bytes);
}

// Checks a weight when it is first seen: a sparse one is read as a whole. What is written over its
// bytes afterwards is the writer's affair; `lacewing.nn.Linear` checks whatever it loads.
class Checked {
 public:
  void require_valid(const PackedTensor& w) {
    {
      const std::shared_lock lock(mutex_);
      const auto found = weights_.find(w.parts[0]);
      if (found != weights_.end() && same(found->second, w)) return;
    }
    const char* error = kFormatInfo[w.format].validate(w);
    require(!error, std::string("the weight is not in ") + kFormatInfo[w.format].name + ": " +
                        (error ? error : ""));
    const std::unique_lock lock(mutex_);
    weights_.insert_or_assign(w.parts[0], w);
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<const void*, PackedTensor> weights_;
};
Checked checked;

PackedTensor weight_of(const OwnedTensor& first, const OwnedTensor& second, int format, int64_t n,
                       int64_t k) {
  PackedTensor w{format, n, k, {}, {}};
  const OwnedTensor* parts[kMaxParts] = {&first, &second};
  for (int p = 0; p < kFormatInfo[format].parts; ++p) {
    require(bool(*parts[p]),
            std::string("the part `") + kFormatInfo[format].part_names[p] + "` is missing");
    require(parts[p]->contiguous(), "parts must be contiguous");
    w.parts[p] = static_cast<const uint8_t*>(parts[p]->data());
    w.part_bytes[p] = parts[p]->bytes();
    require(reinterpret_cast<uintptr_t>(w.parts[p]) % 8 == 0, "parts must be 8-byte aligned");
  }
  checked.require_valid(w);
  return w;
}

// ---- activations

Float float_of(const OwnedTensor& tensor, const char* what) {
  const int32_t dtype = tensor.dtype();
  if (dtype == api.aoti_torch_dtype_float32()) return Float::f32;
  if (dtype == api.aoti_torch_dtype_bfloat16()) return Float::bf16;
  require(dtype == api.aoti_torch_dtype_float16(),
          std::string(what) + " must be float32, bfloat16 or float16");
  return Float::f16;
}

// `[..., k]` with any strides, read a row at a time.
struct Matrix {
  const Float type;
  const uint8_t* const data;
  const int64_t dims;
  const int64_t* const sizes;
  const int64_t* const strides;
  int64_t m = 1;
  int64_t row_step = -1;  // elements from any row to the next, where they are as many; else -1

  explicit Matrix(const OwnedTensor& x)
      : type(float_of(x, "x")),
        data(static_cast<const uint8_t*>(x.data())),
        dims(read(api.aoti_torch_get_dim, x.get())),
        sizes(read(api.aoti_torch_get_sizes, x.get())),
        strides(read(api.aoti_torch_get_strides, x.get())) {
    require(dims >= 1, "x must be [..., k], got a scalar");
    for (int64_t d = 0; d < dims - 1; ++d) m *= sizes[d];
    if (evenly_spaced()) row_step = dims > 1 ? strides[dims - 2] : 0;
  }

  int64_t k() const { return sizes[dims - 1]; }

  // Row r in f32: where it lies, or in `space`, 2 k floats.
  const float* row(const KernelTable& table, int64_t r, float* space) const {
    const int64_t step = strides[dims - 1], size = float_bytes(type);
    const uint8_t* at = data + offset(r) * size;
    if (step != 1 && k() > 1) {
      auto* gathered = reinterpret_cast<uint8_t*>(space + k());
      for (int64_t i = 0; i < k(); ++i)
        std::memcpy(gathered + i * size, at + i * step * size, static_cast<size_t>(size));
      at = gathered;
    }
    if (type == Float::f32) return reinterpret_cast<const float*>(at);
    table.widen(type, at, k(), space);
    return space;
  }

 private:
  bool evenly_spaced() const {
    for (int64_t d = 0; d < dims - 2; ++d)
      if (strides[d] != strides[d + 1] * sizes[d + 1]) return false;
    return true;
  }

  int64_t offset(int64_t r) const {
    if (row_step >= 0) return r * row_step;
    int64_t elements = 0;
    for (int64_t d = dims - 2; d >= 0; --d) {
      elements += r % sizes[d] * strides[d];
      r /= sizes[d];
    }
    return elements;
  }
};

Tensor empty_like(const Matrix& x, int32_t dtype, int64_t n) {
  constexpr int64_t kDims = 64;  // PyTorch's own limit
  require(x.dims <= kDims, "x must have at most 64 dimensions");
  int64_t sizes[kDims], strides[kDims];
  int64_t step = 1;
  for (int64_t d = x.dims - 1; d >= 0; --d) {
    sizes[d] = d == x.dims - 1 ? n : x.sizes[d];
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  Tensor y;
  check(api.aoti_torch_empty_strided(x.dims, sizes, strides, dtype,
                                     api.aoti_torch_device_type_cpu(), 0, &y));
  return y;
}

// ---- the product

// fn(begin, end) over parts of [0, count) by PyTorch's threads; in one part if it is little work.
template <class F>
void parallel(int64_t count, bool little, F fn) {
  if (little) return fn(0, count);
  check(api.torch_parallel_for(
      0, count, 1, [](int64_t begin, int64_t end, void* f) { (*static_cast<F*>(f))(begin, end); },
      &fn));
}

thread_local Workspace row_space(size_t{8} << 20);
thread_local Workspace output_space(size_t{8} << 20);
constexpr int64_t kOutputBytes = 1 << 20;  // of f32 outputs on their way to 16 bits: stay in L2
constexpr int64_t kLittle = 1 << 17;       // products, or activations to quantize, for one thread

// Many rows by a small weight: threads share the rows, not the outputs, and what a thread has
// quantized is in its own cache when it multiplies.
constexpr int64_t kTile = 64;              // rows: threads get whole tiles
constexpr int64_t kTileRows = 256;         // that a thread takes at once: they stay in L2, too
constexpr size_t kTileWeight = 512 << 10;  // bytes that stay in L2

struct Product {
  const KernelTable& table;
  const PackedTensor& w;
  const Matrix& x;
  const float* bias;
  void* y;

  void run() const {
    if (tiles_pay())
      run_by_tiles();
    else
      run_by_strips();
  }

 private:
  bool tiles_pay() const {
    const size_t bytes = std::accumulate(w.part_bytes, w.part_bytes + kMaxParts, size_t{0});
    if (bytes > kTileWeight || x.m * w.k * w.n < kLittle) return false;
    uint32_t threads;
    check(api.torch_get_num_threads(&threads));
    return x.m >= int64_t{4} * threads * kTile;
  }

  // A thread takes its rows from x to y.
  void run_by_tiles() const {
    parallel((x.m + kTile - 1) / kTile, false, [&](int64_t begin, int64_t end) {
      const int64_t stop = std::min(end * kTile, x.m);
      for (int64_t first = begin * kTile; first < stop; first += kTileRows) {
        const Rows rows = take_rows(w.format, std::min(kTileRows, stop - first), w.k);
        quantize(rows, first, 0, rows.m);
        multiply(rows, first, 0, w.strips());
      }
    });
  }

  void run_by_strips() const {
    const Rows rows = take_rows(w.format, x.m, w.k);
    parallel(x.m, x.m * w.k < kLittle,
             [&](int64_t begin, int64_t end) { quantize(rows, 0, begin, end); });
    parallel(w.strips(), x.m * w.k * w.n < kLittle,
             [&](int64_t begin, int64_t end) { multiply(rows, 0, begin, end); });
  }

  // `rows` are those of x from `first` on.
  void quantize(const Rows& rows, int64_t first, int64_t begin, int64_t end) const {
    auto* space = reinterpret_cast<float*>(row_space.take(static_cast<size_t>(w.k) * 8));
    for (int64_t r = begin; r < end; ++r)
      table.quantize_row(x.row(table, first + r, space), w.k, rows, r, 0, row_groups(rows));
  }

  void multiply(const Rows& rows, int64_t first, int64_t begin, int64_t end) const {
    if (x.type == Float::f32)
      multiply_into(static_cast<float*>(y) + first * w.n, w.n, rows, begin, end);
    else
      multiply_narrow(rows, first, begin, end);
  }

  // `out` is where output 0 of row 0 would lie.
  void multiply_into(float* out, int64_t ldy, const Rows& rows, int64_t begin, int64_t end) const {
    table.formats[w.format].linear(
        {&w, &rows, bias, out, ldy, false, begin, end, scratch_space.take(kLinearScratch)});
  }

  void multiply_narrow(const Rows& rows, int64_t row, int64_t begin, int64_t end) const {
    const int64_t step = std::max<int64_t>(1, kOutputBytes / (rows.m * kStrip * 4));
    for (int64_t first = begin; first < end; first += step) {
      const int64_t last = std::min(end, first + step), ldy = (last - first) * kStrip;
      auto* space =
          reinterpret_cast<float*>(output_space.take(static_cast<size_t>(rows.m * ldy) * 4));
      multiply_into(space - first * kStrip, ldy, rows, first, last);
      const int64_t column = first * kStrip, columns = std::min(ldy, w.n - column);
      for (int64_t r = 0; r < rows.m; ++r)
        table.narrow(x.type, space + r * ldy, columns,
                     static_cast<uint8_t*>(y) + ((row + r) * w.n + column) * 2);
    }
  }
};

thread_local Workspace bias_space(size_t{8} << 20);

const float* bias_of(const KernelTable& table, const OwnedTensor& bias, int64_t n) {
  if (!bias) return nullptr;
  const Float type = float_of(bias, "bias");
  const int64_t count = read(api.aoti_torch_get_numel, bias.get());
  require(count == n,
          "bias must be [" + std::to_string(n) + "], got " + std::to_string(count) + " values");
  require(bias.contiguous(), "bias must be contiguous");
  if (type == Float::f32) return static_cast<const float*>(bias.data());
  auto* space = reinterpret_cast<float*>(bias_space.take(static_cast<size_t>(n) * 4));
  table.widen(type, bias.data(), n, space);
  return space;
}

// The arguments of nn/ops.py's operators in order.
void linear(Value* stack, uint64_t, uint64_t) {
  const OwnedTensor x(stack[0]), first(stack[1]), second(unbox(stack[2])), bias(unbox(stack[3]));
  const OwnedString format(stack[4]);
  const auto n = static_cast<int64_t>(stack[5]), k = static_cast<int64_t>(stack[6]);
  const KernelTable& table = default_table();
  const Matrix rows(x);
  require(rows.k() == k, "x must be [..., " + std::to_string(k) + "], got " +
                             std::to_string(rows.k()) + " columns");
  const PackedTensor w = weight_of(first, second, find_format(format.view()), n, k);
  const float* addend = bias_of(table, bias, n);
  OwnedTensor y(reinterpret_cast<Value>(empty_like(rows, x.dtype(), n)));
  if (rows.m > 0) Product{table, w, rows, addend, y.data()}.run();
  stack[0] = reinterpret_cast<Value>(y.release());
}

// Defines the operators and their kernel for the CPU; returns what of PyTorch's interface is
// missing, or "".
std::string define_operators(const std::vector<std::string>& schemas) {
  const std::string missing = find_api(&api);
  if (!missing.empty()) return missing;
  constexpr uint64_t kVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);  // of the interface
  Library fragment, kernels;  // kept: deleting one takes its operators back
  check(api.aoti_torch_library_init_fragment("lacewing", __FILE__, __LINE__, &fragment));
  check(api.aoti_torch_library_init_impl("lacewing", "CPU", __FILE__, __LINE__, &kernels));
  for (const std::string& schema : schemas) {
    check(api.aoti_torch_library_def(fragment, schema.c_str()));
    const std::string name = schema.substr(0, schema.find('('));
    check(api.torch_library_impl(kernels, name.c_str(), linear, kVersion));
  }
  return "";
}

}  // namespace
}  // namespace lacewing::torch

namespace lacewing {
namespace {

using Floats1 = Array<float, 1>;
using Halves1 = Array<uint16_t, 1>;
using Isa = std::optional<std::string>;

Float half_type(const std::string& where, const std::string& name) {
  require(name == "f16" || name == "bf16",
          where + ": type must be f16 or bf16, got `" + name + "`");
  return name == "f16" ? Float::f16 : Float::bf16;
}

nb::object widen(const Halves1& x, const std::string& type, const Isa& isa) {
  const auto n = static_cast<int64_t>(x.shape(0));
  Buffer<float> y(static_cast<size_t>(n));
  table_of(isa).widen(half_type("widen", type), x.data(), n, y.data.get());
  return nb::cast(y.numpy(n));
}

nb::object narrow(const Floats1& x, const std::string& type, const Isa& isa) {
  const auto n = static_cast<int64_t>(x.shape(0));
  Buffer<uint16_t> y(static_cast<size_t>(n));
  table_of(isa).narrow(half_type("narrow", type), x.data(), n, y.data.get());
  return nb::cast(y.numpy(n));
}

}  // namespace

void register_torch(nb::module_& m) {
  m.def("define_torch_operators", &torch::define_operators, nb::arg("schemas"),
        "Defines operators `lacewing::<schema>` that are `linear` for the CPU in the PyTorch that "
        "is loaded. Returns the name of what that PyTorch lacks, or an empty string.");
  m.def("widen", &widen, nb::arg("x"), nb::arg("type"), nb::arg("isa") = nb::none(),
        "Bits uint16 [n] of `f16` or `bf16` values as f32 [n].");
  m.def("narrow", &narrow, nb::arg("x"), nb::arg("type"), nb::arg("isa") = nb::none(),
        "f32 [n] as the bits uint16 [n] of `f16` or `bf16` values, to nearest even.");
}

}  // namespace lacewing
