// The part of PyTorch's stable C interface that we call (torch/csrc/stable/c/shim.h and
// torch/csrc/inductor/aoti_torch/c/shim.h, from PyTorch 2.10 on). Its functions are looked up in
// the libtorch that the process has loaded, so that building needs no PyTorch and one binary serves
// every version.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lacewing::torch {

// A value on the stack of a boxed kernel: an int64, a TensorHandle or StringHandle that the kernel
// then owns, or, where the schema says optional, null or an owned pointer to one of these.
using Value = uint64_t;
using Kernel = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);
using Part = void (*)(int64_t begin, int64_t end, void* context);
using Tensor = struct TensorHandle*;
using Library = struct LibraryHandle*;
using String = struct StringHandle*;
using Error = int32_t;

// X(result, name, arguments)
#define LACEWING_TORCH_FUNCTIONS(X)                                                             \
  X(Error, aoti_torch_library_init_fragment, (const char*, const char*, uint32_t, Library*))    \
  X(Error, aoti_torch_library_init_impl,                                                        \
    (const char*, const char*, const char*, uint32_t, Library*))                                \
  X(Error, aoti_torch_library_def, (Library, const char* schema))                               \
  X(Error, torch_library_impl, (Library, const char* name, Kernel, uint64_t version))           \
  X(Error, aoti_torch_get_data_ptr, (Tensor, void**))                                           \
  X(Error, aoti_torch_get_numel, (Tensor, int64_t*))                                            \
  X(Error, aoti_torch_get_dim, (Tensor, int64_t*))                                              \
  X(Error, aoti_torch_get_sizes, (Tensor, int64_t**))                                           \
  X(Error, aoti_torch_get_strides, (Tensor, int64_t**))                                         \
  X(Error, aoti_torch_get_dtype, (Tensor, int32_t*))                                            \
  X(Error, aoti_torch_is_contiguous, (Tensor, bool*))                                           \
  X(Error, aoti_torch_empty_strided,                                                            \
    (int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device, \
     int32_t device_index, Tensor*))                                                            \
  X(Error, aoti_torch_delete_tensor_object, (Tensor))                                           \
  X(size_t, aoti_torch_dtype_element_size, (int32_t dtype))                                     \
  X(int32_t, aoti_torch_dtype_float32, ())                                                      \
  X(int32_t, aoti_torch_dtype_bfloat16, ())                                                     \
  X(int32_t, aoti_torch_dtype_float16, ())                                                      \
  X(int32_t, aoti_torch_device_type_cpu, ())                                                    \
  X(Error, torch_string_length, (String, size_t*))                                              \
  X(Error, torch_string_c_str, (String, const char**))                                          \
  X(Error, torch_delete_string, (String))                                                       \
  X(Error, torch_get_num_threads, (uint32_t*))                                                  \
  X(Error, torch_parallel_for, (int64_t begin, int64_t end, int64_t grain, Part, void* context))

struct Api {
#define LACEWING_DECLARE(result, name, arguments) result(*name) arguments;
  LACEWING_TORCH_FUNCTIONS(LACEWING_DECLARE)
#undef LACEWING_DECLARE
  // Frees an optional's box; absent before 2.13, where it came from `new`.
  Error (*torch_delete_stable_ivalue)(Value*);
};

// Fills `api` from the loaded libtorch; returns what is missing, or "".
std::string find_api(Api* api);

}  // namespace lacewing::torch
