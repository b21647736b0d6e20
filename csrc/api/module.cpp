// The compiled module `lacewing._C`: each file of api/ registers its part and checks every
// argument.
#include "api/module.h"

NB_MODULE(_C, m) {
  m.doc() = "Lacewing's compiled module: packed linear layers, the native decoder, the machine";
  lacewing::register_attention(m);
  lacewing::register_cache(m);
  lacewing::register_linear(m);
  lacewing::register_model(m);
  lacewing::register_select(m);
  lacewing::register_system(m);
  lacewing::register_torch(m);
}
