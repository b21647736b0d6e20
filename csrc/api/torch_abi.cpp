#include "api/torch_abi.h"

#include <dlfcn.h>

namespace lacewing::torch {
namespace {

template <class F>
bool look_up(void* library, const char* name, F** function) {
  *function = reinterpret_cast<F*>(dlsym(library, name));
  return *function != nullptr;
}

}  // namespace

std::string find_api(Api* api) {
  constexpr const char* kLibrary = "libtorch_cpu.so";
  void* library = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);  // stays loaded: our kernels call it
  if (!library) return kLibrary;
#define LACEWING_LOOK_UP(result, name, arguments) \
  if (!look_up(library, #name, &api->name)) return #name;
  LACEWING_TORCH_FUNCTIONS(LACEWING_LOOK_UP)
#undef LACEWING_LOOK_UP
  look_up(library, "torch_delete_stable_ivalue", &api->torch_delete_stable_ivalue);
  return "";
}

}  // namespace lacewing::torch
