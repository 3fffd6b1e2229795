// The expert feed-forward on blocks of rows, forward and backward, over the products of gemm.h.
//
// Work is cut into tasks that threads take in turn. A task of the up direction owns one block of rows and columns of
// one segment. A task of the down direction owns a slice of output columns and walks over all segments in order: the
// sum over experts then needs no atomics, no second buffer, and has one order whatever the number of threads.
#pragma once

#include "cpu/gemm.h"
#include "cpu/tasks.h"
#include "cpu/thin.h"

namespace {

using flex::Segment;

inline bool is_thin(const Segment& s, bool forward) {
  return s.rows <= (forward ? flex::kForwardThinRows : kThinRows);
}

// Columns of a task by whether its segment has few rows.
struct PackedCut {
  bool forward;
  int64_t wide, thin, rows = kBlockRows;

  PackedCut(const Segment* segments, int64_t count, bool forward, int64_t block, int threads)
      : forward(forward), wide(block) {
    int64_t columns = 0;
    for (int64_t i = 0; i < count; ++i) columns += is_thin(segments[i], forward) ? segments[i].width : 0;
    constexpr int64_t kUnit = flex::kPartialColumns;
    const int64_t share = pieces(columns, int64_t{4} * threads * kUnit) * kUnit;
    thin = smaller(share < kUnit ? kUnit : share, flex::kThinColumns);
  }

  int64_t columns(const Segment& s) const { return is_thin(s, forward) ? thin : wide; }
};

inline int64_t longest(const Segment* segments, int64_t count, int64_t hidden, int64_t factor) {
  int64_t most = hidden;
  for (int64_t i = 0; i < count; ++i)
    if (segments[i].width * factor > most) most = segments[i].width * factor;
  return most;
}

// The panels of a task whose segment is not thin: of the gate rows, then of the up rows. `columns`: of a whole task.
template <class E>
inline Panels<E> gate_and_up_panels(const Place& place, bool forward, int64_t hidden, int64_t columns) {
  Panels<E> panels(hidden, 2 * columns);
  if (is_thin(*place.segment, forward)) return panels;
  const Weight<E> gate = gate_up_of<E>(*place.segment).from(place.column, 0);
  panels.add(gate, place.columns, true);
  panels.add(gate.from(place.segment->width, 0), place.columns, true);
  return panels;
}

// Hands out the numbers of a loop, one ahead of their use: who takes a task knows which will be its next.
class Queue {
 public:
  int64_t take() {
    int64_t number;
#pragma omp atomic capture
    number = next_++;
    return number;
  }

