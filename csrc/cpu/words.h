// Words of packed operands: every element type is reduced as float32, one element a word, but for bfloat16 with
// AVX-512.
// Include vector_*.h and rows.h first.
#pragma once

namespace {

template <class E>
struct Words {
  static constexpr int kPerWord = 1;
  // Words as an element type, and whether elements are stored as such.
  using Word = Float32;
  static constexpr bool kStoredWords = sizeof(typename E::T) == sizeof(float);
  using T = typename E::T;

  static V multiply_add(V a, V b, V c) { return fma(a, b, c); }

  // The first n elements at p, as many as a vector holds words of.
  static V load_words(const T* p, int n) { return get<E>(p, n); }
  // The words of one row, up to two vectors of columns, and where their sums belong: in order already.
  static void plain_words(const T* row, const T*, int columns, V& low, V& high) {
    low = columns >= W ? E::load(row) : E::load(row, columns);
    high = columns >= 2 * W ? E::load(row + W) : E::load(row + W, columns > W ? columns - W : 0);
  }
  static void settle(float*) {}
  // The column of lane `lane` of low (half 0) or high.
  static constexpr int column_of(int half, int lane) { return half * W + lane; }

  static void pack_row(const T* source, int64_t length, float* out) {
    over(length, [&](int64_t k, int lanes) { Float32::store(out + k, get<E>(source + k, lanes)); });
  }
};

}  // namespace

#if defined(__AVX512F__)
#include "cpu/words_avx512.h"
#else
namespace {

// Exchanges rows and columns of W x W words.
inline void transpose_square(float (*square)[W]) {
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float word = square[i][j];
      square[i][j] = square[j][i];
      square[j][i] = word;
    }
}

}  // namespace
#endif
