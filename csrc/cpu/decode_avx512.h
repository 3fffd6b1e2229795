// Codes to values, AVX-512.
#pragma once

#include "cpu/kernels.h"

namespace {

inline float widen(uint16_t bfloat) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bfloat << 16))); }

// The first n of 16 bytes, the others zero.
inline __m128i sixteen_bytes(const void* p, int64_t n) {
  if (n >= 16) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm_maskz_loadu_epi8(n > 0 ? first(static_cast<int>(n)) : 0, p);
}

// 32 int8 times a scale, as two vectors in order; n of them are read.
inline void int8_values(const int8_t* p, int64_t n, float scale, V& low, V& high) {
  const __m128i a = sixteen_bytes(p, n), b = sixteen_bytes(p + 16, n - 16);
  low = mul(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a)), set1(scale));
  high = mul(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)), set1(scale));
}

// 32 NF4 levels times a scale, the even columns and the odd ones; n of them are read.
inline void nf4_values(const uint8_t* p, int64_t n, float scale, V& even, V& odd) {
  const __m512i pairs = _mm512_cvtepu8_epi32(sixteen_bytes(p, (n + 1) / 2));
  const V levels = _mm512_loadu_ps(flex::kNf4Levels), s = set1(scale);
  // The permutation looks at the low four bits of an index alone.
  even = mul(_mm512_permutexvar_ps(pairs, levels), s);
  odd = mul(_mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), levels), s);
}

template <class E>
inline void put_pair(typename E::T* out, V low, V high, int64_t n) {
  if (n >= 2 * W) {
    E::store(out, low);
    E::store(out + W, high);
    return;
  }
  E::store(out, low, static_cast<int>(n));
  if (n > W) E::store(out + W, high, static_cast<int>(n - W));
}

template <class E>
inline void decode_int8(const int8_t* p, int64_t n, float scale, typename E::T* out) {
  V low, high;
  int8_values(p, n, scale, low, high);
  put_pair<E>(out, low, high, n);
}

template <class E>
inline void decode_nf4(const uint8_t* p, int64_t n, float scale, typename E::T* out) {
  V even, odd;
  nf4_values(p, n, scale, even, odd);
  const __m512i first_half = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second_half = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  put_pair<E>(out, _mm512_permutex2var_ps(even, first_half, odd), _mm512_permutex2var_ps(even, second_half, odd), n);
}

inline void put_words(uint16_t* out, __m512i words, int64_t n) {
  if (n >= 2 * W) _mm512_storeu_si512(out, words);
  else _mm512_mask_storeu_epi16(out, static_cast<__mmask32>((uint64_t{1} << n) - 1), words);
}

template <>
inline void decode_int8<BFloat16>(const int8_t* p, int64_t n, float scale, uint16_t* out) {
  V low, high;
  int8_values(p, n, scale, low, high);
  put_words(out, (__m512i)_mm512_cvtne2ps_pbh(high, low), n);
}

// The 16 levels times a scale as bfloat16, twice: an index is looked up by its low five bits, of which the fifth
// belongs to the next code.
inline __m512i nf4_table(V levels, V scale) {
  return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(mul(levels, scale)));
}

// The bytes of 32 NF4 codes, each widened to 32 bits; `codes` of them are read, and the others zero.
inline __m512i nf4_bytes(const void* p, int64_t codes) {
  return _mm512_cvtepu8_epi32(sixteen_bytes(p, codes / 2 + codes % 2));
}

// 32 NF4 codes in order, from a table of equal halves.
inline __m512i nf4_in_order(__m512i bytes, __m512i table) {
  return _mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), table);
}

template <>
inline void decode_nf4<BFloat16>(const uint8_t* p, int64_t n, float scale, uint16_t* out) {
  const __m512i table = nf4_table(_mm512_loadu_ps(flex::kNf4Levels), set1(scale));
  put_words(out, nf4_in_order(nf4_bytes(p, n), table), n);
}

}  // namespace
