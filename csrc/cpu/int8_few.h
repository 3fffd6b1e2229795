// Products of int8 with int8 for a few rows. They are bound by the reading of weights, which long stretches of their
// rows make fast: no tile. Include thin.h and int8_rows.h first.
#pragma once

#include "cpu/kernels.h"

namespace {

constexpr int64_t kPanelCodes = 64;  // columns at a time
constexpr int64_t kFewInt8Rows = 8;

// c[m, r] (+)= the sum of sums[r][m]; less `taken[m]` where nothing is added to.
template <int R, int M>
__attribute__((always_inline)) inline void add_up(const V (&sums)[R][M], const float* taken, float* c, int64_t ldc,
                                                  bool accumulate) {
  static_assert(R == 1 || R == 2 || R == 4, "even parts of four sums");
  const auto at = [&](int m, int r) { return m < M ? sums[r][m] : set1(0.0f); };
  const auto put = [&](int m, __m128 four) {
    if (m >= M) return;
    if (!accumulate) four = _mm_sub_ps(four, _mm_set1_ps(taken[m]));
    add_sums(four, R, c + m * ldc, accumulate);
  };
  if (R == 4) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) put(m, four_sums(at(m, 0), at(m, 1 % R), at(m, 2 % R), at(m, 3 % R)));
  } else if (R == 2) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m += 2) {
      const __m128 four = four_sums(at(m, 0), at(m, 1 % R), at(m + 1, 0), at(m + 1, 1 % R));
      put(m, four);
      put(m + 1, _mm_movehl_ps(four, four));
    }
  } else {
    for (int m = 0; m < M; ++m) put(m, _mm_set_ss(sum(sums[0][m])));
  }
}

// c[m, r] = <a[m], row r> for R rows of int8 codes and M rows of `a` from `first_row` on; `taken[m]` is what the codes'
// being 128 too large adds to row m.
template <int R, int M, class E>
void int8_few_dots(const Int8Operand& a, int64_t first_row, const float* taken, const Weight<E>& weight, int64_t row,
                   float* c, int64_t ldc) {
  const char* code = weight.byte(row, 0);
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
      const char* from = code + r * weight.ld + k;
      __builtin_prefetch(from + R * weight.ld, 0, 2);
      __builtin_prefetch(from + R * weight.ld + 64, 0, 2);
      const V low = _mm512_castsi512_ps(unsigned_codes(from, whole ? 64 : left));
      const V high = _mm512_castsi512_ps(unsigned_codes(from + 64, whole ? 64 : left - 64));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const int8_t* with = rows + m * a.ld() + k;
        V products = _mm512_setzero_ps();
        add_products(products, low, _mm512_castsi512_ps(_mm512_loadu_si512(with)));
        if (whole || left > 64) add_products(products, high, _mm512_castsi512_ps(_mm512_loadu_si512(with + 64)));
        sums[r][m] =
            fma(_mm512_cvtepi32_ps(_mm512_castps_si512(products)), set1(scales[m * a.groups() + g]), sums[r][m]);
      }
    }
  };
  int64_t g = 0;
  for (; (g + 1) * kInt8Group <= a.k; ++g) group(g, true);
  if (g * kInt8Group < a.k) group(g, false);
  add_up(sums, taken, c, ldc, false);
}

// Rows of A beside NF4: elements [k0, k0 + length) of each, even and odd ones apart in every kInt8Group.
struct SplitRows {
  static constexpr int64_t kCodes = kFactorGroups * kGroupCodes;
  // A line off any power of two, so that rows do not meet in one set of the cache.
  static constexpr int64_t kStride = kCodes + 64;
  alignas(64) int8_t codes[kFewInt8Rows * kStride];
  int64_t k0 = 0, length = 0;

  void split(const Int8Operand& a, int64_t first_row, int64_t rows, int64_t from) {
    k0 = from;
    length = smaller(kCodes, a.k - k0);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t k = 0; k < length; k += kInt8Group)
        even_and_odd(a.codes + (first_row + m) * a.ld() + k0 + k, length - k, codes + m * kStride + k);
  }
};

