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
// The constant stands first: these instructions return the second operand when either is not a number.
inline V clamp(V x, float low, float high) { return _mm512_min_ps(set1(high), _mm512_max_ps(set1(low), x)); }
inline V nearest(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V times_power_of_2(V x, V n) { return _mm512_scalef_ps(x, n); }

}  // namespace

#include "cpu/exp.h"
