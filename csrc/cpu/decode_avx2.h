// Codes to values, AVX2.
#pragma once

#include "cpu/kernels.h"

namespace {

inline float widen(uint16_t bfloat) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bfloat << 16))); }

// Eight bytes, the last ones zero where fewer than eight are to be read.
inline __m128i eight_bytes(const void* p, int64_t n) {
  if (n >= 8) return _mm_loadl_epi64(static_cast<const __m128i*>(p));
  uint8_t buffer[8] = {};
  if (n > 0) std::memcpy(buffer, p, n);
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(buffer));
}

template <class E>
inline void put_pair(typename E::T* out, V low, V high, int64_t n) {
  if (n >= 2 * W) {
    E::store(out, low);
    E::store(out + W, high);
    return;
  }
  E::store(out, low, static_cast<int>(n < W ? n : W));
  if (n > W) E::store(out + W, high, static_cast<int>(n - W));
}

// out[i] = p[i] * scale for i < n <= 2 W
template <class E>
inline void decode_int8(const int8_t* p, int64_t n, float scale, typename E::T* out) {
  const V s = set1(scale);
  const V low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(p, n)));
  const V high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(p + W, n - W)));
  put_pair<E>(out, mul(low, s), mul(high, s), n);
}

// The levels of eight indices, of which the low four bits count.
inline V levels_of(__m256i index) {
  const V below = _mm256_permutevar8x32_ps(_mm256_loadu_ps(flex::kNf4Levels), index);
  const V above = _mm256_permutevar8x32_ps(_mm256_loadu_ps(flex::kNf4Levels + 8), index);
  return _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

// out[i] = level of code i * scale for i < n <= 2 W, two codes to a byte
template <class E>
inline void decode_nf4(const uint8_t* p, int64_t n, float scale, typename E::T* out) {
  const __m256i pairs = _mm256_cvtepu8_epi32(eight_bytes(p, (n + 1) / 2));
  const V even = levels_of(pairs), odd = levels_of(_mm256_srli_epi32(pairs, 4)), s = set1(scale);
  const V a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
  put_pair<E>(out, mul(_mm256_permute2f128_ps(a, b, 0x20), s), mul(_mm256_permute2f128_ps(a, b, 0x31), s), n);
}

}  // namespace