// c[m, r] (+)= <a[m], row r> for R rows of NF4, those from `row` on of a quad with these tables, and M rows of `a`;
// less `taken[m]` where nothing is added to.
template <int R, int M, class E>
void nf4_few_dots(const SplitRows& a, const float* scales, int64_t groups, const float* taken, const Weight<E>& weight,
                  const PairTables* tables, int row, float* c, int64_t ldc, bool accumulate) {
  const char* code = weight.byte(row, a.k0);
  const __m512i first = tables_of_row(row % 2), second = tables_of_row(1);
  V sums[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = set1(0.0f);
  const __m512i* half = tables->half + row / 2;
  const auto group = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const char* from = code + r * weight.ld + k / 2;
      __builtin_prefetch(from + R * weight.ld, 0, 2);
      const EvenAndOdd codes = two_groups_of_row(from, n, r % 2 ? second : first, half[r / 2]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const int8_t* with = a.codes + m * SplitRows::kStride + k;
        V products = _mm512_setzero_ps();
        add_products(products, _mm512_castsi512_ps(codes.even), _mm512_castsi512_ps(_mm512_load_si512(with)));
        add_products(products, _mm512_castsi512_ps(codes.odd), _mm512_castsi512_ps(_mm512_load_si512(with + 64)));
        sums[r][m] = fma(_mm512_cvtepi32_ps(_mm512_castps_si512(products)), set1(scales[m * groups]), sums[r][m]);
      }
    }
    ++scales;
    half += 2;
  };
  int64_t k = 0;
  for (; k + kInt8Group <= a.length; k += kInt8Group) group(k, kInt8Group);
  if (k < a.length) group(k, a.length - k);
  add_up(sums, taken, c, ldc, accumulate);
}

// c [M, 64] (+)= scale * a [M, depth] times the first `depth` rows of a weight; `columns` of its columns are there. c
// has the order of words_of_rows, of NF4 that of words_of_quad. `tables`: of NF4, for every four rows.
template <bool kNf4, int M, class E>
void int8_few_axpy(const Weight<E>& weight, const __m512i* tables, int64_t depth, int64_t columns, const int8_t* a,
                   int64_t lda, const int32_t* start, const float* scale, int64_t groups, float* c, int64_t ldc,
                   bool accumulate, Ahead& shared) {
  const char* code = weight.byte(0, 0);
  Ahead ahead = shared;
  V sums[M][4];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sums[m][q] = _mm512_castsi512_ps(_mm512_set1_epi32(start[m]));
  for (int64_t k = 0; k < depth; k += kQuad, a += kQuad, code += kQuad * weight.ld, ++tables) {
    V words[4];
    ahead.some();
    if (kNf4) {
      // Rows that are not there meet zeros.
      const auto row_at = [&](int i) { return code + (k + i < depth ? i : 0) * weight.ld; };
      words_of_quad(row_at, columns, *tables, words);
    } else {
      __m512i r[kQuad];
#pragma GCC unroll 4
      for (int i = 0; i < kQuad; ++i)
        r[i] = k + i < depth ? unsigned_codes(code + i * weight.ld, columns) : _mm512_setzero_si512();
      words_of_rows(r, words);
    }
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
  shared = ahead;
}

// Rows of a weight at a time with so many rows: as many sums as fit in the registers.
inline int64_t few_weights(int64_t rows) { return rows > 4 ? 2 : 4; }

template <class E, int... M>
struct FewDots {
  using OfInt8 = void (*)(const Int8Operand&, int64_t, const float*, const Weight<E>&, int64_t, float*, int64_t);
  using OfNf4 = void (*)(const SplitRows&, const float*, int64_t, const float*, const Weight<E>&, const PairTables*,
                         int, float*, int64_t, bool);
  static constexpr OfInt8 int8_one[] = {int8_few_dots<1, M, E>...};
  static constexpr OfInt8 int8_several[] = {int8_few_dots<(M > 4 ? 2 : 4), M, E>...};
  static constexpr OfNf4 nf4_one[] = {nf4_few_dots<1, M, E>...};
  static constexpr OfNf4 nf4_several[] = {nf4_few_dots<(M > 4 ? 2 : 4), M, E>...};
};

template <bool kNf4, class E>
void few_rows_product(const Int8Operand& a, int64_t first_row, int64_t rows, const Weight<E>& weight, int64_t columns,
                      float* c, int64_t ldc) {
  using Dots = FewDots<E, 1, 2, 3, 4, 5, 6, 7, 8>;
  float taken[kFewInt8Rows];
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = first_row + m;
    taken[m] = 0.0f;
    for (int64_t g = 0; g < a.groups(); ++g)
      taken[m] += 128.0f * a.scales[row * a.groups() + g] * static_cast<float>(sum_of_codes(a, row, g));
  }
  const int64_t most = few_weights(rows);
  if (!kNf4) {
    for (int64_t j = 0, some; j < columns; j += some) {
      some = j + most <= columns ? most : 1;
      (some > 1 ? Dots::int8_several : Dots::int8_one)[rows - 1](a, first_row, taken, weight, j, c + j, ldc);
    }
    return;
  }
  SplitRows split;
  QuadFactors factors;
  PairTables tables[kFactorGroups / 2];
  for (int64_t k0 = 0; k0 < a.k; k0 += SplitRows::kCodes) {
    split.split(a, first_row, rows, k0);
    const float* scales = a.scales + first_row * a.groups() + k0 / kInt8Group;
    for (int64_t quad = 0; quad < columns; quad += kQuad) {
      const int64_t there = smaller(kQuad, columns - quad);
      factors.find(weight, quad, there, k0, pieces(split.length, kGroupCodes));
      for (int64_t k = 0; k < split.length; k += kInt8Group)
        tables[k / kInt8Group] = tables_of_two_groups(factors.at(k / kGroupCodes));
      for (int64_t j = 0, some; j < there; j += some) {
        some = j + most <= there ? most : 1;
        (some > 1 ? Dots::nf4_several : Dots::nf4_one)[rows - 1](split, scales, a.groups(), taken, weight.from(quad, 0),
                                                                 tables, static_cast<int>(j), c + quad + j, ldc,
                                                                 k0 > 0);
      }
    }
  }
}

