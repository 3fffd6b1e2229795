// The kernels for AVX2, FMA and F16C. Everything here lies in an anonymous namespace and no standard
// template is used: a function that the linker shared with other files could run there on a processor without
// these instructions.
#include "cpu/vector_avx2.h"
#include "cpu/rows.h"
#include "cpu/fused_any.h"
#include "cpu/router_products.h"
#include "cpu/weight_gradient.h"

namespace flex {

extern const Kernels avx2_table;
const Kernels avx2_table = {"avx2", true, false, swiglu_any, swiglu_backward_any, scatter_add_any,
                             router_product_any, router_input_gradient_any, router_rows_gradient_any,
                             up_any, down_any, up_backward_any, down_backward_any, weight_gradient_any};

}  // namespace flex
