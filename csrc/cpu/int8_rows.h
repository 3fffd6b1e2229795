// Rows rounded to int8 for products of int8 with int8 (VPDPBUSD, four a lane), AVX-512. Include products.h first.
//
// A row has a scale for every kInt8Group of its elements. Codes of a weight are taken as unsigned, 128 too large: sums
// begin with, or are rid of, 128 times the sum of what these are multiplied with. A weight in NF4 is multiplied as the
// int8 weight nearest to it: a row's largest scale is its scale, and a group's 16 levels are rounded to whole numbers
// of 127ths of it.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tasks.h"

namespace {

using flex::kInt8Group;

// Rows rounded to int8: row r's codes at codes + r * ld, its scales at scales + r * groups.
struct Int8Operand {
  const int8_t* codes;
  const float* scales;
  int64_t k;
  int64_t ld() const { return pieces(k, flex::kInt8Unit) * flex::kInt8Unit; }
  int64_t groups() const { return pieces(k, kInt8Group); }
};

// What no row is multiplied with before it is rounded.
struct NoScales {
  V operator()(V values, int64_t, int) const { return values; }
};

// The scales of a weight's rows as int8.
template <class E>
struct RowScales {
  Weight<E> weight;

  // `lanes` values times the scales from row r on; the others are zeros.
  V operator()(V values, int64_t r, int lanes) const {
    if (weight.inverses)
      return _mm512_maskz_div_ps(first(lanes), values, get<Float32>(weight.inverses + r, lanes));
    return mul(values, get<BFloat16>(weight.scales + weight.row + r, lanes));
  }
};

// Codes and scales of `source` [k], multiplied by `multiplier` first; zeros up to a multiple of 64. What is not finite
// leaves its group's scale not finite.
template <class E, class Multiplier>
void quantize_row(const typename E::T* source, int64_t k, const Multiplier& multiplier, int8_t* codes, float* scales) {
  constexpr int64_t kVectors = kInt8Group / W;
  const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
  for (int64_t g = 0; g < k; g += kInt8Group, ++scales) {
    const int64_t length = smaller(kInt8Group, k - g), vectors = pieces(length, W);
    V values[kVectors];
    __m512i most = _mm512_setzero_si512();
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = g + v * W;
      const int lanes = static_cast<int>(smaller(W, k - at));
      values[v] = multiplier(get<E>(source + at, lanes), at, lanes);
      // As integers, so that what is not a number is the largest.
      most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(values[v]), no_sign));
    }
    const float largest =
        _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(_mm512_reduce_max_epu32(most)))));
    *scales = largest * (1.0f / 127.0f);
    const V factor = set1(largest > 0.0f ? 127.0f / largest : 0.0f);
    for (int64_t v = 0; v < pieces(length, 64) * 4; ++v) {
      const __m512i rounded = v < vectors ? _mm512_cvtps_epi32(mul(values[v], factor)) : _mm512_setzero_si512();
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + g + v * W), _mm512_cvtsepi32_epi8(rounded));
    }
  }
}

// The sum of the codes of group g of a row.
inline int32_t sum_of_codes(const Int8Operand& a, int64_t row, int64_t g) {
  const int8_t* from = a.codes + row * a.ld();
  __m512i sums = _mm512_setzero_si512();
  for (int64_t k = g * kInt8Group; k < smaller((g + 1) * kInt8Group, a.ld()); k += 64)
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(from + k));
  return _mm512_reduce_add_epi32(sums);
}

// 64 codes of a weight, of which n are there, as unsigned.
inline __m512i unsigned_codes(const char* p, int64_t n) {
  const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80));
  if (n >= 64) return _mm512_xor_si512(_mm512_loadu_si512(p), top);
  const auto mask = n > 0 ? static_cast<__mmask64>((uint64_t{1} << n) - 1) : __mmask64{0};
  return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, p), top);
}

// The same of NF4, of which n are there, beginning a group of columns with this scale, in a row with this inverse.
inline __m512i unsigned_nf4_codes(const char* p, int64_t n, const uint16_t* scale, float inverse) {
  const V factor = mul(broadcast_bfloat(scale), set1(inverse));
  // Whole numbers in the low bits of floats of 2^23 and more, rounded by the addition.
  const __m512i whole = _mm512_castps_si512(fma(nf4_level_values(), factor, set1(8388608.0f + 128.0f)));
  const __m512i table = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(whole));
  const __m512i pairs = _mm512_cvtepu8_epi16(thirty_two_bytes(p, (n + 1) / 2));
  constexpr int kEitherOfTwoAndThird = 0xa8;
  return _mm512_shuffle_epi8(table, _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi16(pairs, 4),
                                                              _mm512_set1_epi8(0x0f), kEitherOfTwoAndThird));
}

// 64 codes of a row of a weight from a column on that begins a group, of which n are there, as unsigned.
template <bool kNf4, class E>
__attribute__((always_inline)) inline __m512i row_codes(const Weight<E>& weight, int64_t r, int64_t column, int64_t n) {
  const char* p = weight.data + (weight.row + r) * weight.ld;
  const int64_t at = weight.column + column;
  if (!kNf4) return unsigned_codes(p + at, n);
  const uint16_t* scales = weight.scales + (weight.row + r) * weight.scales_ld;
  return unsigned_nf4_codes(p + at / 2, n, scales + at / flex::kGroupColumns, weight.inverses[r]);
}

