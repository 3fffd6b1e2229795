// Rows rounded to int8 for products of int8 with int8 (VPDPBUSD, four a lane), AVX-512. Include products.h first.
//
// A row has a scale for every kInt8Group of its elements. As codes of a weight are 128 too large (int8_codes.h), sums
// begin with, or are rid of, 128 times the sum of what these are multiplied with.
#pragma once

#include "cpu/kernels.h"
#include "cpu/int8_codes.h"
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
