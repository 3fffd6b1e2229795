// The expert feed-forward on blocks of rows, forward and backward, over the products of dots.h, columns.h and thin.h.
//
// Work is cut into tasks that threads take in turn. A task of the up direction owns one block of rows and columns of
// one segment. A task of the down direction owns a slice of output columns and walks over all segments in order: the
// sum over experts then needs no atomics, no second buffer, and has one order whatever the number of threads.
#pragma once

#include "cpu/products.h"
#include "cpu/columns.h"
#include "cpu/dots.h"
#include "cpu/tasks.h"
#include "cpu/thin.h"
#if defined(__AVX512VNNI__)
#include "cpu/int8_products.h"
#else
#include "cpu/no_int8_products.h"
#endif

namespace {

using flex::Segment;

// Columns of a task. Forward: as many as share its packed rows while every thread has several tasks. Backward: by
// whether its segment has few rows.
struct PackedCut {
  int64_t wide = flex::kBackwardColumns, thin;

  PackedCut(const Segment* segments, int64_t count, bool forward, int threads) {
    constexpr int64_t kUnit = flex::kPartialColumns;
    int64_t columns = 0, all = 0;
    for (int64_t i = 0; i < count; ++i) {
      columns += is_thin(segments[i]) ? segments[i].width : 0;
      all += segments[i].width * pieces(segments[i].rows, kBlockRows);
    }
    const auto share = [&](int64_t columns, int64_t most) {
      const int64_t own = pieces(columns, int64_t{4} * threads * kUnit) * kUnit;
      return smaller(own < kUnit ? kUnit : own, most);
    };
    thin = share(columns, flex::kThinColumns);
    if (forward) wide = share(all, flex::kForwardColumns);
  }

