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

// Threads at work in this region, which may be fewer than were asked for.
inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Hands out the numbers of a loop, one ahead of their use: who takes a task knows which will be its next. A thread
// begins with the task of its own index, so that none takes two while another has none.
class Queue {
 public:
  int64_t take() {
    int64_t taken;
#pragma omp atomic capture
    taken = taken_++;
    return team_size() + taken;
  }

 private:
  int64_t taken_ = 0;
};

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

// How segments are cut into tasks of rows and columns, numbered from the first segment on. `Cut` has
// `rows_of(segment)` and `columns(segment)`, of a task. No sum depends on the cut, so it may follow the threads.
template <class Cut>
struct Grid : Cut {
  using Cut::Cut;

  int64_t tasks(const flex::Segment& s) const {
    return pieces(s.rows, this->rows_of(s)) * pieces(s.width, this->columns(s));
  }
  int64_t tasks(const flex::Segment* segments, int64_t count) const {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += tasks(segments[i]);
    return total;
  }

  Place place(int64_t number, const flex::Segment* segments) const {
    const flex::Segment* s = segments;
    for (; number >= tasks(*s); ++s) number -= tasks(*s);
    const int64_t rows = this->rows_of(*s), columns = this->columns(*s), across = pieces(s->width, columns);
    const int64_t row = number / across * rows, column = number % across * columns;
    return {s, row, smaller(rows, s->rows - row), column, smaller(columns, s->width - column)};
  }
};

// dscale of every row from its part sums, in the order of the columns.
inline void add_parts(const flex::Segment* segments, int64_t count, const float* partial) {
  for (int64_t i = 0; i < count; ++i) {
    const flex::Segment& s = segments[i];
    const int64_t units = pieces(s.width, flex::kPartialColumns);
    for (int64_t r = 0; r < s.rows; ++r, partial += units) {
      float total = 0.0f;
      for (int64_t b = 0; b < units; ++b) total += partial[b];
      address<float>(s.dscale)[r] = total;
    }
  }
}

}  // namespace
