// The kernels of any processor; products of matrices stay with torch.
#include "cpu/vector_generic.h"
#include "cpu/rows.h"

namespace flex {

const Kernels* generic_kernels() {
  static const Kernels kernels = {"generic", false, false, swiglu_any, swiglu_backward_any, scatter_add_any};
  return &kernels;
}

}  // namespace flex
