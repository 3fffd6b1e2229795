// What tasks of every engine share: threads, addresses and weights in segments, the place of a task, part sums.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/kernels.h"
#include "cpu/weights.h"

namespace {

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <class T>
inline T* address(int64_t word) { return reinterpret_cast<T*>(static_cast<uintptr_t>(word)); }

template <class E>
inline Weight<E> gate_up_of(const flex::Segment& s) {
  return {address<const char>(s.gate_up), s.gate_up_ld, address<const uint16_t>(s.gate_up_scales),
          s.gate_up_scales_ld, s.gate_up_kind, 0, 0};
}

template <class E>
inline Weight<E> down_of(const flex::Segment& s) {
  return {address<const char>(s.down), s.down_ld, address<const uint16_t>(s.down_scales), s.down_scales_ld,
          s.down_kind, 0, 0};
}

// A task: rows and columns of one segment.
struct Place {
  const flex::Segment* segment;
  int64_t first_row, rows, column, columns;
};

// dscale of every row from its part sums, in the order of the columns.
inline void add_parts(const flex::Segment* segments, int64_t count, const float* partial) {
  for (int64_t i = 0; i < count; ++i) {
    const flex::Segment& s = segments[i];
    const int64_t units = (s.width + flex::kPartialColumns - 1) / flex::kPartialColumns;
    for (int64_t r = 0; r < s.rows; ++r, partial += units) {
      float total = 0.0f;
      for (int64_t b = 0; b < units; ++b) total += partial[b];
      address<float>(s.dscale)[r] = total;
    }
  }
}

}  // namespace
