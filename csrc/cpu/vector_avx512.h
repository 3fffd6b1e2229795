// The vector of the AVX-512 build: 16 floats, and the operations that the kernels are written in.
#pragma once

#include <immintrin.h>

#include <cstdint>

// GCC 12 takes the deliberately undefined vectors of its own intrinsics for mistakes (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace {

using V = __m512;
constexpr int W = 16;

inline __mmask16 first(int n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

struct Float32 {
  using T = float;
  static V load(const T* p) { return _mm512_loadu_ps(p); }
  static V load(const T* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(T* p, V v) { _mm512_storeu_ps(p, v); }
  static void store(T* p, V v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
};

struct BFloat16 {
  using T = uint16_t;
  static V widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
  static V load(const T* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static V load(const T* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  static __m256i narrow(V v) { return (__m256i)_mm512_cvtneps_pbh(v); }
  static void store(T* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
  static void store(T* p, V v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }
};

struct Float16 {
  using T = uint16_t;
  static V load(const T* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static V load(const T* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static __m256i narrow(V v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static void store(T* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
  static void store(T* p, V v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }
};

inline V set1(float x) { return _mm512_set1_ps(x); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(V a) { return _mm512_reduce_add_ps(a); }
// The sums of four vectors, each added up in the same order.
inline __m128 four_sums(V a, V b, V c, V d) {
  const V ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const V cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  const V lanes = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
// p[i] (+)= sums[i] for i < n
inline void add_sums(__m128 sums, int n, float* p, bool accumulate) {
  const auto lanes = static_cast<__mmask8>((1 << n) - 1);
  if (accumulate) sums = _mm_add_ps(sums, _mm_maskz_loadu_ps(lanes, p));
  _mm_mask_storeu_ps(p, lanes, sums);
}
// The constant stands first: these instructions return the second operand when either is not a number.
inline V clamp(V x, float low, float high) { return _mm512_min_ps(set1(high), _mm512_max_ps(set1(low), x)); }
inline V nearest(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V times_power_of_2(V x, V n) { return _mm512_scalef_ps(x, n); }

}  // namespace

#include "cpu/exp.h"
