// Products of a few bfloat16 rows with codes, AVX-512: codes become bfloat16 words in registers and never go to memory.
// Scales are applied where they are fewest: to sums (int8, rows of weights reduced), to the table of levels (NF4, rows
// reduced), or to the rows of the other operand (rows of weights added up). Include thin.h's other parts first.
#pragma once

#include "cpu/kernels.h"

namespace {

constexpr int64_t kMostDotCodeRows = 8;  // beyond, a weight is used often enough to be decoded into a strip once
constexpr int64_t kGroup = flex::kGroupColumns;
constexpr int64_t kCodeDepth = 64;  // weight rows at a time where they are added up

// Lines of weights that a product fetches while it multiplies, one at a time: a burst would leave memory idle after it.
struct Coming {
  const char* at;  // null for none
  int64_t ld;      // bytes between lines

  // Inlined by force: GCC sees no effect in a function that only prefetches, and drops calls of it.
  __attribute__((always_inline)) void fetch(int64_t line) const { __builtin_prefetch(at + line * ld, 0, 2); }
};

// Even and odd columns of 64 NF4 codes as bfloat16 levels.
struct Levels {
  __m512i even, odd;
};

inline V nf4_level_values() { return Float32::load(flex::kNf4Levels); }

inline Levels nf4_levels(__m256i bytes, __m512i table) {
  const __m512i pairs = _mm512_cvtepu8_epi16(bytes);
  return {_mm512_permutexvar_epi16(pairs, table), _mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table)};
}

inline __m256i thirty_two_bytes(const void* p, int64_t n) {
  if (n >= 32) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return _mm256_maskz_loadu_epi8(static_cast<__mmask32>((uint64_t{1} << (n > 0 ? n : 0)) - 1), p);
}

// 32 int8 as bfloat16, which holds every one of them exactly.
inline __m512i int8_words(const int8_t* p, int64_t n) {
  V low, high;
  int8_values(p, n, 1.0f, low, high);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

inline V dot_words(V sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

inline V broadcast_bfloat(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(static_cast<int16_t>(*p)), 16));
}

// c[m, r] (+)= <a[m], row r> for R rows of int8 codes; a in the order of the columns.
template <int R, int M>
void int8_dot(const Weight<BFloat16>& weight, int64_t row, int64_t column, int64_t length, const float* a, int64_t lda,
              float* c, int64_t ldc, bool accumulate) {
  const char* code = weight.byte(row, column);
  V sums[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = set1(0.0f);
  const auto step = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(code + (R + r) * weight.ld + k, 0, 2);
      const __m512i w = int8_words(reinterpret_cast<const int8_t*>(code + r * weight.ld + k), n);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[r][m] = dot_words(sums[r][m], _mm512_loadu_si512(a + m * lda + k / 2), w);
    }
  };
  int64_t k = 0;
  for (; k + 32 <= length; k += 32) step(k, 32);
  if (k < length) step(k, length - k);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float& out = c[m * ldc + r];
      out = (accumulate ? out : 0.0f) + sum(sums[r][m]) * weight.scale(row + r, 0);
    }
}

// The same for NF4; a holds the even columns of every 64, then the odd ones.
template <int R, int M>
void nf4_dot(const Weight<BFloat16>& weight, int64_t row, int64_t column, int64_t length, const float* a, int64_t lda,
             float* c, int64_t ldc, bool accumulate) {
  const char* code = weight.byte(row, column);
  const uint16_t* scales = weight.scales + (weight.row + row) * weight.scales_ld + (weight.column + column) / kGroup;
  const V levels = nf4_level_values();
  V sums[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = set1(0.0f);
  const auto step = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(code + (R + r) * weight.ld + k / 2, 0, 2);
      const V scale = broadcast_bfloat(scales + r * weight.scales_ld + k / kGroup);
      const Levels w =
          nf4_levels(thirty_two_bytes(code + r * weight.ld + k / 2, (n + 1) / 2), nf4_table(levels, scale));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float* x = a + m * lda + k / 2;
        sums[r][m] = dot_words(sums[r][m], _mm512_loadu_si512(x), w.even);
        sums[r][m] = dot_words(sums[r][m], _mm512_loadu_si512(x + W), w.odd);
      }
    }
  };
  int64_t k = 0;
  for (; k + kGroup <= length; k += kGroup) step(k, kGroup);
  if (k < length) step(k, length - k);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float& out = c[m * ldc + r];
      out = (accumulate ? out : 0.0f) + sum(sums[r][m]);
    }
}

