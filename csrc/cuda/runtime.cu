// What Python asks of the CUDA runtime that this extension is linked with.

#include <cuda_runtime.h>

#include "launchers.h"

namespace flex {

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int device_count(int* count) { return cudaGetDeviceCount(count); }

}  // namespace flex
