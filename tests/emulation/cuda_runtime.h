// CUDA's execution model on the host, enough of it to run csrc/cuda unchanged under a C++17 compiler.
//
// Blocks run one after another. Every CUDA thread of a block is a fiber; a scheduler picks the next runnable fiber at
// random (from a seed), and a fiber runs until it meets a barrier or a warp collective. A kernel whose result depends on
// the order of its threads, for want of a barrier, therefore changes its result with the seed. Shared memory is filled
// with a seeded pattern before each block, and a barrier or a collective that some thread never reaches is an error of
// the launch. Not modelled: timing, memory ordering weaker than sequential, alignment of device accesses beyond the
// host's, blocks that run at the same time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
using cudaError_t = cudaError;
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);

namespace emulation {

enum class Op { kSyncWarp, kShuffle, kMatchAny, kReduceMax, kReduceMin, kSyncBlock };

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
// Waits for every lane of `mask` (every living thread for kSyncBlock); returns this lane's result.
uint64_t meet(Op op, unsigned mask, uint64_t value, unsigned source_lane);
unsigned lane();

template <typename T>
T shuffle(unsigned mask, T value, unsigned source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "at most eight bytes travel at once");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(Op::kShuffle, mask, bits, source_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  return emulation::run(*config, [=] { kernel(arguments...); });
}

inline void __syncthreads() { emulation::meet(emulation::Op::kSyncBlock, 0, 0, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::meet(emulation::Op::kSyncWarp, mask, 0, 0); }
template <typename T>
T __shfl_sync(unsigned mask, T v, unsigned source_lane) {
  return emulation::shuffle(mask, v, source_lane % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, unsigned bits) {
  return emulation::shuffle(mask, v, emulation::lane() ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned offset) {
  return emulation::shuffle(mask, v, emulation::lane() >= offset ? emulation::lane() - offset : emulation::lane());
}
inline unsigned __match_any_sync(unsigned mask, int v) {
  return static_cast<unsigned>(emulation::meet(emulation::Op::kMatchAny, mask, static_cast<unsigned>(v), 0));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  return static_cast<unsigned>(emulation::meet(emulation::Op::kReduceMax, mask, v, 0));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  return static_cast<unsigned>(emulation::meet(emulation::Op::kReduceMin, mask, v, 0));
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline int32_t atomicAdd(int32_t* address, int32_t v) {
  const int32_t old = *address;
  *address += v;
  return old;
}
