// Words of bfloat16 for AVX-512: it stays as it is, two to a word, for VDPBF16PS. Included by words.h.
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

// Exchanges rows and columns of W x W words.
inline void transpose_square(float (*square)[W]) {
  __m512i rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = _mm512_load_si512(square[i]);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) _mm512_store_si512(square[i], rows[i]);
}

template <>
struct Words<BFloat16> {
  static constexpr int kPerWord = 2;
  using Word = BFloat16;
  static constexpr bool kStoredWords = true;
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
  // Puts the sums of plain_words in the order of its columns.
  static void settle(float* out, V low, V high) {
    const __m512i first_half = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second_half = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i a = _mm512_castps_si512(low), b = _mm512_castps_si512(high);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, first_half, b));
    _mm512_storeu_si512(out + W, _mm512_permutex2var_epi64(a, second_half, b));
  }
  static void settle(float* out) { settle(out, Float32::load(out), Float32::load(out + W)); }
  static constexpr int column_of(int half, int lane) { return lane / 4 * 8 + half * 4 + lane % 4; }
};

}  // namespace