  static bool is_thin(const Segment& s) {
    const bool codes = s.gate_up_kind != flex::kStored && s.down_kind != flex::kStored;
    return s.rows <= (codes ? flex::kThinCodeRows : flex::kThinRows);
  }
  int64_t columns(const Segment& s) const { return is_thin(s) ? thin : wide; }
  static int64_t rows_of(const Segment& s) { return s.rows ? pieces(s.rows, pieces(s.rows, kBlockRows)) : 1; }
};

inline int64_t longest(const Segment* segments, int64_t count, int64_t hidden, int64_t factor) {
  int64_t most = hidden;
  for (int64_t i = 0; i < count; ++i)
    if (segments[i].width * factor > most) most = segments[i].width * factor;
  return most;
}

// Rows of both halves of gate_up for a task: gate, then up.
template <class E>
inline WeightRows<E> gate_and_up_rows(const Place& place, int64_t hidden) {
  const Weight<E> gate = gate_up_of<E>(*place.segment).from(place.column, 0);
  return WeightRows<E>(gate, place.columns, hidden).with(gate.from(place.segment->width, 0));
}

// Both halves of z for a task: gate in columns [0, lifted) of c, up from column `lifted` on, `lifted` being the task's
// columns in whole panels.
template <class E>
void gate_and_up(const typename E::T* x, int64_t hidden, const Place& place, float* c, int64_t ldc,
                 const Workspace& work, const Area& coming) {
  if (in_int8(*place.segment)) {
    const Int8Operand rows = operand_of(*place.segment, hidden);
    const Weight<E> gate = gate_up_of<E>(*place.segment).from(place.column, 0);
    const Weight<E> lift = gate.from(place.segment->width, 0);
    const Area first = lift.area(0, 1, 0, hidden);
    int8_rows_product<E>(rows, place.first_row, place.rows, gate, place.columns, c, ldc, work, first);
    c += pieces(place.columns, kPanelColumns) * kPanelColumns;
    return int8_rows_product<E>(rows, place.first_row, place.rows, lift, place.columns, c, ldc, work, coming);
  }
  dot_product<E>(x, hidden, address<const int32_t>(place.segment->tokens) + place.first_row, place.rows,
                 gate_and_up_rows<E>(place, hidden), c, ldc, pieces(place.columns, kPanelColumns) * kPanelColumns, work,
                 coming);
}

// The rows of x that segments multiply in int8.
template <class E>
void quantize_inputs(const void* x, int64_t hidden, const Segment* segments, int64_t count) {
  quantize_operands<E>(
      segments, count, [&](const Segment& s) { return operand_of(s, hidden); },
      [&](const Segment& s, int64_t r) {
        return static_cast<const typename E::T*>(x) + address<const int32_t>(s.tokens)[r] * hidden;
      },
      [](const Segment&) { return NoScales{}; });
}

// a = silu(x gate^T) * (x up^T); keeps both products where the segment asks.
template <class E>
void up(const void* x, int64_t hidden, const Segment* segments, int64_t count, void* scratch, int64_t bytes,
        int threads) {
  using T = typename E::T;
  const Grid<PackedCut> grid(segments, count, true, threads);
  const int64_t tasks = grid.tasks(segments, count);
  Queue queue(tasks, grid.tasks(segments, first_of_many(segments, count)));
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(scratch, bytes, thread_index(), hidden);
    quantize_inputs<E>(x, hidden, segments, count);
    Queue::Turn turn = queue.turn();
    for (int64_t task = turn.first(), next; task < tasks; task = next) {
      next = turn.take();
      const Place place = grid.place(task, segments);
      const Segment& s = *place.segment;
      const int64_t columns = place.columns, lifted = pieces(columns, kPanelColumns) * kPanelColumns;
      const Area coming =
          next < tasks ? gate_and_up_rows<E>(grid.place(next, segments), hidden).first_area() : Area{};
      gate_and_up<E>(static_cast<const T*>(x), hidden, place, work.c, 2 * lifted, work, coming);
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

// Slices of the columns of a projection's result, each a task that walks over all segments. Where some segments have
// many rows behind others with few, the slices of the first half of the columns take the many last and those of the
// second half first, and threads begin with both. No sum depends on how many slices there are.
class Slices {
 public:
  // As wide as whole units allow, at most about `width`, and cut so that no thread gets much more than any other: 576
  // columns for two threads are six slices of 96, not three of 160 and one of 96.
  Slices(const Segment* segments, int64_t count, int64_t hidden, int64_t width, int threads, int64_t unit)
      : count_(count), many_(first_of_many(segments, count)), hidden_(hidden), half_(hidden) {
    if (many_ < count) half_ = smaller(hidden, pieces(hidden, 2 * unit) * unit);
    const int64_t share = many_ < count ? (threads + 1) / 2 : threads;
    const int64_t fewest = pieces(pieces(half_, width), share) * share;
    int64_t least = INT64_MAX;
    for (int64_t slices = fewest; slices <= 2 * fewest; slices += share) {
      const int64_t wide = pieces(pieces(half_, slices), unit) * unit, cut = pieces(half_, wide);
      // What the first thread gets: in its last turn maybe the last slice, which may be narrow.
      const int64_t last = cut % share == 1 % share ? half_ - (cut - 1) * wide : wide;
      const int64_t most = (pieces(cut, share) - 1) * wide + last;
      if (most >= least) continue;
      least = most;
      width_ = wide;
    }
  }

  int64_t middle() const { return pieces(half_, width_); }
  int64_t tasks() const { return middle() + pieces(hidden_ - half_, width_); }
  int64_t column(int64_t task) const {
    return task < middle() ? task * width_ : half_ + (task - middle()) * width_;
  }
  int64_t columns(int64_t task) const {
    return smaller(width_, (task < middle() ? half_ : hidden_) - column(task));
  }
  // The segment that comes as number `place` in slice `task`.
  int64_t segment(int64_t task, int64_t place) const {
    const int64_t i = task < middle() ? place : place + many_;
    return i < count_ ? i : i - count_;
  }

 private:
  int64_t count_, many_, hidden_, half_, width_ = 1;
};

// Calls prepare() in every thread, then f(workspace, slice, slice that this thread takes next or -1) for every slice.
template <class Prepare, class F>
void each_slice(const Slices& slices, void* scratch, int64_t bytes, int threads, int64_t most, Prepare prepare, F f) {
  const int64_t tasks = slices.tasks();
  Queue queue(tasks, slices.middle());
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(scratch, bytes, thread_index(), most);
    prepare();
    Queue::Turn turn = queue.turn();
    for (int64_t task = turn.first(), next; task < tasks; task = next) {
      next = turn.take();
      f(work, task, next < tasks ? next : -1);
    }
  }
}

// out[tokens] += scale * c
inline void add_rows(const float* c, int64_t ldc, int64_t rows, const int32_t* tokens, const float* scale, float* out,
                     int64_t hidden, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    add_row<Float32>(c + r * ldc, scale ? scale[r] : 1.0f, out + tokens[r] * hidden, columns);
}

// out[tokens] += scale * (a down^T)
template <class E>
void down(const Segment* segments, int64_t count, int64_t hidden, float* out, void* scratch, int64_t bytes,
          int threads) {
  using T = typename E::T;
  const Slices slices(segments, count, hidden, flex::kSliceColumns, threads, kPanelColumns);
  const auto rows_of = [&](int64_t slice, int64_t place) {
    const Segment& s = segments[slices.segment(slice, place)];
    return WeightRows<E>(down_of<E>(s).from(slices.column(slice), 0), slices.columns(slice), s.width);
  };
  const auto prepare = [&] {
    quantize_operands<E>(
        segments, count, [](const Segment& s) { return operand_of(s, s.width); },
        [](const Segment& s, int64_t r) { return address<const T>(s.hidden) + r * s.width; },
        [](const Segment&) { return NoScales{}; });
  };
  each_slice(slices, scratch, bytes, threads, longest(segments, count, hidden, 1), prepare,
             [&](const Workspace& work, int64_t slice, int64_t next) {
               const int64_t column = slices.column(slice), columns = slices.columns(slice);
               const int64_t ldc = pieces(columns, kPanelColumns) * kPanelColumns;
               for (int64_t i = 0; i < count; ++i) {
                 const Segment& s = segments[slices.segment(slice, i)];
                 const WeightRows<E> own = rows_of(slice, i);
                 const Area coming = i + 1 < count ? rows_of(slice, i + 1).first_area()
                                     : next >= 0   ? rows_of(next, 0).first_area()
                                                   : Area{};
                 evenly(s.rows, kBlockRows, [&](int64_t row, int64_t rows) {
                   const Area next_area = row + rows < s.rows ? own.first_area() : coming;
                   if (in_int8(s))
                     int8_rows_product<E>(operand_of(s, s.width), row, rows, own.part[0], columns, work.c, ldc, work,
                                          next_area);
                   else
                     dot_product<E>(address<const T>(s.hidden) + row * s.width, s.width, nullptr, rows, own, work.c,
                                    ldc, 0, work, next_area);
                   add_rows(work.c, ldc, rows, address<const int32_t>(s.tokens) + row,
                            address<const float>(s.scale) + row, out + column, hidden, columns);
                 });
               }
             });
}

// dx[tokens] += dz gate_up
template <class E>
void down_backward(const Segment* segments, int64_t count, int64_t hidden, float* dx, void* scratch, int64_t bytes,
                   int threads) {
  using T = typename E::T;
  // NF4 that is not decoded into a tile is taken in whole groups.
  bool thin = false, groups = false;
  for (int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    thin = thin || PackedCut::is_thin(s);
    groups = groups || (s.gate_up_kind == flex::kNf4 && (in_int8(s) || PackedCut::is_thin(s)));
  }
  // A slice reads a stretch of every weight row, each on a page of its own: where reading is the bound, a long one.
  const int64_t most = thin ? flex::kThinColumns : flex::kSliceColumns;
  const int64_t share = pieces(hidden, int64_t{thin ? 1 : 2} * threads * kPanelColumns) * kPanelColumns;
  const int64_t unit = groups ? flex::kGroupColumns : kPanelColumns;
  const Slices slices(segments, count, hidden, smaller(most, share), threads, unit);
  const auto columns_of = [&](int64_t i, int64_t column, int64_t columns) {
    const Weight<E> weight = with_inverses(gate_up_of<E>(segments[i]), segments[i]);
    return WeightColumns<E>{weight.from(0, column), columns, 2 * segments[i].width};
  };
  const auto first_of = [&](int64_t slice, int64_t place) {
    const int64_t i = slices.segment(slice, place);
    const bool thin = PackedCut::is_thin(segments[i]);
    return thin ? Area{} : columns_of(i, slices.column(slice), slices.columns(slice)).area(0, 0);
  };
  const auto prepare = [&] {
    find_all_inverses(segments, count, gate_up_of<E>, [](const Segment& s) { return 2 * s.width; },
                      [&](const Segment&) { return hidden; });
    quantize_operands<E>(
        segments, count, [](const Segment& s) { return operand_of(s, 2 * s.width); },
        [](const Segment& s, int64_t r) { return address<const T>(s.hidden) + 2 * r * s.width; },
        [](const Segment& s) { return RowScales<E>{with_inverses(gate_up_of<E>(s), s)}; });
  };
  each_slice(slices, scratch, bytes, threads, longest(segments, count, hidden, 2), prepare,
             [&](const Workspace& work, int64_t slice, int64_t next) {
               const int64_t column = slices.column(slice), columns = slices.columns(slice);
               for (int64_t place = 0; place < count; ++place) {
                 const int64_t i = slices.segment(slice, place);
                 const Segment& s = segments[i];
                 const int32_t* tokens = address<const int32_t>(s.tokens);
                 const T* dz = address<const T>(s.hidden);
                 const int64_t k = 2 * s.width;
                 if (!in_int8(s) && PackedCut::is_thin(s)) {
                   const int64_t ldc = pieces(columns, kPanelColumns) * kPanelColumns;
                   thin_product<E>(dz, k, nullptr, s.rows, k, gate_up_of<E>(s).from(0, column), columns, work.c, ldc,
                                   work);
                   add_rows(work.c, ldc, s.rows, tokens, nullptr, dx + column, hidden, columns);
                   continue;
                 }
                 // Pieces that C has room for, whatever the width of a slice.
                 const int64_t piece = PackedCut::is_thin(s) ? columns : flex::kSliceColumns;
                 for (int64_t start = 0; start < columns; start += piece) {
                   const int64_t some = smaller(piece, columns - start), end = start + some;
                   const int64_t ldc = pieces(some, kPanelColumns) * kPanelColumns;
                   const WeightColumns<E> own = columns_of(i, column + start, some);
                   const Area coming = end < columns        ? columns_of(i, column + end, columns - end).area(0, 0)
                                       : place + 1 < count ? first_of(slice, place + 1)
                                       : next >= 0         ? first_of(next, 0)
                                                           : Area{};
                   evenly(s.rows, kBlockRows, [&](int64_t row, int64_t rows) {
                     const Area next_area = row + rows < s.rows ? own.area(0, 0) : coming;
                     if (in_int8(s))
                       int8_columns_product(operand_of(s, k), row, rows, own.weight, some, work.c, ldc, work,
                                            next_area);
                     else
                       column_product<E>(dz + row * k, k, nullptr, rows, own, work.c, ldc, work, next_area);
                     add_rows(work.c, ldc, rows, tokens + row, nullptr, dx + column + start, hidden, some);
                   });
                 }
               }
             });
}

// Rows of z, of each of which a task reads a short stretch, that are fetched ahead of their use.
constexpr int64_t kRowsAhead = 8;

// da = dy down; with z recomputed or as kept: dz, <da, a> in part sums a column block, scale * a where asked for.
template <class E>
void up_backward(const void* x, const void* dy, int64_t hidden, const Segment* segments, int64_t count,
                 float* partial, void* scratch, int64_t bytes, int threads) {
  using T = typename E::T;
  constexpr int64_t kUnit = flex::kPartialColumns;
  const Grid<PackedCut> grid(segments, count, false, threads);
  const int64_t tasks = grid.tasks(segments, count);
  bool needs_x = false;
  for (int64_t i = 0; i < count; ++i) needs_x = needs_x || (in_int8(segments[i]) && !segments[i].preact);
  const auto down_columns = [hidden](const Place& place) {
    const Weight<E> weight = with_inverses(down_of<E>(*place.segment), *place.segment);
    return WeightColumns<E>{weight.from(0, place.column), place.columns, hidden};
  };
  const auto down_area = [&](const Place& place) {
    return PackedCut::is_thin(*place.segment) ? Area{} : down_columns(place).area(0, 0);
  };
  const auto first_area = [&](const Place& place) {
    return place.segment->preact ? down_area(place) : gate_and_up_rows<E>(place, hidden).first_area();
  };
  Queue queue(tasks, grid.tasks(segments, first_of_many(segments, count)));
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(scratch, bytes, thread_index(), hidden);
    if (needs_x) quantize_inputs<E>(x, hidden, segments, count);
    find_all_inverses(segments, count, down_of<E>, [&](const Segment&) { return hidden; },
                      [](const Segment& s) { return s.width; });
    quantize_operands<E>(
        segments, count, [&](const Segment& s) { return dy_operand_of(s, hidden); },
        [&](const Segment& s, int64_t r) {
          return static_cast<const T*>(dy) + address<const int32_t>(s.tokens)[r] * hidden;
        },
        [](const Segment& s) { return RowScales<E>{with_inverses(down_of<E>(s), s)}; });
    Queue::Turn turn = queue.turn();
    for (int64_t task = turn.first(), next; task < tasks; task = next) {
      next = turn.take();
      const Place place = grid.place(task, segments);
      const Segment& s = *place.segment;
      const Area coming = next < tasks ? first_area(grid.place(next, segments)) : Area{};
      const int64_t columns = place.columns, units = pieces(s.width, kUnit);
      const int32_t* tokens = address<const int32_t>(s.tokens) + place.first_row;
      float* sums = partial + place.first_row * units + place.column / kUnit;
      for (const Segment* before = segments; before != &s; ++before)
        sums += before->rows * pieces(before->width, kUnit);

      const int64_t lift = pieces(columns, kPanelColumns) * kPanelColumns, da = 2 * lift, across = 3 * lift;
      if (!s.preact)
        gate_and_up<E>(static_cast<const T*>(x), hidden, place, work.c, across, work, down_area(place));
      if (in_int8(s))
        int8_columns_product(dy_operand_of(s, hidden), place.first_row, place.rows, down_columns(place).weight,
                             columns, work.c + da, across, work, coming);
      else if (PackedCut::is_thin(s))
        thin_product<E>(static_cast<const T*>(dy), hidden, tokens, place.rows, hidden,
                        down_of<E>(s).from(0, place.column), columns, work.c + da, across, work);
      else
        column_product<E>(static_cast<const T*>(dy), hidden, tokens, place.rows, down_columns(place), work.c + da,
                          across, work, coming);
      for (int64_t r = 0; r < place.rows; ++r) {
        const int64_t row = place.first_row + r;
        const float scale = address<const float>(s.scale)[row];
        if (s.preact && r + kRowsAhead < place.rows) {
          const T* z = address<const T>(s.preact) + 2 * (row + kRowsAhead) * s.width + place.column;
          for (int64_t c = 0; c < columns; c += 64 / static_cast<int64_t>(sizeof(T))) {
            __builtin_prefetch(z + c);
            __builtin_prefetch(z + s.width + c);
          }
        }
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

}  // namespace
