// The expert feed-forward on blocks of rows, forward and backward, over the products of gemm.h.
//
// Work is cut into tasks that threads take in turn. A task of the up direction owns one block of rows and columns of
// one segment. A task of the down direction owns a slice of output columns and walks over all segments in order: the
// sum over experts then needs no atomics, no second buffer, and has one order whatever the number of threads.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/gemm.h"

namespace {

using flex::Segment;

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <class T>
inline T* address(int64_t word) { return reinterpret_cast<T*>(static_cast<uintptr_t>(word)); }

// Task `number` of a grid of row blocks and column blocks over all segments.
struct Place {
  const Segment* segment;
  int64_t first_row, rows, column;
};

inline int64_t tasks_of(const Segment& s, int64_t block) { return pieces(s.rows, kBlockRows) * pieces(s.width, block); }

inline int64_t task_count(const Segment* segments, int64_t count, int64_t block) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += tasks_of(segments[i], block);
  return total;
}

inline Place place_of(int64_t number, const Segment* segments, int64_t block) {
  const Segment* s = segments;
  for (; number >= tasks_of(*s, block); ++s) number -= tasks_of(*s, block);
  const int64_t columns = pieces(s->width, block), row = number / columns * kBlockRows;
  return {s, row, smaller(kBlockRows, s->rows - row), number % columns * block};
}

inline int64_t longest(const Segment* segments, int64_t count, int64_t hidden, int64_t factor) {
  int64_t most = hidden;
  for (int64_t i = 0; i < count; ++i)
    if (segments[i].width * factor > most) most = segments[i].width * factor;
  return most;
}

// The panels of `columns` columns that start at `base`.
template <class E>
inline int cut(const typename E::T* base, int64_t ld, int64_t columns, bool transposed, Panel<E>* out) {
  int count = 0;
  for (int64_t j = 0; j < columns; j += kPanelColumns)
    out[count++] = {base + (transposed ? j * ld : j), ld, static_cast<int>(smaller(kPanelColumns, columns - j)),
                    transposed};
  return count;
}

// a = silu(x gate^T) * (x up^T); keeps both products where the segment asks.
template <class E>
void up(const void* x, int64_t hidden, const Segment* segments, int64_t count, void* scratch, int64_t bytes,
        int threads) {
  using T = typename E::T;
  constexpr int64_t kBlock = kBlockColumns / 2;
  const int64_t tasks = task_count(segments, count, kBlock);
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(scratch, bytes, thread_index(), hidden);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const Place place = place_of(task, segments, kBlock);
      const Segment& s = *place.segment;
      const T* weight = address<const T>(s.gate_up) + place.column * s.gate_up_ld;
      const int64_t columns = smaller(kBlock, s.width - place.column);
      Panel<E> panels[kPanels];
      const int half = cut<E>(weight, s.gate_up_ld, columns, true, panels);
      cut<E>(weight + s.width * s.gate_up_ld, s.gate_up_ld, columns, true, panels + half);
      product<E>(static_cast<const T*>(x), hidden, address<const int32_t>(s.tokens) + place.first_row, place.rows,
                 hidden, panels, 2 * half, work.c, kBlockColumns, work);
      for (int64_t r = 0; r < place.rows; ++r) {
        const float* gate = work.c + r * kBlockColumns;
        const float* lift = gate + half * kPanelColumns;
        const int64_t row = place.first_row + r;
        swiglu_row<Float32, E>(gate, lift, address<T>(s.hidden) + row * s.width + place.column, columns);
        if (!s.preact) continue;
        T* z = address<T>(s.preact) + 2 * row * s.width + place.column;
        over(columns, [&](int64_t c, int lanes) {
          put<E>(z + c, get<Float32>(gate + c, lanes), lanes);
          put<E>(z + s.width + c, get<Float32>(lift + c, lanes), lanes);
        });
      }
    }
  }
}

// out[tokens] += scale * (rows B) with B [k, hidden] of each segment, a slice of columns at a time.
template <class E, class Operand>
void project(const Segment* segments, int64_t count, int64_t hidden, float* out, void* scratch, int64_t bytes,
             int threads, int64_t most, Operand operand) {
  using T = typename E::T;
  const int64_t slices = pieces(hidden, kBlockColumns);
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(scratch, bytes, thread_index(), most);
#pragma omp for schedule(dynamic)
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t column = slice * kBlockColumns, columns = smaller(kBlockColumns, hidden - column);
      for (int64_t i = 0; i < count; ++i) {
        const Segment& s = segments[i];
        const auto from = operand(s, column, columns);
        for (int64_t row = 0; row < s.rows; row += kBlockRows) {
          const int64_t rows = smaller(kBlockRows, s.rows - row);
          product<E>(address<const T>(s.hidden) + row * from.k, from.k, nullptr, rows, from.k, from.panels, from.count,
                     work.c, kBlockColumns, work);
          const int32_t* tokens = address<const int32_t>(s.tokens) + row;
          for (int64_t r = 0; r < rows; ++r)
            add_row<Float32>(work.c + r * kBlockColumns, from.scale ? from.scale[row + r] : 1.0f,
                             out + tokens[r] * hidden + column, columns);
        }
      }
    }
  }
}

