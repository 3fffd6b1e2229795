// Gradients of trained weights, for the vector ISAs: out [A, B] (+)= left^T right in float32, summed over rows n in
// their order. Neither a transposed operand nor a result in 16 bits is ever in memory. Include columns.h first.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tasks.h"

namespace {

// out[i * kTileWords + w], i < columns: the words of column i of `length` rows at `from`, ld apart. `columns` is at
// most kPanelColumns.
template <class E>
void pack_columns(const typename E::T* from, int64_t ld, int columns, int64_t length, float* out) {
  using P = Words<E>;
  constexpr int64_t kRows = W * P::kPerWord;  // of a square of words
  for (int64_t k = 0; k < length; k += kRows) {
    alignas(64) float square[2][W][W];
    for (int64_t w = 0; w < W; ++w) {
      const int64_t row = k + w * P::kPerWord;
      V low = set1(0.0f), high = set1(0.0f);
      if (row < length)
        P::plain_words(from + row * ld, row + 1 < length ? from + (row + 1) * ld : nullptr, columns, low, high);
      Float32::store(square[0][w], low);
      Float32::store(square[1][w], high);
    }
    for (int half = 0; half < 2; ++half) {
      transpose_square(square[half]);
      for (int lane = 0; lane < W; ++lane) {
        const int column = P::column_of(half, lane);
        if (column < columns)
          Float32::store(out + column * kTileWords + k / P::kPerWord, Float32::load(square[half][lane]));
      }
    }
  }
}

template <class E>
void weight_gradient(const void* left, const void* right, int64_t rows, int64_t height, int64_t width, float* out,
                     bool accumulate, void* scratch, int64_t bytes, int threads) {
  using T = typename E::T;
  const int64_t blocks = pieces(height, kBlockRows), slices = pieces(width, flex::kSliceColumns);
  const int64_t tall = pieces(height, blocks), wide = pieces(pieces(width, slices), kPanelColumns) * kPanelColumns;
  Queue queue(blocks * slices);
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(scratch, bytes, thread_index(), 1);
    Queue::Turn turn = queue.turn();
    for (int64_t task = turn.first(), next; task < blocks * slices; task = next) {
      next = turn.take();
      const int64_t first = task / slices * tall, column = task % slices * wide;
      const int64_t some = smaller(tall, height - first), columns = smaller(wide, width - column);
      if (some <= 0 || columns <= 0) continue;
      const T* from = static_cast<const T*>(left) + first;
      const auto pack = [&](int64_t k0, int64_t length) {
        for (int64_t i = 0; i < some; i += kPanelColumns)
          pack_columns<E>(from + k0 * height + i, height, static_cast<int>(smaller(kPanelColumns, some - i)), length,
                          work.a + i * kTileWords);
      };
      const Weight<E> b{static_cast<const char*>(right), width, nullptr, 0, flex::kStored, 0, column};
      const int64_t ldc = pieces(columns, kPanelColumns) * kPanelColumns;
      packed_column_product<E>(pack, some, WeightColumns<E>{b, columns, rows}, work.c, ldc, work, Area{});
      for (int64_t r = 0; r < some; ++r) {
        float* to = out + (first + r) * width + column;
        const float* c = work.c + r * ldc;
        over(columns, [&](int64_t i, int lanes) {
          V sums = get<Float32>(c + i, lanes);
          if (accumulate) sums = add(sums, get<Float32>(to + i, lanes));
          put<Float32>(to + i, sums, lanes);
        });
      }
    }
  }
}

void weight_gradient_any(int dtype, const void* left, const void* right, int64_t rows, int64_t height, int64_t width,
                         float* out, bool accumulate, void* scratch, int64_t bytes, int threads) {
  FLEX_BY_DTYPE(dtype, weight_gradient, left, right, rows, height, width, out, accumulate, scratch, bytes, threads)
}

}  // namespace
