// Products of a few rows with weights as stored: each weight is read once, straight into registers, and nothing is
// packed. Few rows are bound by the reading of weights, so what matters is that memory is read in long stretches and
// ahead of time. Include gemm.h first.
#pragma once

#include "cpu/kernels.h"

namespace {

using flex::kThinRows;

// c[m, r] (+)= <a[m], weight row r> for R rows of the weight, contiguous along the reduced dimension.
template <class E, int R, int M>
void dot(const typename E::T* weight, int64_t ld, const typename E::T* ahead, int64_t length, const float* a,
         int64_t lda, float* c, int64_t ldc, bool accumulate) {
  using P = Packing<E>;
  constexpr int kStep = W * P::kPerWord;
  V sums[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = set1(0.0f);
  const auto step = [&](int64_t k, int n) __attribute__((always_inline)) {
    V w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[r] = P::load_words(weight + r * ld + k, n);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V word = Float32::load(a + m * lda + k / P::kPerWord);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][m] = P::multiply_add(word, w[r], sums[r][m]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= length; k += kStep) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) prefetch(ahead + r * ld + k, 1);
    step(k, kStep);
  }
  if (k < length) step(k, static_cast<int>(length - k));
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float& out = c[m * ldc + r];
      out = (accumulate ? out : 0.0f) + sum(sums[r][m]);
    }
}

// c [M, kPanelColumns] (+)= a [M, length] b, with row k of b at `b + k * ld`: contiguous along the columns.
// The columns of c are in the order of Packing::plain_words.
template <class E, int M>
void axpy(const typename E::T* b, int64_t ld, int64_t ahead, int64_t length, int columns, const float* a, int64_t lda,
          float* c, int64_t ldc, bool accumulate) {
  using P = Packing<E>;
  V sums[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    sums[i][0] = accumulate ? Float32::load(c + i * ldc) : set1(0.0f);
    sums[i][1] = accumulate ? Float32::load(c + i * ldc + W) : set1(0.0f);
  }
  for (int64_t k = 0; k < length; k += P::kPerWord, ++a) {
    const typename E::T* row = b + k * ld;
    if (ahead)
      for (int i = 0; i < P::kPerWord; ++i) prefetch(row + (ahead + i) * ld, kPanelColumns);
    V low, high;
    P::plain_words(row, k + 1 < length ? row + ld : nullptr, columns, low, high);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const V word = set1(a[i * lda]);
      sums[i][0] = P::multiply_add(word, low, sums[i][0]);
      sums[i][1] = P::multiply_add(word, high, sums[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    Float32::store(c + i * ldc, sums[i][0]);
    Float32::store(c + i * ldc + W, sums[i][1]);
  }
}

template <class E>
struct Thin {
  using T = typename E::T;
  // Rows of the weight and rows of x at a time: R * M sums, R weights and one word of x fit in the registers.
  static constexpr int R = W == 16 ? 4 : 2, kDotRows = W == 16 ? 6 : 4, kAxpyRows = W == 16 ? 12 : 6;
  using Dot = void (*)(const T*, int64_t, const T*, int64_t, const float*, int64_t, float*, int64_t, bool);
  using Axpy = void (*)(const T*, int64_t, int64_t, int64_t, int, const float*, int64_t, float*, int64_t, bool);

  template <int N>
  static Dot dot_of(int rows) {
    static const Dot table[] = {
        dot<E, N, 1>, dot<E, N, 2>, dot<E, N, 3>, dot<E, N, 4>,
#if defined(__AVX512F__)
        dot<E, N, 5>, dot<E, N, 6>,
#endif
    };
    return table[rows - 1];
  }

  static Axpy axpy_of(int rows) {
    static const Axpy table[] = {
        axpy<E, 1>, axpy<E, 2>, axpy<E, 3>, axpy<E, 4>, axpy<E, 5>, axpy<E, 6>,
#if defined(__AVX512F__)
        axpy<E, 7>, axpy<E, 8>, axpy<E, 9>, axpy<E, 10>, axpy<E, 11>, axpy<E, 12>,
#endif
    };
    return table[rows - 1];
  }
};

// Calls f(first, count) for pieces of at most `most` rows, shared out evenly.
template <class F>
inline void evenly(int64_t rows, int64_t most, F f) {
  const int64_t steps = pieces(rows, most);
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t first_row = rows * step / steps;
    f(first_row, rows * (step + 1) / steps - first_row);
  }
}

// The product below for codes, where they can be used as they are; false where they are to be decoded in strips.
template <class E>
bool thin_codes(const typename E::T*, int64_t, const int32_t*, int64_t, int64_t, const Weight<E>&, int64_t, bool,
                float*, int64_t, const Workspace&) {
  return false;
}

}  // namespace

