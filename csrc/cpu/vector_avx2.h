// The vector of the AVX2 build (with FMA and F16C): 8 floats, and the operations that the kernels are written in.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

using V = __m256;
constexpr int W = 8;

inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct Float32 {
  using T = float;
  static V load(const T* p) { return _mm256_loadu_ps(p); }
  static V load(const T* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store(T* p, V v) { _mm256_storeu_ps(p, v); }
  static void store(T* p, V v, int n) { _mm256_maskstore_ps(p, first(n), v); }
};

// AVX2 has no masked 16-bit load: a partial vector goes through eight halves on the stack.
struct Halves {
  using T = uint16_t;
  static __m128i fetch(const T* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m128i fetch(const T* p, int n) {
    T buffer[8] = {};
    std::memcpy(buffer, p, (n < 8 ? n : 8) * sizeof(T));
    return fetch(buffer);
  }
  static void put(T* p, __m128i h) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h); }
  static void put(T* p, __m128i h, int n) {
    T buffer[8];
    put(buffer, h);
    std::memcpy(p, buffer, (n < 8 ? n : 8) * sizeof(T));
  }
};

struct BFloat16 : Halves {
  static V widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
  static V load(const T* p) { return widen(fetch(p)); }
  static V load(const T* p, int n) { return widen(fetch(p, n)); }
  // Round to nearest even; what is not a number stays so.
  static __m128i narrow(V v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    const __m256i high = _mm256_srli_epi32(kept, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    return _mm256_castsi256_si128(packed);
  }
  static void store(T* p, V v) { put(p, narrow(v)); }
  static void store(T* p, V v, int n) { put(p, narrow(v), n); }
};

struct Float16 : Halves {
  static V load(const T* p) { return _mm256_cvtph_ps(fetch(p)); }
  static V load(const T* p, int n) { return _mm256_cvtph_ps(fetch(p, n)); }
  static __m128i narrow(V v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static void store(T* p, V v) { put(p, narrow(v)); }
  static void store(T* p, V v, int n) { put(p, narrow(v), n); }
};

inline V set1(float x) { return _mm256_set1_ps(x); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(V a) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
// The sums of four vectors, each added up in the same order.
inline __m128 four_sums(V a, V b, V c, V d) {
  const V lanes = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
}
// p[i] (+)= sums[i] for i < n
inline void add_sums(__m128 sums, int n, float* p, bool accumulate) {
  const __m128i lanes = _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3));
  if (accumulate) sums = _mm_add_ps(sums, _mm_maskload_ps(p, lanes));
  _mm_maskstore_ps(p, lanes, sums);
}
// The constant stands first: these instructions return the second operand when either is not a number.
inline V clamp(V x, float low, float high) { return _mm256_min_ps(set1(high), _mm256_max_ps(set1(low), x)); }
inline V nearest(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V times_power_of_2(V x, V n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return mul(x, _mm256_castsi256_ps(exponent));
}

}  // namespace

#include "cpu/exp.h"