// The largest of a row's scales, bfloat16, signs apart.
inline float largest_scale(const uint16_t* scales, int64_t count) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 32) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << smaller(32, count - i)) - 1);
    const __m512i sizes = _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, scales + i), _mm512_set1_epi16(0x7fff));
    most = _mm512_max_epu16(most, sizes);
  }
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // There is an instruction for the smallest of eight.
  const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
  return widen(static_cast<uint16_t>(~_mm_extract_epi16(smallest, 0)));
}

// Inverses of rows [from, to) of a weight in NF4 with `columns` columns. Scales too small for one are taken for zero.
template <class E>
void find_inverses(const Weight<E>& weight, int64_t from, int64_t to, int64_t columns, float* inverses) {
  constexpr float kSmallest = 1e-30f;
  for (int64_t r = from; r < to; ++r) {
    const float largest = largest_scale(weight.scales + (weight.row + r) * weight.scales_ld,
                                        pieces(columns, flex::kGroupColumns));
    inverses[r] = 127.0f / (largest < kSmallest ? kSmallest : largest);
  }
}

// Words of 64 columns of four rows of codes: lane L of w[q], of 128 bits, holds those of columns 16 L + 4 q to
// 16 L + 4 q + 3.
inline void words_of_rows(const __m512i* r, V* w) {
  const __m512i low = _mm512_unpacklo_epi8(r[0], r[1]), high = _mm512_unpackhi_epi8(r[0], r[1]);
  const __m512i next_low = _mm512_unpacklo_epi8(r[2], r[3]), next_high = _mm512_unpackhi_epi8(r[2], r[3]);
  w[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, next_low));
  w[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, next_low));
  w[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high, next_high));
  w[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high, next_high));
}

// What words_of_rows left, or sums of it, in the order of the columns.
inline void in_order(V* w) {
  const V front[2] = {_mm512_shuffle_f32x4(w[0], w[1], 0x44), _mm512_shuffle_f32x4(w[2], w[3], 0x44)};
  const V back[2] = {_mm512_shuffle_f32x4(w[0], w[1], 0xee), _mm512_shuffle_f32x4(w[2], w[3], 0xee)};
  w[0] = _mm512_shuffle_f32x4(front[0], front[1], 0x88);
  w[1] = _mm512_shuffle_f32x4(front[0], front[1], 0xdd);
  w[2] = _mm512_shuffle_f32x4(back[0], back[1], 0x88);
  w[3] = _mm512_shuffle_f32x4(back[0], back[1], 0xdd);
}

// In assembly, as sums change between the integers of VPDPBUSD and what a register may hold: GCC 12 keeps a copy of
// each for either type, and twelve rows no longer fit in the registers.
inline void add_products(V& sums, V codes, V word) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(word));
}

// Whether a segment's products may be of int8 with int8.
inline bool in_int8(const flex::Segment& s) { return s.codes != 0; }

inline Int8Operand operand_of(const flex::Segment& s, int64_t k) {
  return {address<const int8_t>(s.codes), address<const float>(s.code_scales), k};
}
inline Int8Operand dy_operand_of(const flex::Segment& s, int64_t k) {
  return {address<const int8_t>(s.dy_codes), address<const float>(s.dy_scales), k};
}

// A weight of a segment with what its rows are multiplied with in int8, once find_all_inverses was here.
template <class E>
Weight<E> with_inverses(Weight<E> weight, const flex::Segment& s) {
  if (weight.kind == flex::kNf4) weight.inverses = address<const float>(s.inverses);
  return weight;
}

// Finds the inverses of a weight in NF4 of every segment that multiplies in int8, its rows shared out among the threads
// of this region, and waits for all of them. `weight_of(segment)` has `rows_of(segment)` rows of columns_of(segment).
template <class WeightOf, class RowsOf, class ColumnsOf>
void find_all_inverses(const flex::Segment* segments, int64_t count, WeightOf weight_of, RowsOf rows_of,
                       ColumnsOf columns_of) {
  bool any = false;
  for (int64_t i = 0; i < count; ++i) {
    const flex::Segment& s = segments[i];
    const auto weight = weight_of(s);
    if (!in_int8(s) || weight.kind != flex::kNf4) continue;
    any = true;
    const int64_t rows = rows_of(s), team = team_size(), thread = thread_index();
    find_inverses(weight, rows * thread / team, rows * (thread + 1) / team, columns_of(s), address<float>(s.inverses));
  }
  if (any) {
#pragma omp barrier
  }
}

// Rounds an operand of every segment that multiplies in int8, its rows shared out among the threads of this region, and
// waits for all of them. `operand_of(segment)` says where codes go, `row_of(segment, r)` where row r comes from, and
// `multiplier_of(segment)` what its elements are multiplied with first.
template <class E, class OperandOf, class RowOf, class MultiplierOf>
void quantize_operands(const flex::Segment* segments, int64_t count, OperandOf operand_of, RowOf row_of,
                       MultiplierOf multiplier_of) {
  bool any = false;
  for (int64_t i = 0; i < count; ++i) {
    const flex::Segment& s = segments[i];
    if (!in_int8(s)) continue;
    any = true;
    const Int8Operand to = operand_of(s);
    for (int64_t r = thread_index(); r < s.rows; r += team_size())
      quantize_row<E>(row_of(s, r), to.k, multiplier_of(s), const_cast<int8_t*>(to.codes) + r * to.ld(),
                      const_cast<float*>(to.scales) + r * to.groups());
  }
  if (any) {
#pragma omp barrier
  }
}

}  // namespace
