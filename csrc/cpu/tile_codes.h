// Codes as operands of tiles: decoded in registers and written where the tiles are loaded from. The words are those of
// Weight::decode() and Words::plain_words(), without the buffer between the two and with fewer shuffles.
//
// NF4 is looked up as bfloat16: the 16 levels times a scale, rounded once, lie in a register, and the code is the
// index. Include products.h first.
#pragma once

#include "cpu/kernels.h"

namespace {

// A scale in every lane, from memory: by way of a scalar it would take a shuffle more, and shuffles are the bound here.
inline V scale_lanes(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(static_cast<int16_t>(*p)), 16));
}

// The levels times two scales as bfloat16: times `a` under the indices 0 to 15, times `b` under 16 to 31.
inline __m512i nf4_tables(V levels, V a, V b) {
  return (__m512i)_mm512_cvtne2ps_pbh(mul(levels, b), mul(levels, a));
}

// 32 int8 times a scale as bfloat16, in order; `codes` of them are read, and the others zero.
inline __m512i int8_in_order(const char* p, int64_t codes, V scale) {
  const auto values = [&](__m128i bytes) { return mul(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale); };
  return (__m512i)_mm512_cvtne2ps_pbh(values(sixteen_bytes(p + W, codes - W)), values(sixteen_bytes(p, codes)));
}

// `rows` rows of codes, `length` columns from `column` on, the first of a group. Rows begin 32 words of `out` apart;
// every 32 columns of one are `step` words apart, with zeros after the last. Calls before_row() as often as it says.
template <class BeforeRow>
inline void decode_rows(const Weight<BFloat16>& weight, int64_t rows, int64_t column, int64_t length, uint16_t* out,
                        int64_t step, BeforeRow before_row) {
  constexpr int64_t kWords = 2 * W, kGroup = flex::kGroupColumns;
  const V levels = Float32::load(flex::kNf4Levels);
  for (int64_t r = 0; r < rows; ++r) {
    before_row();
    const char* codes = weight.byte(r, column);
    const uint16_t* scales = weight.scales + (weight.row + r) * weight.scales_ld;
    uint16_t* to = out + r * kWords;
    int64_t k = 0;
    if (weight.kind == flex::kInt8) {
      const V scale = scale_lanes(scales);
      for (; k + kWords <= length; k += kWords, to += step)
        _mm512_storeu_si512(to, int8_in_order(codes + k, kWords, scale));
      if (k < length) _mm512_storeu_si512(to, int8_in_order(codes + k, length - k, scale));
      continue;
    }
    scales += (weight.column + column) / kGroup;
    const auto tables = [&] {
      const V scale = scale_lanes(scales + k / kGroup);
      return nf4_tables(levels, scale, scale);
    };
    for (; k + kGroup <= length; k += kGroup, to += 2 * step) {
      const __m512i both = tables();
      _mm512_storeu_si512(to, nf4_in_order(nf4_bytes(codes + k / 2, kWords), both));
      _mm512_storeu_si512(to + step, nf4_in_order(nf4_bytes(codes + k / 2 + W, kWords), both));
    }
    for (; k < length; k += kWords, to += step) {
      const int64_t n = smaller(kWords, length - k);
      const auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
      const __m512i words = nf4_in_order(nf4_bytes(codes + k / 2, n), tables());
      _mm512_storeu_si512(to, _mm512_maskz_mov_epi16(mask, words));
    }
  }
}

// Words (row k, row k + 1) of up to 32 columns of codes, for even k < length: put(k, low, high) with the two halves in
// the order of Words::plain_words. Row `length` is zeros.
template <class Put>
inline void decode_pairs(const Weight<BFloat16>& weight, int64_t columns, int64_t length, Put put) {
  const char* row = weight.byte(0, 0);
  const int64_t ld = weight.ld, group = weight.kind == flex::kInt8 ? 0 : weight.column / flex::kGroupColumns;
  const uint16_t* scale = weight.scales + weight.row * weight.scales_ld + group;
  const V levels = Float32::load(flex::kNf4Levels);
  for (int64_t k = 0; k < length; k += 2, row += 2 * ld, scale += 2 * weight.scales_ld) {
    const bool both = k + 1 < length;
    const char* next = both ? row + ld : row;
    const V s = scale_lanes(scale), t = both ? scale_lanes(scale + weight.scales_ld) : set1(0.0f);
    __m512i low, high;
    if (weight.kind == flex::kInt8) {
      const __m512i a = int8_in_order(row, columns, s), b = int8_in_order(next, columns, t);
      low = _mm512_unpacklo_epi16(a, b);
      high = _mm512_unpackhi_epi16(a, b);
    } else {
      // Indices of both rows side by side, those of the second with the fifth bit; even columns first, then odd ones.
      const __m512i tables = nf4_tables(levels, s, t);
      const __m512i bytes = _mm512_or_si512(nf4_bytes(row, columns), _mm512_slli_epi32(nf4_bytes(next, columns), 16));
      const auto words = [&](__m512i index) {
        constexpr int kAndOr = 0xea;  // (first & second) | third
        return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(index, _mm512_set1_epi32(0x000f000f),
                                                                  _mm512_set1_epi32(0x00100000), kAndOr), tables);
      };
      const __m512i even = words(bytes), odd = words(_mm512_srli_epi32(bytes, 4));
      low = _mm512_unpacklo_epi32(even, odd);
      high = _mm512_unpackhi_epi32(even, odd);
    }
    put(k, _mm512_castsi512_ps(low), _mm512_castsi512_ps(high));
  }
}

}  // namespace
