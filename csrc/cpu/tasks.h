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

// Hands out the tasks [0, count) in two lanes, [0, middle) and [middle, count), one ahead of their use: who takes a
// task knows which will be its next. Threads of even index begin with the first lane, the others with the second, and
// whose lane has ended goes on in the other one. Every thread's first task is fixed, so that none takes two while
// another has none.
class Queue {
 public:
  explicit Queue(int64_t count) : Queue(count, count) {}
  Queue(int64_t count, int64_t middle) : end_{middle, count} {}

  // One thread's turn: its first task, then one after another; the count where there is none left.
  class Turn {
   public:
    Turn(Queue& queue, int thread, int threads) : queue_(queue), lane_(thread % 2), begin_{0, queue.end_[0]} {
      for (int i = 0; i < threads; ++i) {
        int lane = i % 2;
        if (begin_[lane] == queue.end_[lane]) lane = 1 - lane;
        const bool some = begin_[lane] < queue.end_[lane];
        if (i == thread) first_ = some ? begin_[lane] : queue.end_[1];
        begin_[lane] += some;
      }
    }

    int64_t first() const { return first_; }

    int64_t take() {
      for (int i = 0; i < 2; ++i, lane_ = 1 - lane_) {
        int64_t taken;
#pragma omp atomic capture
        taken = queue_.taken_[lane_]++;
        if (begin_[lane_] + taken < queue_.end_[lane_]) return begin_[lane_] + taken;
      }
      return queue_.end_[1];
    }

   private:
    Queue& queue_;
    int lane_;
    int64_t begin_[2], first_ = 0;
  };

  Turn turn() { return Turn(*this, thread_index(), team_size()); }

 private:
  int64_t end_[2], taken_[2] = {0, 0};
};

// Where the segments of many rows begin that stand last, behind others: multiplying is their bound, reading weights
// that of the others, and threads at both at once use the machine best. `count` where there is no such mixture.
inline int64_t first_of_many(const flex::Segment* segments, int64_t count) {
  int64_t first = count;
  while (first > 0 && segments[first - 1].rows > flex::kFewRows) --first;
  return first ? first : count;
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