// The bfloat16 words (one, two) of 16 columns of two rows of int8. A float32 that holds an int8 has sixteen zeros below
// the bfloat16, so that words are put together by a shift.
inline __m512i int8_pairs(const char* one, const char* two) {
  const auto values = [](const char* p) __attribute__((always_inline)) {
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))));
  };
  return _mm512_or_si512(_mm512_srli_epi32(values(one), 16), values(two));
}

// c [M, COUNT vectors] (+)= a [M, length] times `length` rows of int8 codes, ld bytes apart and an even number of them;
// a already carries their scales.
template <int M, int COUNT>
void int8_axpy(const char* code, int64_t ld, int64_t length, const float* a, int64_t lda, float* c, int64_t ldc,
               bool accumulate, Coming coming) {
  V sums[M][COUNT];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int q = 0; q < COUNT; ++q) sums[m][q] = accumulate ? Float32::load(c + m * ldc + q * W) : set1(0.0f);
  for (int64_t k = 0; k < length; k += 2, code += 2 * ld) {
    if (coming.at) coming.fetch(k), coming.fetch(k + 1);
    __m512i words[COUNT];
#pragma GCC unroll 4
    for (int q = 0; q < COUNT; ++q) words[q] = int8_pairs(code + q * W, code + q * W + ld);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const __m512i word = _mm512_castps_si512(set1(a[m * lda + k / 2]));
#pragma GCC unroll 4
      for (int q = 0; q < COUNT; ++q) sums[m][q] = dot_words(sums[m][q], word, words[q]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int q = 0; q < COUNT; ++q) Float32::store(c + m * ldc + q * W, sums[m][q]);
}

// The same for a group of NF4 codes. c in the order that settle_nf4 undoes.
template <int M>
void nf4_axpy(const char* code, int64_t ld, int64_t length, const float* a, int64_t lda, float* c, int64_t ldc,
              bool accumulate, Coming coming) {
  const __m512i table = nf4_table(nf4_level_values(), set1(1.0f));
  V sums[M][4];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sums[m][q] = accumulate ? Float32::load(c + m * ldc + q * W) : set1(0.0f);
  for (int64_t k = 0; k < length; k += 2, code += 2 * ld) {
    if (coming.at) coming.fetch(k), coming.fetch(k + 1);
    const Levels one = nf4_levels(thirty_two_bytes(code, 32), table);
    const Levels two = nf4_levels(thirty_two_bytes(code + ld, 32), table);
    const __m512i words[4] = {_mm512_unpacklo_epi16(one.even, two.even), _mm512_unpackhi_epi16(one.even, two.even),
                              _mm512_unpacklo_epi16(one.odd, two.odd), _mm512_unpackhi_epi16(one.odd, two.odd)};
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const __m512i word = _mm512_castps_si512(set1(a[m * lda + k / 2]));
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sums[m][q] = dot_words(sums[m][q], word, words[q]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) Float32::store(c + m * ldc + q * W, sums[m][q]);
}

// 64 sums of nf4_axpy in the order of their columns: quarters hold even and odd columns, each as the 128-bit lanes of
// the unpacking instructions left them.
inline void settle_nf4(float* c) {
  float sorted[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const int odd = i / 32, high = i / 16 % 2, lane = i / 4 % 4, word = i % 4;
    sorted[2 * (8 * lane + 4 * high + word) + odd] = c[i];
  }
  for (int i = 0; i < kGroup; ++i) c[i] = sorted[i];
}

// out[i] = the words of `row` times scale[i] each, rounded to bfloat16 again; scale has even entries, then odd.
inline void scale_words(const float* row, const float* even, const float* odd, float* out, int64_t words) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t i = 0; i < words; i += W) {
    const __m512i pairs = _mm512_loadu_si512(row + i);
    const V first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const V second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
    const auto both = _mm512_cvtne2ps_pbh(mul(second, Float32::load(odd + i)), mul(first, Float32::load(even + i)));
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(order, (__m512i)both));
  }
}

// Every 64 columns of a row of words: the even ones, then the odd ones.
inline void split_even_odd(float* row, int64_t words) {
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                        22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  for (int64_t i = 0; i < words; i += 2 * W) {
    const __m512i a = _mm512_loadu_si512(row + i), b = _mm512_loadu_si512(row + i + W);
    _mm512_storeu_si512(row + i, _mm512_permutex2var_epi16(a, even, b));
    _mm512_storeu_si512(row + i + W, _mm512_permutex2var_epi16(a, odd, b));
  }
}

using CodeDot = void (*)(const Weight<BFloat16>&, int64_t, int64_t, int64_t, const float*, int64_t, float*, int64_t,
                         bool);
using CodeAxpy = void (*)(const char*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool, Coming);

