/* The CUDA driver's functions that Triton's launcher calls, with nothing behind them: no device, no work.
 * Built as libcuda.so.1 by benchmarks/pretend_gpu.py, so that the launcher's own C code runs unchanged on a machine
 * without a GPU. A function's handle is its index in a table of names, by which launches are counted. */

#include <stdint.h>
#include <string.h>

#define LIMIT 256
static char names[LIMIT][128];
static long counts[LIMIT];
static int known;

int cuLaunchKernelEx(const void* config, void* function, void** params, void** extra) {
  counts[(uintptr_t)function]++;
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (known + 1 == LIMIT) return 1;
  strncpy(names[++known], name, sizeof names[0] - 1);
  *function = (void*)(uintptr_t)known;
  return 0;
}

long no_op_driver_count(int index) { return counts[index]; }
const char* no_op_driver_name(int index) { return names[index]; }
int no_op_driver_known(void) { return known; }

/* Large enough for every limit that is asked: shared memory of sm_90, threads a block. */
int cuDeviceGetAttribute(int* value, int attribute, int device) { *value = 227 * 1024; return 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { *value = 1024; return 0; }
int cuPointerGetAttribute(uint64_t* value, int attribute, uint64_t pointer) { *value = pointer; return 0; }
int cuCtxGetCurrent(void** context) { *context = names; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuModuleUnload(void* module) { return 0; }
int cuStreamIsCapturing(void* stream, int* status) { *status = 0; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 0; return 0; }
int cuDriverGetVersion(int* version) { *version = 13020; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "an error of the driver that does nothing"; return 0; }
int cuModuleLoadData(void** module, const void* image) { *module = names; return 0; }
int cuTensorMapEncodeTiled(void* map) { return 0; }
int cuTensorMapEncodeIm2col(void* map) { return 0; }
int cuCtxGetLimit(size_t* value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = names; return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) { *clusters = 1; return 0; }