 private:
  int64_t next_ = 0;
};

// Both halves of z for a task: gate in columns [0, lifted) of c, up from column `lifted` on, `lifted` being the task's
// columns in whole panels.
template <class E>
void gate_and_up(const typename E::T* x, int64_t hidden, const Place& place, bool forward, int64_t whole, float* c,
                 int64_t ldc, const Workspace& work, const Panels<E>& coming) {
  const Segment& s = *place.segment;
  const int32_t* tokens = address<const int32_t>(s.tokens) + place.first_row;
  const Weight<E> gate = gate_up_of<E>(s).from(place.column, 0), lift = gate.from(s.width, 0);
  if (is_thin(s, forward)) {
    const int64_t lifted = pieces(place.columns, kPanelColumns) * kPanelColumns;
    thin_product<E>(x, hidden, tokens, place.rows, hidden, gate, place.columns, true, c, ldc, work);
    thin_product<E>(x, hidden, tokens, place.rows, hidden, lift, place.columns, true, c + lifted, ldc, work);
    return;
  }
  product<E>(x, hidden, tokens, place.rows, gate_and_up_panels<E>(place, forward, hidden, whole), c, ldc, work, coming);
}

// a = silu(x gate^T) * (x up^T); keeps both products where the segment asks.
template <class E>
void up(const void* x, int64_t hidden, const Segment* segments, int64_t count, void* scratch, int64_t bytes,
        int threads) {
  using T = typename E::T;
  constexpr int64_t kColumns = kDeepColumns / 2;
  const Grid<PackedCut> grid(segments, count, true, kColumns, threads);
  const int64_t tasks = grid.tasks(segments, count);
  Queue queue;
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(scratch, bytes, thread_index(), hidden);
    for (int64_t task = queue.take(), next; task < tasks; task = next) {
      next = queue.take();
      const Place place = grid.place(task, segments);
      const Segment& s = *place.segment;
      const int64_t columns = place.columns, lifted = pieces(columns, kPanelColumns) * kPanelColumns;
      const Panels<E> coming = next < tasks ? gate_and_up_panels<E>(grid.place(next, segments), true, hidden, kColumns)
                                            : Panels<E>(0, kColumns);
      gate_and_up<E>(static_cast<const T*>(x), hidden, place, true, kColumns, work.c, 2 * lifted, work, coming);
      for (int64_t r = 0; r < place.rows; ++r) {
        const float* gate = work.c + r * 2 * lifted;
        const float* lift = gate + lifted;
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

// The right operand of a projection, [k, hidden], and the factor of each row (null for one).
template <class E>
struct Right {
  Weight<E> weight;
  int64_t k;
  bool transposed;
  const float* scale;
};

// The widest slice of whole units, at most about `width`, that gives every thread as many slices as any other:
// 576 columns for two threads are six slices of 96, not four of 128 and one of 64.
inline int64_t even_width(int64_t hidden, int64_t width, int threads, int64_t unit) {
  const int64_t slices = pieces(pieces(hidden, width), threads) * threads;
  return pieces(pieces(hidden, slices), unit) * unit;
}

// out[tokens] += scale * (rows B) with B [k, hidden] of each segment, a slice of columns at a time.
template <class E, class Operand>
void project(const Segment* segments, int64_t count, int64_t hidden, float* out, void* scratch, int64_t bytes,
             int threads, int64_t most, int64_t width, Operand operand) {
  using T = typename E::T;
  // Codes want whole groups.
  int64_t unit = kPanelColumns;
  for (int64_t i = 0; i < count; ++i)
    if (!operand(segments[i]).weight.stored()) unit = flex::kGroupColumns;
  width = even_width(hidden, width, threads, unit);
  const int64_t slices = pieces(hidden, width);
  // The columns of one segment that are computed at a time from `column` of a slice on.
  const auto panels_of = [&](int64_t i, int64_t slice, int64_t column) {
    const Right<E> right = operand(segments[i]);
    const int64_t whole = right.transposed ? kDeepColumns : kWideColumns;
    Panels<E> panels(right.k, whole);
    if (slice < slices && !is_thin(segments[i], right.transposed))
      panels.add(right.transposed ? right.weight.from(column, 0) : right.weight.from(0, column),
                 smaller(whole, smaller((slice + 1) * width, hidden) - column), right.transposed);
    return panels;
  };
  Queue queue;
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(scratch, bytes, thread_index(), most);
    for (int64_t slice = queue.take(), next; slice < slices; slice = next) {
      next = queue.take();
      const int64_t start = slice * width, end = smaller(start + width, hidden);
      for (int64_t i = 0; i < count; ++i) {
        const Segment& s = segments[i];
        const Right<E> right = operand(s);
        const bool thin = is_thin(s, right.transposed);
        const int64_t across = thin ? width : right.transposed ? kDeepColumns : kWideColumns;
        for (int64_t column = start; column < end; column += across) {
          const int64_t columns = smaller(across, end - column);
          const int64_t ldc = pieces(columns, kPanelColumns) * kPanelColumns;
          const Panels<E> own = panels_of(i, slice, column);
          const Panels<E> coming = column + across < end ? panels_of(i, slice, column + across)
                                   : i + 1 < count       ? panels_of(i + 1, slice, start)
                                                         : panels_of(0, next, next * width);
          for (int64_t row = 0; row < s.rows; row += kBlockRows) {
            const int64_t rows = smaller(kBlockRows, s.rows - row);
            const T* from = address<const T>(s.hidden) + row * right.k;
            if (thin)
              thin_product<E>(from, right.k, nullptr, rows, right.k,
                              right.transposed ? right.weight.from(column, 0) : right.weight.from(0, column), columns,
                              right.transposed, work.c, ldc, work);
            else
              product<E>(from, right.k, nullptr, rows, own, work.c, ldc, work,
                         row + kBlockRows < s.rows ? own : coming);
            const int32_t* tokens = address<const int32_t>(s.tokens) + row;
            for (int64_t r = 0; r < rows; ++r)
              add_row<Float32>(work.c + r * ldc, right.scale ? right.scale[row + r] : 1.0f,
                               out + tokens[r] * hidden + column, columns);
          }
        }
      }
    }
  }
}

// out[tokens] += scale * (a down^T)
template <class E>
void down(const Segment* segments, int64_t count, int64_t hidden, float* out, void* scratch, int64_t bytes,
          int threads) {
  project<E>(segments, count, hidden, out, scratch, bytes, threads, longest(segments, count, hidden, 1), kDeepColumns,
             [](const Segment& s) {
               return Right<E>{down_of<E>(s), s.width, true, address<const float>(s.scale)};
             });
}

// dx[tokens] += dz gate_up
template <class E>
void down_backward(const Segment* segments, int64_t count, int64_t hidden, float* dx, void* scratch, int64_t bytes,
                   int threads) {
  // A slice reads a stretch of every weight row, each on a page of its own: these want to be long.
  int64_t width = kWideColumns;
  for (int64_t i = 0; i < count; ++i)
    if (is_thin(segments[i], false)) width = 2 * flex::kThinColumns;
  const int64_t share = pieces(hidden, int64_t{2} * threads * kPanelColumns) * kPanelColumns;
  project<E>(segments, count, hidden, dx, scratch, bytes, threads, longest(segments, count, hidden, 2),
             smaller(width, share), [](const Segment& s) {
               return Right<E>{gate_up_of<E>(s), 2 * s.width, false, nullptr};
             });
}

// da = dy down; with z recomputed or as kept: dz, <da, a> in part sums a column block, scale * a where asked for.
template <class E>
void up_backward(const void* x, const void* dy, int64_t hidden, const Segment* segments, int64_t count,
                 float* partial, void* scratch, int64_t bytes, int threads) {
  using T = typename E::T;
  constexpr int64_t kUnit = flex::kPartialColumns;
  const Grid<PackedCut> grid(segments, count, false, kBackwardColumns, threads);
  const int64_t tasks = grid.tasks(segments, count);
  const auto down_panels = [hidden](const Place& place) {
    Panels<E> panels(hidden, kBackwardColumns);
    if (!is_thin(*place.segment, false))
      panels.add(down_of<E>(*place.segment).from(0, place.column), place.columns, false);
    return panels;
  };
  const auto first_panels = [&](const Place& place) {
    return place.segment->preact ? down_panels(place) : gate_and_up_panels<E>(place, false, hidden, kBackwardColumns);
  };
  Queue queue;
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(scratch, bytes, thread_index(), hidden);
    for (int64_t task = queue.take(), next; task < tasks; task = next) {
      next = queue.take();
      const Place place = grid.place(task, segments);
      const Segment& s = *place.segment;
      const Panels<E> own = down_panels(place);
      const Panels<E> coming = next < tasks ? first_panels(grid.place(next, segments)) : Panels<E>(0, kBackwardColumns);
      const int64_t columns = place.columns, units = pieces(s.width, kUnit);
      const int32_t* tokens = address<const int32_t>(s.tokens) + place.first_row;
      float* sums = partial + place.first_row * units + place.column / kUnit;
      for (const Segment* before = segments; before != &s; ++before)
        sums += before->rows * pieces(before->width, kUnit);

      const int64_t lift = pieces(columns, kPanelColumns) * kPanelColumns, da = 2 * lift, across = 3 * lift;
      if (!s.preact)
        gate_and_up<E>(static_cast<const T*>(x), hidden, place, false, kBackwardColumns, work.c, across, work, own);
      if (is_thin(s, false))
        thin_product<E>(static_cast<const T*>(dy), hidden, tokens, place.rows, hidden,
                        down_of<E>(s).from(0, place.column), columns, false, work.c + da, across, work);
      else
        product<E>(static_cast<const T*>(dy), hidden, tokens, place.rows, own, work.c + da, across, work, coming);
      for (int64_t r = 0; r < place.rows; ++r) {
        const int64_t row = place.first_row + r;
        const float scale = address<const float>(s.scale)[row];
        // Part sums of one width, however wide the task.
        for (int64_t unit = 0; unit < columns; unit += kUnit) {
          const float* c = work.c + r * across + unit;
          const int64_t some = smaller(kUnit, columns - unit), column = place.column + unit;
          T* dz = address<T>(s.hidden) + 2 * row * s.width + column;
          T* scaled = s.scaled ? address<T>(s.scaled) + row * s.width + column : nullptr;
          float& sum = sums[r * units + unit / kUnit];
          if (s.preact) {
            const T* z = address<const T>(s.preact) + 2 * row * s.width + column;
            sum = swiglu_backward_row<E, Float32, E>(z, z + s.width, c + da, scale, dz, dz + s.width, scaled, some);
          } else {
            sum = swiglu_backward_row<Float32, Float32, E>(c, c + lift, c + da, scale, dz, dz + s.width, scaled, some);
          }
        }
      }
    }
  }
  add_parts(segments, count, partial);
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