// Rows of weights at a time with so many rows: as many sums as fit in the registers.
inline int64_t dot_weights(int64_t rows) { return rows > 4 ? 2 : 4; }

template <int... M>
struct CodeDots {
  static constexpr CodeDot one[2][8] = {{int8_dot<1, M>...}, {nf4_dot<1, M>...}};
  static constexpr CodeDot several[2][8] = {{int8_dot<(M > 4 ? 2 : 4), M>...}, {nf4_dot<(M > 4 ? 2 : 4), M>...}};
};

// dot_weights(rows) rows of the weight at a time, or one.
inline CodeDot code_dot_of(bool nf4, bool several, int64_t rows) {
  using Dots = CodeDots<1, 2, 3, 4, 5, 6, 7, 8>;
  return several ? Dots::several[nf4][rows - 1] : Dots::one[nf4][rows - 1];
}

// Rows of A whose sums over 64 columns are in the registers at once, and over half of them: int8 codes are dearer to
// decode than to read twice.
constexpr int64_t kWholeRows = 6, kHalfRows = 12;

template <int... M>
struct CodeAxpys {
  static constexpr CodeAxpy nf4[] = {nf4_axpy<M>...};
  static constexpr CodeAxpy whole[] = {int8_axpy<M, 4>...};
  static constexpr CodeAxpy half[] = {int8_axpy<M, 2>..., int8_axpy<kWholeRows + M, 2>...};
};

// c [rows, 64] (+)= a times 64 columns of codes; of int8, whose c may have room for 32 alone, as many as there are.
inline void add_code_columns(bool nf4, int64_t rows, int64_t columns, const char* code, int64_t ld, int64_t length,
                             const float* a, float* c, int64_t ldc, bool accumulate, Coming coming) {
  using Axpys = CodeAxpys<1, 2, 3, 4, 5, 6>;
  constexpr int64_t lda = kCodeDepth / 2;
  if (nf4) return Axpys::nf4[rows - 1](code, ld, length, a, lda, c, ldc, accumulate, coming);
  if (rows <= kWholeRows && columns > kPanelColumns)
    return Axpys::whole[rows - 1](code, ld, length, a, lda, c, ldc, accumulate, coming);
  for (int64_t j = 0; j < columns && j < kGroup; j += kPanelColumns)
    Axpys::half[rows - 1](code + j, ld, length, a, lda, c + j, ldc, accumulate, j ? Coming{} : coming);
}

// Scales of kCodeDepth rows by group, those of even rows apart from those of odd ones; zeros beyond the rows.
struct GroupScales {
  static constexpr int64_t kGroups = 32;  // at a time
  alignas(64) float of[2][kGroups][kCodeDepth / 2];

  void load(const Weight<BFloat16>& weight, int64_t row, int64_t depth, int64_t group, int64_t groups) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << smaller(kGroups, groups)) - 1);
    for (int64_t first = 0; first < kCodeDepth; first += 32)
      for (int parity = 0; parity < 2; ++parity) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) {
          const int64_t at = first + 2 * i + parity;
          const uint16_t* scales = weight.scales + (weight.row + row + at) * weight.scales_ld + group;
          r[i] = at < depth ? _mm512_maskz_loadu_epi16(mask, scales) : _mm512_setzero_si512();
        }
        transpose(r);
        for (int i = 0; i < 16; ++i) {
          _mm512_store_si512(of[parity][2 * i] + first / 2, _mm512_slli_epi32(r[i], 16));
          _mm512_store_si512(of[parity][2 * i + 1] + first / 2,
                             _mm512_and_si512(r[i], _mm512_set1_epi32(static_cast<int>(0xffff0000))));
        }
      }
  }
};

