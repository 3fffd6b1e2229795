// The rows [Wr; w_g; w_s] of the thin product, prepared for a 16-bit tensor-core GEMM without losing float32 precision.
//
// A float32 value w is the sum of three 16-bit floats: w = a0 + s a1 + s^2 a2, each part rounding what the former left.
// x times the three rows, accumulated in float32 and added by `route`, is then as good as x times w, while x is read
// once in 16 bits. The scale s keeps float16 parts out of the subnormal range.
// Letters: H hidden, E routed experts, G sigmoid gates, R rows of the product.

#include "common.cuh"

namespace flex {
namespace {

constexpr int kThreads = 256;
constexpr int kParts = 3;

template <typename D>
__device__ __forceinline__ void split(float w, float part_scale, int64_t part_stride, D* out) {
  float rest = w, factor = 1.0f;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const D rounded = from_float<D>(rest / factor);
    out[part * part_stride] = rounded;
    rest -= to_float(rounded) * factor;
    factor *= part_scale;
  }
}

// Grid: (ceil(H / 256), E + G + padding rows): a thread reads one element of one source row and writes its parts.
template <typename D, typename W>
__global__ void __launch_bounds__(kThreads)
    split_rows_kernel(const W* __restrict__ weight_EH, const float* __restrict__ gate_weight_GH, D* __restrict__ rows_RH,
                      int experts, int gates, int hidden, int router_parts, float part_scale) {
  const int h = blockIdx.x * kThreads + threadIdx.x;
  if (h >= hidden) return;
  const int row = blockIdx.y;
  const int64_t source = static_cast<int64_t>(row) * hidden + h;
  if (row < experts) {
    if (router_parts == 1) {
      rows_RH[source] = from_float<D>(to_float(weight_EH[source]));
    } else {
      split(to_float(weight_EH[source]), part_scale, static_cast<int64_t>(experts) * hidden, rows_RH + source);
    }
  } else {
    const int gate = row - experts;
    D* const out = rows_RH + (static_cast<int64_t>(router_parts) * experts + gate) * hidden + h;
    if (gate < gates) {
      split(gate_weight_GH[static_cast<int64_t>(gate) * hidden + h], part_scale, static_cast<int64_t>(gates) * hidden,
            out);
    } else {
      out[static_cast<int64_t>(kParts - 1) * gates * hidden] = from_float<D>(0.0f);
    }
  }
}

template <typename D>
int launch_typed(void* stream, const void* weight_EH, bool full_precision, const float* gate_weight_GH, void* rows_RH,
                 int experts, int gates, int hidden, int rows, float part_scale) {
  const int parts = full_precision ? kParts : 1;
  const int padding = rows - parts * experts - kParts * gates;
  if (padding < 0) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(ceil_div(hidden, kThreads)), experts + gates + padding);
  if (grid.x == 0 || grid.y == 0) return 0;
  D* const out = static_cast<D*>(rows_RH);
  if (full_precision) {
    return launch(split_rows_kernel<D, float>, grid, dim3(kThreads), 0, stream, static_cast<const float*>(weight_EH),
                  gate_weight_GH, out, experts, gates, hidden, parts, part_scale);
  }
  return launch(split_rows_kernel<D, D>, grid, dim3(kThreads), 0, stream, static_cast<const D*>(weight_EH),
                gate_weight_GH, out, experts, gates, hidden, parts, part_scale);
}

}  // namespace

int launch_split_rows(int device, void* stream, const void* weight_EH, int weight_dtype, const float* gate_weight_GH,
                      void* rows_RH, int dtype, int experts, int gates, int hidden, int rows, float part_scale) {
  if (const int error = use_device(device)) return error;
  const bool full_precision = weight_dtype == kFloat32;
  if (!full_precision && weight_dtype != dtype) return cudaErrorInvalidValue;
  switch (dtype) {
    case kBFloat16:
      return launch_typed<__nv_bfloat16>(stream, weight_EH, full_precision, gate_weight_GH, rows_RH, experts, gates,
                                         hidden, rows, part_scale);
    case kFloat16:
      return launch_typed<__half>(stream, weight_EH, full_precision, gate_weight_GH, rows_RH, experts, gates, hidden,
                                  rows, part_scale);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flex
