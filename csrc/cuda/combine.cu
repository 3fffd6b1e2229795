// The layer's output from its parts, in one pass; with unit weights and gates, the sum of input gradients: GPU plan,
// steps 4 and 5.
//
// Letters: T tokens, H hidden, K chosen, N rows in expert order.

#include "common.cuh"

namespace flex {
namespace {

constexpr int kThreads = 256;
// Rows that are loaded before the first of them is added.
constexpr int kBatch = 4;

template <typename T, int VEC>
__device__ __forceinline__ void add_term(const void* term_TH, const float* gate_T, int64_t token, int64_t element,
                                         float (&sum)[VEC]) {
  float value[VEC];
  load_floats(static_cast<const T*>(term_TH) + element, value);
  const float factor = gate_T == nullptr ? 1.0f : gate_T[token];
#pragma unroll
  for (int i = 0; i < VEC; ++i) sum[i] = fmaf(factor, value[i], sum[i]);
}

// y[t] = r + g p, or (1 - g) r + g p when convex, with r = sum_k w[t,k] rows[inverse[t K + k]] + g_s shared[t].
//
// Grid: (ceil(T / block.y), ceil(H / (VEC block.x))); a thread owns VEC neighbouring elements of one token. Sums run in
// float32 in the order of k. Reads K + 2 rows a token at most, writes one; 16 bytes an access where alignment allows.
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads) combine_kernel(Combination c) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t h = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * VEC;
  if (token >= c.tokens || h >= c.hidden) return;
  const T* const rows_NH = static_cast<const T*>(c.rows_NH);
  float sum[VEC] = {};
  for (int first = 0; first < c.top_k; first += kBatch) {
    int32_t row[kBatch];
    float weight[kBatch], value[kBatch][VEC];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t slot = token * c.top_k + first + j;
      row[j] = first + j < c.top_k ? c.inverse_N[slot] : -1;
      weight[j] = row[j] >= 0 && c.weights_TK != nullptr ? c.weights_TK[slot] : 1.0f;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (row[j] >= 0) load_floats(rows_NH + static_cast<int64_t>(row[j]) * c.hidden + h, value[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (row[j] >= 0) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[i] = fmaf(weight[j], value[j][i], sum[i]);
      }
    }
  }
  const int64_t element = token * c.hidden + h;
  if (c.shared_TH != nullptr) add_term<T>(c.shared_TH, c.shared_gate_T, token, element, sum);
  if (c.personal_TH != nullptr) {
    if (c.convex) {
      const float kept = 1.0f - (c.gate_T == nullptr ? 1.0f : c.gate_T[token]);
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum[i] *= kept;
    }
    add_term<T>(c.personal_TH, c.gate_T, token, element, sum);
  }
  Pack<T, VEC> out;
#pragma unroll
  for (int i = 0; i < VEC; ++i) out.v[i] = from_float<T>(sum[i]);
  *reinterpret_cast<Pack<T, VEC>*>(static_cast<T*>(c.y_TH) + element) = out;
}

template <typename T, int VEC>
int launch_shaped(void* stream, const Combination& c) {
  const int vectors = static_cast<int>(ceil_div(c.hidden, VEC));
  int width = kWarp;
  while (width < vectors && width < kThreads) width *= 2;
  const dim3 block(width, kThreads / width);
  const dim3 grid(static_cast<unsigned>(ceil_div(c.tokens, block.y)), static_cast<unsigned>(ceil_div(vectors, width)));
  return launch(combine_kernel<T, VEC>, grid, block, 0, stream, c);
}

template <typename T>
int launch_typed(void* stream, const Combination& c) {
  constexpr int kVec = kVectorBytes / sizeof(T);
  const bool vectors = c.hidden % kVec == 0 && aligned(c.rows_NH) && aligned(c.personal_TH) && aligned(c.shared_TH) &&
                       aligned(c.y_TH);
  return vectors ? launch_shaped<T, kVec>(stream, c) : launch_shaped<T, 1>(stream, c);
}

}  // namespace

int launch_combine(int device, void* stream, Combination combination, int dtype) {
  if (combination.tokens == 0 || combination.hidden == 0) return 0;
  if (const int error = use_device(device)) return error;
  switch (dtype) {
    case kFloat32:
      return launch_typed<float>(stream, combination);
    case kBFloat16:
      return launch_typed<__nv_bfloat16>(stream, combination);
    case kFloat16:
      return launch_typed<__half>(stream, combination);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flex
