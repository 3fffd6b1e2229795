// The "vector" of the plain build: one float. Any processor, any compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using V = float;
constexpr int W = 1;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Float32 {
  using T = float;
  static V load(const T* p) { return *p; }
  static V load(const T* p, int) { return *p; }
  static void store(T* p, V v) { *p = v; }
  static void store(T* p, V v, int) { *p = v; }
};

struct BFloat16 {
  using T = uint16_t;
  static V load(const T* p) { return float_of(static_cast<uint32_t>(*p) << 16); }
  static V load(const T* p, int) { return load(p); }
  // Round to nearest even; what is not a number stays so.
  static void store(T* p, V v) {
    const uint32_t bits = bits_of(v);
    *p = v != v ? 0x7fc0 : static_cast<T>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  static void store(T* p, V v, int) { store(p, v); }
};

struct Float16 {
  using T = uint16_t;
  // Moving the 15 value bits to float32's position divides by 2^112; the product also normalises subnormals.
  static V load(const T* p) {
    const uint32_t half = *p, sign = (half & 0x8000u) << 16, value = (half & 0x7fffu) << 13;
    if (value >= 0x0f800000u) return float_of(sign | 0x7f800000u | value);
    return float_of(sign | bits_of(float_of(value) * 0x1p112f));
  }
  static V load(const T* p, int) { return load(p); }
  static void store(T* p, V v) {
    const uint32_t sign = (bits_of(v) >> 16) & 0x8000u, bits = bits_of(v) & 0x7fffffffu;
    uint32_t half;
    if (bits > 0x7f800000u) {
      half = 0x7e00;
    } else if (bits >= 0x477ff000u) {  // 65520 and above round to infinity
      half = 0x7c00;
    } else if (bits < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the subnormal, rounded, in the low bits
      half = bits_of(float_of(bits) + 0.5f) - 0x3f000000u;
    } else {
      half = (bits - 0x38000000u + 0x0fff + ((bits >> 13) & 1)) >> 13;
    }
    *p = static_cast<T>(sign | half);
  }
  static void store(T* p, V v, int) { store(p, v); }
};

inline V set1(float x) { return x; }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline float sum(V a) { return a; }
inline V sigmoid(V x) { return 1.0f / (1.0f + std::exp(-x)); }

}  // namespace
