// Products of a few rows with columns of the weight as stored: each weight is read once, straight into registers, and
// nothing is packed. Few rows are bound by the reading of weights, so what matters is that memory is read in long
// stretches and ahead of time. Include products.h first.
#pragma once

#include "cpu/kernels.h"

namespace {

// Into the second-level cache, which has room for what is far ahead. Inlined by force, as Weight::prefetch.
template <class T>
__attribute__((always_inline)) inline void prefetch(const T* p, int elements) {
  for (int byte = 0; byte < elements * static_cast<int>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
}

// c [M, kPanelColumns] (+)= a [M, length] b, with row k of b at `b + k * ld`: contiguous along the columns.
// The columns of c are in the order of Words::plain_words.
template <class E, int M>
void axpy(const typename E::T* b, int64_t ld, int64_t ahead, int64_t length, int columns, const float* a, int64_t lda,
          float* c, int64_t ldc, bool accumulate) {
  using P = Words<E>;
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
struct Axpy {
  static constexpr int kMost = W == 16 ? 12 : 6;
  using T = typename E::T;
  using Function = void (*)(const T*, int64_t, int64_t, int64_t, int, const float*, int64_t, float*, int64_t, bool);
  static Function of(int rows) {
    static const Function table[] = {
        axpy<E, 1>, axpy<E, 2>, axpy<E, 3>, axpy<E, 4>, axpy<E, 5>, axpy<E, 6>,
#if defined(__AVX512F__)
        axpy<E, 7>, axpy<E, 8>, axpy<E, 9>, axpy<E, 10>, axpy<E, 11>, axpy<E, 12>,
#endif
    };
    return table[rows - 1];
  }
};

// The product below for codes, where they can be used as they are; false where they are to be decoded in strips.
template <class E>
bool code_axpy(const typename E::T*, int64_t, const int32_t*, int64_t, int64_t, const Weight<E>&, int64_t, float*,
               int64_t, const Workspace&) {
  return false;
}

// C [rows, columns] = A B for at most kThinCodeRows rows; row r of A is `base + (index ? index[r] : r) * lda`, row k of
// B is row k of the weight. Writes whole panels: C has room for `columns` rounded up to kPanelColumns.
template <class E>
void thin_product(const typename E::T* base, int64_t lda, const int32_t* index, int64_t rows, int64_t k,
                  const Weight<E>& weight, int64_t columns, float* c, int64_t ldc, const Workspace& work) {
  using P = Words<E>;
  const bool stored = weight.stored();
  if (!stored && code_axpy<E>(base, lda, index, rows, k, weight, columns, c, ldc, work)) return;
  alignas(64) typename E::T strip[kStrip];
  // A's rows are copied beside each other where all their words fit, one cache line off any power of two.
  const int64_t room = work.room / rows / 32 * 32 - 32, all = pieces(pieces(k, P::kPerWord), 32) * 32;
  const int64_t block = smaller(all, room) * P::kPerWord, stride = smaller(all, room) + 16;
  constexpr int64_t kDepth = 32 * P::kPerWord;
  const int64_t wide = stored ? columns : kStrip / kDepth, ld = stored ? weight.ld : wide;
  for (int64_t k0 = 0; k0 < k; k0 += block) {
    const int64_t length = smaller(block, k - k0);
    for (int64_t r = 0; r < rows; ++r)
      P::pack_row(base + (index ? index[r] : r) * lda + k0, length, work.a + r * stride);
    for (int64_t d = 0; d < length; d += kDepth)
      for (int64_t start = 0; start < columns; start += wide) {
        const int64_t depth = smaller(kDepth, length - d), end = smaller(start + wide, columns);
        for (int64_t i = 0; i < depth && !stored; ++i) {
          weight.prefetch(k0 + d + kDepth + i, start, end - start);
          weight.decode(k0 + d + i, start, end - start, strip + i * ld);
        }
        const typename E::T* from = stored ? weight.at(k0 + d, start) : strip;
        for (int64_t j = start; j < end; j += kPanelColumns)
          evenly(rows, Axpy<E>::kMost, [&](int64_t m, int64_t some) {
            Axpy<E>::of(static_cast<int>(some))(from + j - start, ld, m || !stored ? 0 : kDepth, depth,
                                                static_cast<int>(smaller(kPanelColumns, end - j)),
                                                work.a + m * stride + d / P::kPerWord, stride, c + m * ldc + j, ldc,
                                                k0 + d > 0);
          });
      }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += kPanelColumns) P::settle(c + r * ldc + j);
}

}  // namespace

#if defined(__AVX512F__)
#include "cpu/thin_codes.h"
#endif
