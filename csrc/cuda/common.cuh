// What every kernel shares: element types, 16-byte accesses, warp reductions, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launchers.h"

extern __shared__ __align__(16) unsigned char shared_memory[];

namespace flex {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }

// N neighbouring elements, moved by one instruction when they fill 16 bytes or less.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// VEC elements from p as floats, in accesses of at most 16 bytes. p must be aligned to the access.
template <int VEC, typename T>
__device__ __forceinline__ void load_floats(const T* p, float (&out)[VEC]) {
  constexpr int kStep = VEC * sizeof(T) <= kVectorBytes ? VEC : kVectorBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < VEC; i += kStep) {
    const Pack<T, kStep> pack = *reinterpret_cast<const Pack<T, kStep>*>(p + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) out[i + j] = to_float(pack.v[j]);
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// The extension links its own copy of the CUDA runtime, whose current device need not be the caller's.
inline int use_device(int device) {
  int current = -1;
  if (const int error = cudaGetDevice(&current)) return error;
  return current == device ? 0 : cudaSetDevice(device);
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, void* stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace flex