#if defined(__AVX512F__)
#include "cpu/thin_codes.h"
#endif

namespace {

// C [rows, columns] = A B for at most kThinRows rows; row r of A is `base + (index ? index[r] : r) * lda`.
// Transposed: column j of B is row j of the weight; plain: row k of B is row k of the weight.
// Writes whole panels: C has room for `columns` rounded up to kPanelColumns.
template <class E>
void thin_product(const typename E::T* base, int64_t lda, const int32_t* index, int64_t rows, int64_t k,
                  const Weight<E>& weight, int64_t columns, bool transposed, float* c, int64_t ldc,
                  const Workspace& work) {
  using P = Packing<E>;
  using K = Thin<E>;
  const bool stored = weight.stored();
  if (!stored && thin_codes<E>(base, lda, index, rows, k, weight, columns, transposed, c, ldc, work)) return;
  alignas(64) typename E::T strip[kStrip];
  // A's rows are copied beside each other where all their words fit, one cache line off any power of two.
  const int64_t room = (work.a - work.b) / rows / 32 * 32 - 32, all = pieces(pieces(k, P::kPerWord), 32) * 32;
  const int64_t block = smaller(all, room) * P::kPerWord, stride = smaller(all, room) + 16;
  for (int64_t k0 = 0; k0 < k; k0 += block) {
    const int64_t length = smaller(block, k - k0);
    for (int64_t r = 0; r < rows; ++r)
      P::pack_row(base + (index ? index[r] : r) * lda + k0, length, work.b + r * stride);
    if (transposed) {
      const int64_t most = stored ? length : smaller(length, kStrip / K::R), ld = stored ? weight.ld : most;
      for (int64_t j = 0, count; j < columns; j += count) {
        count = j + K::R <= columns ? K::R : 1;
        const bool four = count == K::R;
        for (int64_t d = 0; d < length; d += most) {
          const int64_t n = smaller(most, length - d);
          for (int64_t r = 0; r < count && !stored; ++r) {
            weight.prefetch(j + count + r, k0 + d, n);
            weight.decode(j + r, k0 + d, n, strip + r * ld);
          }
          const typename E::T* from = stored ? weight.at(j, k0 + d) : strip;
          evenly(rows, K::kDotRows, [&](int64_t m, int64_t some) {
            const auto run = four ? K::template dot_of<K::R>(static_cast<int>(some))
                                  : K::template dot_of<1>(static_cast<int>(some));
            run(from, ld, stored && four && !m ? from + K::R * ld : from, n, work.b + m * stride + d / P::kPerWord,
                stride, c + m * ldc + j, ldc, k0 + d > 0);
          });
        }
      }
      continue;
    }
    constexpr int64_t kDepth = 32 * P::kPerWord;
    const int64_t wide = stored ? columns : kStrip / kDepth, ld = stored ? weight.ld : wide;
    for (int64_t d = 0; d < length; d += kDepth)
      for (int64_t start = 0; start < columns; start += wide) {
        const int64_t depth = smaller(kDepth, length - d), end = smaller(start + wide, columns);
        for (int64_t i = 0; i < depth && !stored; ++i) {
          weight.prefetch(k0 + d + kDepth + i, start, end - start);
          weight.decode(k0 + d + i, start, end - start, strip + i * ld);
        }
        const typename E::T* from = stored ? weight.at(k0 + d, start) : strip;
        for (int64_t j = start; j < end; j += kPanelColumns)
          evenly(rows, K::kAxpyRows, [&](int64_t m, int64_t some) {
            K::axpy_of(static_cast<int>(some))(from + j - start, ld, m || !stored ? 0 : kDepth, depth,
                                               static_cast<int>(smaller(kPanelColumns, end - j)),
                                               work.b + m * stride + d / P::kPerWord, stride, c + m * ldc + j, ldc,
                                               k0 + d > 0);
          });
      }
  }
  if (!transposed)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < columns; j += kPanelColumns) P::settle(c + r * ldc + j);
}

}  // namespace
