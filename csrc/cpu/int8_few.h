// Products of int8 with int8 for a few rows. They are bound by the reading of weights, which long stretches of their
// rows make fast: no tile. Include thin.h and int8_rows.h first.
#pragma once

#include "cpu/kernels.h"

namespace {

constexpr int64_t kPanelCodes = 64;  // columns at a time
constexpr int64_t kFewInt8Rows = 8;

// c[m, r] = <a[m], row r> for R rows of codes and M rows of `a` from `first_row` on; `taken[m]` is what the codes'
// being 128 too large adds to row m.
template <bool kNf4, int R, int M, class E>
void int8_few_dots(const Int8Operand& a, int64_t first_row, const float* taken, const Weight<E>& weight, int64_t row,
                   float* c, int64_t ldc) {
  const int8_t* rows = a.codes + first_row * a.ld();
  const float* scales = a.scales + first_row * a.groups();
  V sums[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = set1(0.0f);
  const auto group = [&](int64_t g, bool whole) __attribute__((always_inline)) {
    const int64_t k = g * kInt8Group, left = a.k - k;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const char* ahead = weight.byte(row + R + r, k);
      __builtin_prefetch(ahead, 0, 2);
      if (!kNf4) __builtin_prefetch(ahead + 64, 0, 2);
      const bool two = whole || left > 64;
      const V low = _mm512_castsi512_ps(row_codes<kNf4>(weight, row + r, k, whole ? 64 : left));
      const V high = two ? _mm512_castsi512_ps(row_codes<kNf4>(weight, row + r, k + 64, whole ? 64 : left - 64))
                         : _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const int8_t* with = rows + m * a.ld() + k;
        V products = _mm512_setzero_ps();
        add_products(products, low, _mm512_castsi512_ps(_mm512_loadu_si512(with)));
        if (two) add_products(products, high, _mm512_castsi512_ps(_mm512_loadu_si512(with + 64)));
        sums[r][m] =
            fma(_mm512_cvtepi32_ps(_mm512_castps_si512(products)), set1(scales[m * a.groups() + g]), sums[r][m]);
      }
    }
  };
  int64_t g = 0;
  for (; (g + 1) * kInt8Group <= a.k; ++g) group(g, true);
  if (g * kInt8Group < a.k) group(g, false);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) c[m * ldc + r] = sum(sums[r][m]) - taken[m];
}

// c [M, 64] (+)= scale * a [M, depth] times the first `depth` rows of a weight; `columns` of its columns are there. c
// has the order of words_of_rows.
template <bool kNf4, int M, class E>
void int8_few_axpy(const Weight<E>& weight, int64_t depth, int64_t columns, const int8_t* a, int64_t lda,
                   const int32_t* start, const float* scale, int64_t groups, float* c, int64_t ldc, bool accumulate,
                   Coming coming) {
  V sums[M][4];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sums[m][q] = _mm512_castsi512_ps(_mm512_set1_epi32(start[m]));
  for (int64_t k = 0; k < depth; k += 4, a += 4) {
    V words[4];
    __m512i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (coming.at) coming.fetch(k + i);
      r[i] = k + i < depth ? row_codes<kNf4>(weight, k + i, 0, columns) : _mm512_setzero_si512();
    }
    words_of_rows(r, words);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      int32_t four;
      __builtin_memcpy(&four, a + m * lda, 4);
      const V word = _mm512_castsi512_ps(_mm512_set1_epi32(four));
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) add_products(sums[m][q], words[q], word);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      float* to = c + m * ldc + q * W;
      const V part = _mm512_cvtepi32_ps(_mm512_castps_si512(sums[m][q])), factor = set1(scale[m * groups]);
      Float32::store(to, accumulate ? fma(part, factor, Float32::load(to)) : mul(part, factor));
    }
}

template <bool kNf4, class E, int... M>
struct FewDots {
  using Function = void (*)(const Int8Operand&, int64_t, const float*, const Weight<E>&, int64_t, float*, int64_t);
  static constexpr Function one[] = {int8_few_dots<kNf4, 1, M, E>...};
  static constexpr Function several[] = {int8_few_dots<kNf4, (M > 4 ? 2 : 4), M, E>...};
};

template <bool kNf4, class E>
void few_rows_product(const Int8Operand& a, int64_t first_row, int64_t rows, const Weight<E>& weight, int64_t columns,
                      float* c, int64_t ldc) {
  using Dots = FewDots<kNf4, E, 1, 2, 3, 4, 5, 6, 7, 8>;
  float taken[kFewInt8Rows];
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = first_row + m;
    taken[m] = 0.0f;
    for (int64_t g = 0; g < a.groups(); ++g)
      taken[m] += 128.0f * a.scales[row * a.groups() + g] * static_cast<float>(sum_of_codes(a, row, g));
  }
  const int64_t most = rows > 4 ? 2 : 4;
  for (int64_t j = 0, some; j < columns; j += some) {
    some = j + most <= columns ? most : 1;
    (some > 1 ? Dots::several : Dots::one)[rows - 1](a, first_row, taken, weight, j, c + j, ldc);
  }
}

template <bool kNf4, class E, int... M>
struct FewAxpys {
  using Function = void (*)(const Weight<E>&, int64_t, int64_t, const int8_t*, int64_t, const int32_t*, const float*,
                            int64_t, float*, int64_t, bool, Coming);
  static constexpr Function of[] = {int8_few_axpy<kNf4, M, E>...};
};

template <bool kNf4, class E>
void few_columns_product(const Int8Operand& a, int64_t first_row, int64_t rows, const Weight<E>& weight,
                         int64_t columns, float* c, int64_t ldc) {
  constexpr int64_t kAtOnce = 6;
  // The last panel where C has no room for 64 columns of it.
  alignas(64) float narrow[kFewInt8Rows][kPanelCodes];
  const int64_t room = pieces(columns, kPanelColumns) * kPanelColumns;
  const auto panel = [&](int64_t j) { return j + kPanelCodes <= room ? c + j : narrow[0]; };
  const auto step = [&](int64_t j) { return j + kPanelCodes <= room ? ldc : kPanelCodes; };
  for (int64_t g = 0; g < a.groups(); ++g) {
    const int64_t k = g * kInt8Group, depth = smaller(kInt8Group, a.k - k);
    int32_t start[kFewInt8Rows];
    for (int64_t m = 0; m < rows; ++m) start[m] = -128 * sum_of_codes(a, first_row + m, g);
    for (int64_t j = 0; j < columns; j += kPanelCodes) {
      const Coming coming{weight.byte(k + kInt8Group, j), weight.ld};
      evenly(rows, kAtOnce, [&](int64_t m, int64_t count) {
        const int64_t row = first_row + m;
        FewAxpys<kNf4, E, 1, 2, 3, 4, 5, 6>::of[count - 1](
            weight.from(k, j), depth, columns - j, a.codes + row * a.ld() + k, a.ld(), start + m,
            a.scales + row * a.groups() + g, a.groups(), panel(j) + m * step(j), step(j), g > 0, m ? Coming{} : coming);
      });
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += kPanelCodes) {
      const float* from = panel(j) + r * step(j);
      V sums[4];
      for (int q = 0; q < 4; ++q) sums[q] = Float32::load(from + q * W);
      in_order(sums);
      for (int q = 0; q < 4 && j + q * W < room; ++q) Float32::store(c + r * ldc + j + q * W, sums[q]);
    }
}

}  // namespace
