// A CUDA driver without a device, for Triton's launcher: it takes what a real one takes, refuses what a real one
// refuses by its documentation, runs nothing, and writes a line of JSON for each module, tensor map and launch into the
// file that CUDA_DRIVER_LOG names. Pointers may be any host memory. The chip is an H200's sm_90.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { kSharedOptIn = 227 * 1024, kSharedOfMultiprocessor = 228 * 1024 };

static FILE* lines(void) {
  static FILE* file;
  const char* path = getenv("CUDA_DRIVER_LOG");
  if (!file) file = path ? fopen(path, "a") : stderr;
  setvbuf(file, NULL, _IOLBF, 0);
  return file;
}

CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = code == CUDA_SUCCESS ? "no error" : "refused by the driver without a device";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN         ? kSharedOptIn
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? kSharedOfMultiprocessor
           : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT                 ? 132
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK              ? 65536
           : attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE                            ? 32
                                                                                   : 1000;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return (void)device, *context = (CUcontext)1, CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return (void)stream, *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)image, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  (void)module;
  fprintf(lines(), "{\"loaded\": \"%s\"}\n", name);
  return *function = (CUfunction)strdup(name), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return (void)function, (void)attribute, (void)value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return (void)function, (void)config, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  return (void)function, (void)config, *clusters = 1, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return (void)attribute, *(CUdeviceptr*)data = pointer, CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return (void)limit, *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  (void)parameters, (void)extra;
  const unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
  fprintf(lines(), "{\"launched\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"shared\": %u}\n",
          (const char*)function, x, y, z, config->blockDimX, config->sharedMemBytes);
  const int fits = x && y && z && x < 1u << 31 && y < 1u << 16 && z < 1u << 16;
  return fits && config->blockDimX <= 1024 && config->sharedMemBytes <= kSharedOptIn ? CUDA_SUCCESS
                                                                                     : CUDA_ERROR_INVALID_VALUE;
}

static unsigned bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    default:
      return 4;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  (void)steps, (void)interleave, (void)promotion, (void)fill;
  static const unsigned kSpan[] = {1u << 31, 32, 64, 128};
  const unsigned inner = box[0] * bytes_of(type);
  int fits = (uintptr_t)address % 16 == 0 && rank >= 1 && rank <= 5 && inner % 16 == 0;
  fits &= swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && inner <= kSpan[swizzle];
  fprintf(lines(), "{\"map\": [");
  for (cuuint32_t i = 0; i < rank; ++i) {
    fits &= sizes[i] >= 1 && sizes[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256;
    if (i + 1 < rank) fits &= strides[i] % 16 == 0 && strides[i] < 1ull << 40;
    fprintf(lines(), "%s%u", i ? ", " : "", box[i]);
  }
  fprintf(lines(), "], \"type\": %d}\n", (int)type);
  memset(map, 0, sizeof *map);
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