// c (+)= the rows, packed at `a` as they are, times the weight's rows from k0 on; plain (see thin_product). Codes are
// read where they lie, but for the last columns and an odd last row, which are copied beside zeros.
inline void add_code_rows(const Weight<BFloat16>& weight, int64_t k0, int64_t length, int64_t rows, int64_t columns,
                          const float* a, int64_t lda, float* c, int64_t ldc) {
  const bool nf4 = weight.kind == flex::kNf4;
  alignas(64) float scaled[flex::kThinCodeRows][kCodeDepth / 2];
  alignas(64) char copied[kCodeDepth][kGroup];
  GroupScales scales;
  const auto scale_rows = [&](int64_t d, int64_t group) {
    for (int64_t r = 0; r < rows; ++r)
      scale_words(a + r * lda + d / 2, scales.of[0][group], scales.of[1][group], scaled[r], kCodeDepth / 2);
  };
  for (int64_t d = 0; d < length; d += kCodeDepth) {
    const int64_t depth = smaller(kCodeDepth, length - d), pairs = pieces(depth, 2) * 2;
    if (!nf4) {
      scales.load(weight, k0 + d, depth, 0, 1);
      scale_rows(d, 0);
    }
    for (int64_t j = 0; j < columns; j += kGroup) {
      const int64_t some = smaller(kGroup, columns - j), group = j / kGroup % GroupScales::kGroups;
      if (nf4 && !group)
        scales.load(weight, k0 + d, depth, (weight.column + j) / kGroup, pieces(columns - j, kGroup));
      if (nf4) scale_rows(d, group);
      const char* code = weight.byte(k0 + d, j);
      int64_t ld = weight.ld;
      if (depth % 2 || some < kGroup) {
        const auto there = static_cast<__mmask64>(~uint64_t{0} >> (kGroup - (nf4 ? pieces(some, 2) : some)));
        for (int64_t i = 0; i < pairs; ++i)
          _mm512_store_si512(copied[i], _mm512_maskz_loadu_epi8(i < depth ? there : 0, code + i * ld));
        code = copied[0], ld = kGroup;
      }
      // A line holds the NF4 codes of two groups.
      const Coming coming{nf4 && group % 2 ? nullptr : weight.byte(k0 + d + kCodeDepth, j), weight.ld};
      evenly(rows, nf4 ? kWholeRows : kHalfRows, [&](int64_t m, int64_t count) {
        add_code_columns(nf4, count, some, code, ld, pairs, scaled[m], c + m * ldc + j, ldc, k0 + d > 0,
                         m ? Coming{} : coming);
      });
    }
  }
}

// Rows of A beside each other, as many elements at a time as fit; calls f(k0, length, stride in words) for each block.
template <class F>
inline void code_blocks(const uint16_t* base, int64_t lda, const int32_t* index, int64_t rows, int64_t k,
                        bool even_then_odd, const Workspace& work, F f) {
  const int64_t room = work.room / rows / 32 * 32 - 32, all = pieces(pieces(k, 2), 32) * 32;
  const int64_t block = 2 * smaller(all, room), stride = block / 2 + 16;
  for (int64_t k0 = 0; k0 < k; k0 += block) {
    const int64_t length = smaller(block, k - k0), words = pieces(length, 64) * 32;
    for (int64_t r = 0; r < rows; ++r) {
      float* row = work.a + r * stride;
      // A sum reads whole groups: what lies beyond the row must be zero.
      for (int64_t i = pieces(length, 2) / W * W; i < words; i += W) Float32::store(row + i, set1(0.0f));
      Words<BFloat16>::pack_row(base + (index ? index[r] : r) * lda + k0, length, row);
      if (even_then_odd) split_even_odd(row, words);
    }
    f(k0, length, stride);
  }
}

template <>
inline bool code_dots<BFloat16>(const uint16_t* base, int64_t lda, const int32_t* index, int64_t rows,
                                const WeightRows<BFloat16>& weights, float* c, int64_t ldc, int64_t apart,
                                const Workspace& work) {
  if (rows > kMostDotCodeRows) return false;
  const bool nf4 = weights.part[0].kind == flex::kNf4;
  const int64_t most = dot_weights(rows);
  code_blocks(base, lda, index, rows, weights.k, nf4, work, [&](int64_t k0, int64_t length, int64_t stride) {
    for (int p = 0; p < weights.parts; ++p)
      for (int64_t j = 0, some; j < weights.columns; j += some) {
        some = j + most <= weights.columns ? most : 1;
        code_dot_of(nf4, some > 1, rows)(weights.part[p], j, k0, length, work.a, stride, c + p * apart + j, ldc,
                                         k0 > 0);
      }
  });
  return true;
}

template <>
inline bool code_axpy<BFloat16>(const uint16_t* base, int64_t lda, const int32_t* index, int64_t rows, int64_t k,
                                const Weight<BFloat16>& weight, int64_t columns, float* c, int64_t ldc,
                                const Workspace& work) {
  const bool nf4 = weight.kind == flex::kNf4;
  // An NF4 panel is a whole group.
  if (nf4 && (weight.column % kGroup || ldc % kGroup)) return false;
  code_blocks(base, lda, index, rows, k, false, work, [&](int64_t k0, int64_t length, int64_t stride) {
    add_code_rows(weight, k0, length, rows, columns, work.a, stride, c, ldc);
  });
  for (int64_t r = 0; r < rows && nf4; ++r)
    for (int64_t j = 0; j < columns; j += kGroup) settle_nf4(c + r * ldc + j);
  return true;
}

}  // namespace
