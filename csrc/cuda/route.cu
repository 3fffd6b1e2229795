// Router and gates from the logits of one thin product: GPU plan, step 1.
//
// Letters: T tokens, E routed experts, K chosen, G sigmoid gates, R columns of the product.

#include "select.cuh"

namespace flex {
namespace {

constexpr int kTokensPerBlock = 8;

// Grid: ceil(T / 8) blocks of 8 warps, one token a warp; no shared memory but the block's histogram, if one is wanted.
// Reads 4 R bytes a token, writes 8 K + 4 G (+ 4 E with logits). Every lane holds SLOTS = ceil(E / 32) logits, rounded
// up to a power of two.
template <int SLOTS>
__global__ void __launch_bounds__(kTokensPerBlock* kWarp)
    route_kernel(Logits logits, const float* __restrict__ bias_E, const float* __restrict__ gate_bias_G, int64_t tokens,
                 Routing routing, RoutingOutput output) {
  const int lane = threadIdx.x % kWarp;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kWarp;
  int32_t* const block_histogram = reinterpret_cast<int32_t*>(shared_memory);
  if (output.histogram_E != nullptr) {
    for (int e = threadIdx.x; e < routing.experts; e += blockDim.x) block_histogram[e] = 0;
    __syncthreads();
  }
  if (token < tokens) {
    const float* const row_R = logits.logits_TR + token * logits.stride;
    if (routing.top_k > 0) {
      float logit[SLOTS];
#pragma unroll
      for (int i = 0; i < SLOTS; ++i) {
        const int expert = i * kWarp + lane;
        logit[i] = 0.0f;
        if (expert < routing.experts) {
          logit[i] = row_R[expert];
          float factor = logits.part_scale;
          for (int part = 1; part < logits.parts; ++part, factor *= logits.part_scale) {
            logit[i] += factor * row_R[part * routing.experts + expert];
          }
          if (output.logits_TE != nullptr) output.logits_TE[token * routing.experts + expert] = logit[i];
        }
      }
      int id;
      float weight;
      select_experts<SLOTS>(logit, bias_E, routing, lane, id, weight);
      if (lane < routing.top_k) {
        output.ids_TK[token * routing.top_k + lane] = id;
        output.weights_TK[token * routing.top_k + lane] = weight;
        if (output.histogram_E != nullptr) atomicAdd(&block_histogram[id], 1);
      }
    }
    if (lane < routing.gates) {
      const float* const gate_row = row_R + logits.parts * routing.experts;
      float logit = gate_row[lane];
      float factor = logits.part_scale;
      for (int part = 1; part < logits.gate_parts; ++part, factor *= logits.part_scale) {
        logit += factor * gate_row[part * routing.gates + lane];
      }
      output.gates_GT[lane * tokens + token] = sigmoid(logit + gate_bias_G[lane]);
    }
  }
  if (output.histogram_E != nullptr) {
    __syncthreads();
    for (int e = threadIdx.x; e < routing.experts; e += blockDim.x) {
      if (block_histogram[e] > 0) atomicAdd(&output.histogram_E[e], block_histogram[e]);
    }
  }
}

}  // namespace

int launch_route(int device, void* stream, Logits logits, const float* bias_E, const float* gate_bias_G, int64_t tokens,
                 Routing routing, RoutingOutput output) {
  if (tokens == 0) return 0;
  if (const int error = use_device(device)) return error;
  auto* kernel = routing.experts <= 32    ? route_kernel<1>
                 : routing.experts <= 64  ? route_kernel<2>
                 : routing.experts <= 128 ? route_kernel<4>
                 : routing.experts <= 256 ? route_kernel<8>
                                          : route_kernel<16>;
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens, kTokensPerBlock)));
  const int shared_bytes = output.histogram_E == nullptr ? 0 : routing.experts * static_cast<int>(sizeof(int32_t));
  return launch(kernel, grid, dim3(kTokensPerBlock * kWarp), shared_bytes, stream, logits, bias_E, gate_bias_G, tokens,
                routing, output);
}

}  // namespace flex
