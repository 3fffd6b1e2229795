// Packing of operands for AVX2: every element type is reduced as float32, one element a word.
#pragma once

namespace {

// r[i] = column i of the 8 x 8 words in r[]
inline void transpose(__m256* r) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

template <class E>
struct Packing {
  static constexpr int kPerWord = 1;
  using T = typename E::T;

  static V multiply_add(V a, V b, V c) { return fma(a, b, c); }

  // The first n elements at p, as many as a vector holds words of.
  static V load_words(const T* p, int n) { return get<E>(p, n); }
  // The words of one row of a panel, and where their sums belong: in order already.
  static void plain_words(const T* row, const T*, int columns, V& low, V& high) {
    low = columns >= W ? E::load(row) : E::load(row, columns);
    high = columns >= 2 * W ? E::load(row + W) : E::load(row + W, columns > W ? columns - W : 0);
  }
  static void settle(float*) {}

  static void pack_row(const T* source, int64_t length, float* out) {
    over(length, [&](int64_t k, int lanes) { Float32::store(out + k, get<E>(source + k, lanes)); });
  }

  // Panels that are plain neighbours are packed together, row by row: a row's stretch of memory is read once, whole.
  static void pack(const Panel<E>* panels, int count, int64_t k0, int64_t length, float* out) {
    const int64_t size = length * kPanelColumns;
    if (panels[0].transposed) {
      for (int p = 0; p < count; ++p) pack_columns(panels[p], k0, length, out + p * size);
      return;
    }
    constexpr int64_t kAhead = 32;
    for (int64_t k = 0; k < length; ++k, out += kPanelColumns)
      for (int p = 0; p < count; ++p)
        for (int j = 0; j < kPanelColumns; j += W) {
          const T* row = panels[p].base + (k0 + k) * panels[p].ld + j;
          const int left = panels[p].columns - j;
          // Rows lie a page apart, where no hardware prefetcher follows. A prefetch never faults.
          prefetch(row + kAhead * panels[p].ld, W);
          Float32::store(out + p * size + j, left >= W ? E::load(row) : E::load(row, left > 0 ? left : 0));
        }
  }

  static void pack_columns(const Panel<E>& panel, int64_t k0, int64_t length, float* out) {
    for (int half = 0; half < 2; ++half) {
      const int columns = panel.columns - half * W;
      const T* base = panel.base + half * W * panel.ld + k0;
      for (int64_t k = 0; k < length; k += W) {
        const int n = static_cast<int>(smaller(W, length - k));
        V r[W];
        for (int j = 0; j < W; ++j) r[j] = j < columns ? get<E>(base + j * panel.ld + k, n) : set1(0.0f);
        transpose(r);
        for (int i = 0; i < n; ++i) Float32::store(out + (k + i) * kPanelColumns + half * W, r[i]);
      }
    }
  }
};

}  // namespace
