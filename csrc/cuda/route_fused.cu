// Router and gates for few tokens, the thin product included: at small T launches cost more than arithmetic.
//
// Letters: T tokens, H hidden, E routed experts, K chosen, G sigmoid gates.

#include "select.cuh"

namespace flex {
namespace {

constexpr int kWarps = 16;
constexpr int kRowsPerWarp = 4;

// The products of one token with ROWS rows, summed over the warp. ROWS loads are in flight for each load of x.
template <int ROWS, typename X, typename W>
__device__ __forceinline__ void dot_rows(const X* __restrict__ x_H, const W* __restrict__ rows_RH, int first, int count,
                                         int hidden, int lane, float* logits) {
  constexpr int VEC = kVectorBytes / sizeof(X);
  float sum[ROWS] = {};
  for (int h = lane * VEC; h < hidden; h += kWarp * VEC) {
    float x[VEC];
    load_floats(x_H + h, x);
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
      if (first + j < count) {
        float w[VEC];
        load_floats(rows_RH + static_cast<int64_t>(first + j) * hidden + h, w);
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[j] = fmaf(x[i], w[i], sum[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const float total = warp_sum(sum[j]);
    if (lane == 0 && first + j < count) logits[first + j] = total;
  }
}

template <int SLOTS>
__device__ __forceinline__ void select_from(const float* logits, const float* bias_E, int64_t token,
                                            const Routing& routing, const RoutingOutput& output, int lane) {
  float logit[SLOTS];
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) {
    const int expert = i * kWarp + lane;
    logit[i] = expert < routing.experts ? logits[expert] : 0.0f;
  }
  int id;
  float weight;
  select_experts<SLOTS>(logit, bias_E, routing, lane, id, weight);
  if (lane < routing.top_k) {
    output.ids_TK[token * routing.top_k + lane] = id;
    output.weights_TK[token * routing.top_k + lane] = weight;
    if (output.histogram_E != nullptr) atomicAdd(&output.histogram_E[id], 1);
  }
}

// Grid: T blocks of 16 warps, one token a block. Each warp multiplies x with groups of 4 router rows, or with one
// gate's row; then warp 0 chooses and warp 1 opens the gates. Shared memory: the E + G logits. Reads all rows once a
// token, from L2, hence for small T only.
template <typename X, typename W>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    route_fused_kernel(const X* __restrict__ x_TH, const W* __restrict__ weight_EH, const float* __restrict__ bias_E,
                       const float* __restrict__ gate_weight_GH, const float* __restrict__ gate_bias_G, int64_t tokens,
                       int hidden, Routing routing, RoutingOutput output) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t token = blockIdx.x;
  const X* const x_H = x_TH + token * hidden;
  float* const logits = reinterpret_cast<float*>(shared_memory);
  float* const gate_logits = logits + routing.experts;
  const int groups = (routing.experts + kRowsPerWarp - 1) / kRowsPerWarp;
  for (int group = warp; group < groups + routing.gates; group += kWarps) {
    if (group < groups) {
      dot_rows<kRowsPerWarp>(x_H, weight_EH, group * kRowsPerWarp, routing.experts, hidden, lane, logits);
    } else {
      dot_rows<1>(x_H, gate_weight_GH, group - groups, routing.gates, hidden, lane, gate_logits);
    }
  }
  __syncthreads();
  if (output.logits_TE != nullptr) {
    for (int e = threadIdx.x; e < routing.experts; e += blockDim.x) {
      output.logits_TE[token * routing.experts + e] = logits[e];
    }
  }
  if (warp == 0 && routing.top_k > 0) {
    if (routing.experts <= 64) {
      select_from<2>(logits, bias_E, token, routing, output, lane);
    } else if (routing.experts <= 128) {
      select_from<4>(logits, bias_E, token, routing, output, lane);
    } else {
      select_from<16>(logits, bias_E, token, routing, output, lane);
    }
  }
  if (warp == 1 && lane < routing.gates) {
    output.gates_GT[lane * tokens + token] = sigmoid(gate_logits[lane] + gate_bias_G[lane]);
  }
}

template <typename X, typename W>
int launch_typed(void* stream, const void* x_TH, const void* weight_EH, const float* bias_E, const float* gate_weight_GH,
                 const float* gate_bias_G, int64_t tokens, int hidden, Routing routing, RoutingOutput output) {
  const bool fits = hidden % (kVectorBytes / sizeof(X)) == 0;
  if (!fits || !aligned(x_TH) || !aligned(weight_EH) || !aligned(gate_weight_GH)) return cudaErrorInvalidValue;
  const int shared_bytes = (routing.experts + routing.gates) * static_cast<int>(sizeof(float));
  return launch(route_fused_kernel<X, W>,
                dim3(static_cast<unsigned>(tokens)), dim3(kWarps * kWarp), shared_bytes, stream,
                static_cast<const X*>(x_TH), static_cast<const W*>(weight_EH), bias_E, gate_weight_GH, gate_bias_G,
                tokens, hidden, routing, output);
}

}  // namespace

int launch_route_fused(int device, void* stream, const void* x_TH, int x_dtype, const void* weight_EH, int weight_dtype,
                       const float* bias_E, const float* gate_weight_GH, const float* gate_bias_G, int64_t tokens,
                       int hidden, Routing routing, RoutingOutput output) {
  if (tokens == 0) return 0;
  if (const int error = use_device(device)) return error;
  const auto run = [&](auto* kernel) {
    return kernel(stream, x_TH, weight_EH, bias_E, gate_weight_GH, gate_bias_G, tokens, hidden, routing, output);
  };
  const bool same = weight_dtype == x_dtype;
  if (!same && weight_dtype != kFloat32) return cudaErrorInvalidValue;
  switch (x_dtype) {
    case kFloat32:
      return run(launch_typed<float, float>);
    case kBFloat16:
      return run(same ? launch_typed<__nv_bfloat16, __nv_bfloat16> : launch_typed<__nv_bfloat16, float>);
    case kFloat16:
      return run(same ? launch_typed<__half, __half> : launch_typed<__half, float>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flex