// The right operand of a projection: its panels, its length, and the factor of each row (null for one).
template <class E>
struct Right {
  Panel<E> panels[kPanels];
  int count;
  int64_t k;
  const float* scale;
};

// out[tokens] += scale * (a down^T)
template <class E>
void down(const Segment* segments, int64_t count, int64_t hidden, float* out, void* scratch, int64_t bytes,
          int threads) {
  project<E>(segments, count, hidden, out, scratch, bytes, threads, longest(segments, count, hidden, 1),
             [](const Segment& s, int64_t column, int64_t columns) {
               Right<E> right;
               auto* weight = address<const typename E::T>(s.down) + column * s.down_ld;
               right.count = cut<E>(weight, s.down_ld, columns, true, right.panels);
               right.k = s.width;
               right.scale = address<const float>(s.scale);
               return right;
             });
}

// dx[tokens] += dz gate_up
template <class E>
void down_backward(const Segment* segments, int64_t count, int64_t hidden, float* dx, void* scratch, int64_t bytes,
                   int threads) {
  project<E>(segments, count, hidden, dx, scratch, bytes, threads, longest(segments, count, hidden, 2),
             [](const Segment& s, int64_t column, int64_t columns) {
               Right<E> right;
               auto* weight = address<const typename E::T>(s.gate_up) + column;
               right.count = cut<E>(weight, s.gate_up_ld, columns, false, right.panels);
               right.k = 2 * s.width;
               right.scale = nullptr;
               return right;
             });
}

// da = dy down; with z recomputed or as kept: dz, <da, a> in part sums a column block, scale * a where asked for.
template <class E>
void up_backward(const void* x, const void* dy, int64_t hidden, const Segment* segments, int64_t count,
                 float* partial, void* scratch, int64_t bytes, int threads) {
  using T = typename E::T;
  constexpr int64_t kBlock = flex::kPartialColumns, kAcross = 3 * kBlock;
  const int64_t tasks = task_count(segments, count, kBlock);
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(scratch, bytes, thread_index(), hidden);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const Place place = place_of(task, segments, kBlock);
      const Segment& s = *place.segment;
      const int64_t columns = smaller(kBlock, s.width - place.column), blocks = pieces(s.width, kBlock);
      const int32_t* tokens = address<const int32_t>(s.tokens) + place.first_row;
      float* sums = partial + place.first_row * blocks + place.column / kBlock;
      for (const Segment* before = segments; before != &s; ++before)
        sums += before->rows * pieces(before->width, kBlock);

      Panel<E> panels[kPanels];
      if (!s.preact) {
        const T* weight = address<const T>(s.gate_up) + place.column * s.gate_up_ld;
        const int half = cut<E>(weight, s.gate_up_ld, columns, true, panels);
        cut<E>(weight + s.width * s.gate_up_ld, s.gate_up_ld, columns, true, panels + half);
        product<E>(static_cast<const T*>(x), hidden, tokens, place.rows, hidden, panels, 2 * half, work.c,
                   kAcross, work);
      }
      const int64_t lift = pieces(columns, kPanelColumns) * kPanelColumns, da = 2 * lift;
      const int third = cut<E>(address<const T>(s.down) + place.column, s.down_ld, columns, false, panels);
      product<E>(static_cast<const T*>(dy), hidden, tokens, place.rows, hidden, panels, third, work.c + da,
                 kAcross, work);
      for (int64_t r = 0; r < place.rows; ++r) {
        const int64_t row = place.first_row + r;
        const float* c = work.c + r * kAcross;
        const float scale = address<const float>(s.scale)[row];
        T* dz = address<T>(s.hidden) + 2 * row * s.width + place.column;
        T* scaled = s.scaled ? address<T>(s.scaled) + row * s.width + place.column : nullptr;
        float& sum = sums[r * blocks];
        if (s.preact) {
          const T* z = address<const T>(s.preact) + 2 * row * s.width + place.column;
          sum = swiglu_backward_row<E, Float32, E>(z, z + s.width, c + da, scale, dz, dz + s.width, scaled, columns);
        } else {
          sum = swiglu_backward_row<Float32, Float32, E>(c, c + lift, c + da, scale, dz, dz + s.width, scaled, columns);
        }
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    const int64_t blocks = pieces(s.width, kBlock);
    for (int64_t r = 0; r < s.rows; ++r, partial += blocks) {
      float total = 0.0f;
      for (int64_t b = 0; b < blocks; ++b) total += partial[b];
      address<float>(s.dscale)[r] = total;
    }
  }
}

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
