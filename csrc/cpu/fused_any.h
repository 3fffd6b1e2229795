// The functions of fused.h for any dtype, as a table of kernels holds them.
#pragma once

#include "cpu/fused.h"

namespace {

void up_any(int dtype, const void* x, int64_t hidden, const Segment* segments, int64_t count, void* scratch,
            int64_t bytes, int threads) {
  FLEX_BY_DTYPE(dtype, up, x, hidden, segments, count, scratch, bytes, threads)
}

void down_any(int dtype, const Segment* segments, int64_t count, int64_t hidden, float* out, void* scratch,
              int64_t bytes, int threads) {
  FLEX_BY_DTYPE(dtype, down, segments, count, hidden, out, scratch, bytes, threads)
}

void up_backward_any(int dtype, const void* x, const void* dy, int64_t hidden, const Segment* segments, int64_t count,
                     float* partial, void* scratch, int64_t bytes, int threads) {
  FLEX_BY_DTYPE(dtype, up_backward, x, dy, hidden, segments, count, partial, scratch, bytes, threads)
}

void down_backward_any(int dtype, const Segment* segments, int64_t count, int64_t hidden, float* dx, void* scratch,
                       int64_t bytes, int threads) {
  FLEX_BY_DTYPE(dtype, down_backward, segments, count, hidden, dx, scratch, bytes, threads)
}

}  // namespace
