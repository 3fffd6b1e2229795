// Packing of operands for AVX-512: bfloat16 stays as it is, two to a word, for VDPBF16PS; float16 widens to float32.
#pragma once

namespace {

// out[i] = column i of the 16 x 16 words in rows[]
inline void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Element types that are reduced as float32: one element a word.
template <class E>
struct Packing {
  static constexpr int kPerWord = 1;
  using T = typename E::T;

  static V multiply_add(V a, V b, V c) { return fma(a, b, c); }

  static __m512i words(const T* p, int n) { return _mm512_castps_si512(n >= W ? E::load(p) : E::load(p, n)); }
  static V load_words(const T* p, int n) { return _mm512_castsi512_ps(words(p, n)); }
  // The words of one row of a panel, and where their sums belong: in order already.
  static void plain_words(const T* row, const T*, int columns, V& low, V& high) {
    low = columns >= W ? E::load(row) : E::load(row, columns);
    high = columns >= 2 * W ? E::load(row + W) : E::load(row + W, columns > W ? columns - W : 0);
  }
  static void settle(float*) {}

  static void pack_row(const T* source, int64_t length, float* out) {
    over(length, [&](int64_t k, int lanes) { Float32::store(out + k, get<E>(source + k, lanes)); });
  }

  static void plain_row(const T* row, const T*, int columns, float* out) {
    for (int j = 0; j < kPanelColumns; j += W)
      Float32::store(out + j, columns - j >= W ? E::load(row + j) : E::load(row + j, columns > j ? columns - j : 0));
  }

  static void pack(const Panel<E>* panels, int count, int64_t k0, int64_t length, float* out);
};

template <>
struct Packing<BFloat16> {
  static constexpr int kPerWord = 2;
  using T = uint16_t;

  static V multiply_add(V a, V b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

  // n counts elements; an odd one is paired with zero.
  static __m512i words(const T* p, int n) {
    return n >= 2 * W ? _mm512_loadu_si512(p)
                      : _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }

  static void pack_row(const T* source, int64_t length, float* out) {
    int64_t k = 0;
    for (; k + 2 * W <= length; k += 2 * W) _mm512_storeu_si512(out + k / 2, words(source + k, 2 * W));
    if (k < length) _mm512_storeu_si512(out + k / 2, words(source + k, static_cast<int>(length - k)));
  }

  static V load_words(const T* p, int n) { return _mm512_castsi512_ps(words(p, n)); }

  // The words of two rows, (row[j], next[j]), in the order of the unpacking instructions; next may be null for zeros.
  static void plain_words(const T* row, const T* next, int columns, V& low, V& high) {
    const __m512i a = words(row, columns), b = next ? words(next, columns) : _mm512_setzero_si512();
    low = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
    high = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
  }
  // Puts the words of a panel of plain_words in the order of its columns.
  static void settle(float* out, V low, V high) {
    const __m512i first_half = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second_half = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i a = _mm512_castps_si512(low), b = _mm512_castps_si512(high);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, first_half, b));
    _mm512_storeu_si512(out + W, _mm512_permutex2var_epi64(a, second_half, b));
  }
  static void settle(float* out) { settle(out, Float32::load(out), Float32::load(out + W)); }

  static void plain_row(const T* row, const T* next, int columns, float* out) {
    V low, high;
    plain_words(row, next, columns, low, high);
    settle(out, low, high);
  }

  static void pack(const Panel<BFloat16>* panels, int count, int64_t k0, int64_t length, float* out);
};

// Half a panel: `columns` rows of a weight, at most W, from `base` on.
template <class P, class T>
void pack_half(const T* base, int64_t ld, int columns, int64_t length, float* out) {
  constexpr int kStep = W * P::kPerWord;
  for (int64_t k = 0; k < length; k += kStep) {
    const int n = static_cast<int>(smaller(kStep, length - k));
    __m512i r[16];
    if (columns >= W && n == kStep) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) r[j] = P::words(base + j * ld + k, kStep);
    } else {
      for (int j = 0; j < 16; ++j) r[j] = j < columns ? P::words(base + j * ld + k, n) : _mm512_setzero_si512();
    }
    transpose(r);
    float* to = out + k / P::kPerWord * kPanelColumns;
    const int filled = (n + P::kPerWord - 1) / P::kPerWord;
    if (filled == W) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kPanelColumns, r[i]);
    } else {
      for (int i = 0; i < filled; ++i) _mm512_storeu_si512(to + i * kPanelColumns, r[i]);
    }
  }
}

template <class P, class E>
void pack_columns(const Panel<E>& panel, int64_t k0, int64_t length, float* out) {
  for (int half = 0; half < 2; ++half, out += W) {
    const int columns = panel.columns - half * W;
    const Weight<E> weight = panel.weight.from(half * W, k0);
    if (weight.stored()) {
      pack_half<P>(weight.at(0, 0), weight.ld, columns, length, out);
      continue;
    }
    alignas(64) typename E::T strip[kStrip];
    constexpr int64_t kColumns = kStrip / W;
    for (int64_t k = 0; k < length; k += kColumns) {
      const int64_t n = smaller(kColumns, length - k);
      for (int j = 0; j < W && j < columns; ++j) weight.decode(j, k, n, strip + j * kColumns);
      pack_half<P>(strip, kColumns, columns, n, out + k / P::kPerWord * kPanelColumns);
    }
  }
}

// Panels that are plain neighbours are packed together, row by row: a row's stretch of memory is read once, whole.
template <class P, class E>
void pack_any(const Panel<E>* panels, int count, int64_t k0, int64_t length, float* out) {
  const int64_t size = (length + P::kPerWord - 1) / P::kPerWord * kPanelColumns;
  if (panels[0].transposed) {
    for (int p = 0; p < count; ++p) pack_columns<P>(panels[p], k0, length, out + p * size);
    return;
  }
  constexpr int64_t kAhead = 32;
  const Weight<E> weight = panels[0].weight.from(k0, 0);
  const int64_t columns = (count - 1) * kPanelColumns + panels[count - 1].columns;
  alignas(64) typename E::T strip[2][kWideColumns];
  for (int64_t k = 0; k < length; k += P::kPerWord, out += kPanelColumns) {
    const typename E::T *row = strip[0], *next = strip[1];
    for (int i = 0; i < P::kPerWord; ++i) {
      // Rows lie a page apart, where no hardware prefetcher follows. A prefetch never faults.
      weight.prefetch(k + kAhead + i, 0, columns);
      if (!weight.stored() && k + i < length) weight.decode(k + i, 0, columns, strip[i]);
    }
    if (weight.stored()) row = weight.at(k, 0), next = row + weight.ld;
    for (int p = 0; p < count; ++p)
      P::plain_row(row + p * kPanelColumns, k + 1 < length ? next + p * kPanelColumns : nullptr, panels[p].columns,
                   out + p * size);
  }
}

template <class E>
void Packing<E>::pack(const Panel<E>* panels, int count, int64_t k0, int64_t length, float* out) {
  pack_any<Packing<E>>(panels, count, k0, length, out);
}

inline void Packing<BFloat16>::pack(const Panel<BFloat16>* panels, int count, int64_t k0, int64_t length, float* out) {
  pack_any<Packing<BFloat16>>(panels, count, k0, length, out);
}

}  // namespace
