// Weight matrices as stored: in x's dtype, or as codes that are read back a strip at a time.
//
// A strip is a few rows by some columns, decoded into a buffer that stays in the first-level cache and then read like
// any stored matrix: forward and backward use the same codes, and no more than a strip of them is ever wide. Include
// vector_*.h and rows.h first.
#pragma once

#include "cpu/kernels.h"

#if defined(__AVX512F__)
#include "cpu/decode_avx512.h"
#else
#include "cpu/decode_avx2.h"
#endif

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Elements of a strip: 16 KiB of bfloat16.
constexpr int64_t kStrip = 8192;

// Memory that something will read: `rows` stretches of `bytes`, `step` apart.
struct Area {
  const char* at = nullptr;
  int64_t rows = 0, bytes = 0, step = 0;
};

// A matrix, or the part of one that starts at (row, column).
template <class E>
struct Weight {
  using T = typename E::T;
  const char* data;
  int64_t ld;  // elements between rows; bytes for codes
  const uint16_t* scales;
  int64_t scales_ld;
  int64_t kind;  // flex::WeightKind
  int64_t row, column;
  // Of NF4 that is multiplied in int8, for every row from `row` on: what makes its weights numbers of at most 127.
  const float* inverses = nullptr;

  bool stored() const { return kind == flex::kStored; }
  const T* at(int64_t r, int64_t c) const { return reinterpret_cast<const T*>(data) + (row + r) * ld + column + c; }
  Weight from(int64_t r, int64_t c) const {
    return {data, ld, scales, scales_ld, kind, row + r, column + c, inverses ? inverses + r : nullptr};
  }

  // The byte of an element.
  const char* byte(int64_t r, int64_t c) const {
    if (stored()) return reinterpret_cast<const char*>(at(r, c));
    return data + (row + r) * ld + (kind == flex::kNf4 ? (column + c) / 2 : column + c);
  }
  // Bytes between rows.
  int64_t bytes() const { return stored() ? ld * static_cast<int64_t>(sizeof(T)) : ld; }
  // Rows [r, r + rows), columns [c, c + columns); both more than none.
  Area area(int64_t r, int64_t rows, int64_t c, int64_t columns) const {
    return {byte(r, c), rows, byte(r, c + columns - 1) + 1 - byte(r, c), bytes()};
  }
  float scale(int64_t r, int64_t group) const { return widen(scales[(row + r) * scales_ld + group]); }

  // out[i] = element (r, c + i) for i < n, with column + c a multiple of 2 W.
  void decode(int64_t r, int64_t c, int64_t n, T* out) const {
    int64_t i = 0;
    if (kind == flex::kInt8) {
      const auto* codes = reinterpret_cast<const int8_t*>(byte(r, c));
      const float s = scale(r, 0);
      for (; i + 2 * W <= n; i += 2 * W) decode_int8<E>(codes + i, 2 * W, s, out + i);
      if (i < n) decode_int8<E>(codes + i, n - i, s, out + i);
      return;
    }
    const auto* codes = reinterpret_cast<const uint8_t*>(byte(r, c));
    const auto scale_at = [&](int64_t at) { return scale(r, (column + c + at) / flex::kGroupColumns); };
    for (; i + 2 * W <= n; i += 2 * W) decode_nf4<E>(codes + i / 2, 2 * W, scale_at(i), out + i);
    if (i < n) decode_nf4<E>(codes + i / 2, n - i, scale_at(i), out + i);
  }

  // Into the second-level cache: the columns [c, c + n) of a row that may lie past the end; a prefetch never faults.
  // Inlined by force: GCC sees no effect in a function that only prefetches, and drops calls of it.
  __attribute__((always_inline)) void prefetch(int64_t r, int64_t c, int64_t n) const {
    const char *first = byte(r, c), *end = byte(r, c + n - 1) + 1;
    for (; first < end; first += 64) __builtin_prefetch(first, 0, 2);
  }
};

}  // namespace