template <bool kNf4, class E, int... M>
struct FewAxpys {
  using Function = void (*)(const Weight<E>&, const __m512i*, int64_t, int64_t, const int8_t*, int64_t, const int32_t*,
                            const float*, int64_t, float*, int64_t, bool, Ahead&);
  static constexpr Function of[] = {int8_few_axpy<kNf4, M, E>...};
};

template <bool kNf4, class E>
void few_columns_product(const Int8Operand& a, int64_t first_row, int64_t rows, const Weight<E>& weight,
                         int64_t columns, float* c, int64_t ldc, const Area& coming) {
  constexpr int64_t kAtOnce = 6, kMost = kFactorGroups * kGroupCodes;
  static_assert(flex::kThinColumns <= kMost && flex::kSliceColumns <= kMost, "factors of all columns");
  QuadFactors factors[kInt8Group / kQuad];
  __m512i tables[kInt8Group / kQuad];
  // The last panel where C has no room for 64 columns of it.
  alignas(64) float narrow[kFewInt8Rows][kPanelCodes];
  const int64_t room = pieces(columns, kPanelColumns) * kPanelColumns;
  const auto panel = [&](int64_t j) { return j + kPanelCodes <= room ? c + j : narrow[0]; };
  const auto step = [&](int64_t j) { return j + kPanelCodes <= room ? ldc : kPanelCodes; };
  for (int64_t g = 0; g < a.groups(); ++g) {
    const int64_t k = g * kInt8Group, depth = smaller(kInt8Group, a.k - k);
    int32_t start[kFewInt8Rows];
    for (int64_t m = 0; m < rows; ++m) start[m] = -128 * sum_of_codes(a, first_row + m, g);
    for (int64_t i = 0; i < depth && kNf4; i += kQuad)
      factors[i / kQuad].find(weight, k + i, smaller(kQuad, depth - i), 0, pieces(columns, kGroupCodes));
    const int64_t next = smaller(kInt8Group, a.k - k - depth);
    Ahead ahead(next > 0 ? weight.area(k + depth, next, 0, columns) : coming,
                pieces(columns, kPanelCodes) * pieces(rows, kAtOnce) * pieces(depth, kQuad));
    for (int64_t j = 0; j < columns; j += kPanelCodes) {
      for (int64_t i = 0; i < depth && kNf4; i += kQuad)
        tables[i / kQuad] = tables_of_quad(factors[i / kQuad].at(j / kGroupCodes));
      evenly(rows, kAtOnce, [&](int64_t m, int64_t count) {
        const int64_t row = first_row + m;
        FewAxpys<kNf4, E, 1, 2, 3, 4, 5, 6>::of[count - 1](
            weight.from(k, j), tables, depth, columns - j, a.codes + row * a.ld() + k, a.ld(), start + m,
            a.scales + row * a.groups() + g, a.groups(), panel(j) + m * step(j), step(j), g > 0, ahead);
      });
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += kPanelCodes) {
      const float* from = panel(j) + r * step(j);
      V sums[4];
      for (int q = 0; q < 4; ++q) sums[q] = Float32::load(from + q * W);
      in_order<kNf4>(sums);
      for (int q = 0; q < 4 && j + q * W < room; ++q) Float32::store(c + r * ldc + j + q * W, sums[q]);
    }
}

}  // namespace
