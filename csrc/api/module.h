// Shared by the files of api/.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <optional>
#include <string>

#include "core/kernels.h"

namespace nb = nanobind;

namespace lacewing {

void register_attention(nb::module_& m);
void register_cache(nb::module_& m);
void register_linear(nb::module_& m);
void register_model(nb::module_& m);
void register_select(nb::module_& m);
void register_system(nb::module_& m);
void register_torch(nb::module_& m);

// A validated packed weight that keeps its parts' arrays alive. `w` borrows from them.
struct Tensor {
  std::string format;
  PackedTensor w;
  nb::object arrays[kMaxParts];
};

// Index of a format, or ValueError naming those there are.
int format_index(const std::string& name);

// Index of a KV cache format, or ValueError from `where` naming those there are.
int kv_index(const std::string& where, const std::string& name);

// The table of an ISA by name; the default one for None. ValueError if it cannot run here.
const KernelTable& table_of(const std::optional<std::string>& isa);

// Owner of `new float[]`-like buffers, not initialized, handed to numpy.
template <class T>
struct Buffer {
  explicit Buffer(size_t count) : data(new T[count ? count : 1]) {}
  std::unique_ptr<T[]> data;

  // A numpy array that takes the memory over.
  template <class... Shape>
  nb::ndarray<nb::numpy, T> numpy(Shape... shape) {
    T* p = data.release();
    nb::capsule owner(p, [](void* q) noexcept { delete[] static_cast<T*>(q); });
    return nb::ndarray<nb::numpy, T>(p, {static_cast<size_t>(shape)...}, owner);
  }
};

}  // namespace lacewing
