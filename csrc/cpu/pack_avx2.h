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
    const Weight<E> weight = panels[0].weight.from(k0, 0);
    const int64_t columns = (count - 1) * kPanelColumns + panels[count - 1].columns;
    alignas(64) T strip[kWideColumns];
    for (int64_t k = 0; k < length; ++k, out += kPanelColumns) {
      // Rows lie a page apart, where no hardware prefetcher follows. A prefetch never faults.
      weight.prefetch(k + kAhead, 0, columns);
      if (!weight.stored()) weight.decode(k, 0, columns, strip);
      const T* row = weight.stored() ? weight.at(k, 0) : strip;
      for (int p = 0; p < count; ++p)
        for (int j = 0; j < kPanelColumns; j += W) {
          const int left = panels[p].columns - j;
          const T* from = row + p * kPanelColumns + j;
          Float32::store(out + p * size + j, left >= W ? E::load(from) : E::load(from, left > 0 ? left : 0));
        }
    }
  }

  // Half a panel: `columns` rows of a weight, at most W, from `base` on.
  static void pack_half(const T* base, int64_t ld, int columns, int64_t length, float* out) {
    for (int64_t k = 0; k < length; k += W) {
      const int n = static_cast<int>(smaller(W, length - k));
      V r[W];
      for (int j = 0; j < W; ++j) r[j] = j < columns ? get<E>(base + j * ld + k, n) : set1(0.0f);
      transpose(r);
      for (int i = 0; i < n; ++i) Float32::store(out + (k + i) * kPanelColumns, r[i]);
    }
  }

  static void pack_columns(const Panel<E>& panel, int64_t k0, int64_t length, float* out) {
    for (int half = 0; half < 2; ++half, out += W) {
      const int columns = panel.columns - half * W;
      const Weight<E> weight = panel.weight.from(half * W, k0);
      if (weight.stored()) {
        pack_half(weight.at(0, 0), weight.ld, columns, length, out);
        continue;
      }
      alignas(64) T strip[kStrip];
      constexpr int64_t kColumns = kStrip / W;
      for (int64_t k = 0; k < length; k += kColumns) {
        const int64_t n = smaller(kColumns, length - k);
        for (int j = 0; j < W && j < columns; ++j) weight.decode(j, k, n, strip + j * kColumns);
        pack_half(strip, kColumns, columns, n, out + k * kPanelColumns);
      }
    }
  }
};

}  // namespace
