// Codes of a weight for products of int8 with int8, AVX-512 with VBMI. Include products.h first.
//
// Codes are taken as unsigned, 128 too large. A weight in NF4 is multiplied as an int8 weight near to it: a row's
// largest scale over 127 is its scale there, and a group's 16 levels become whole numbers of it. A factor says how:
// 16 times the group's scale, in scales of the row. Tables of levels are made four at a time, and a code is looked up
// in one of the four by VPERMB.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tasks.h"

namespace {

constexpr int64_t kQuad = 4;  // rows of a weight whose codes make a word
constexpr int64_t kGroupCodes = flex::kGroupColumns;
constexpr float kFactorUnit = 16.0f;

// 64 codes of int8, of which n are there, as unsigned.
inline __m512i unsigned_codes(const char* p, int64_t n) {
  const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80));
  if (n >= 64) return _mm512_xor_si512(_mm512_loadu_si512(p), top);
  const auto mask = n > 0 ? static_cast<__mmask64>((uint64_t{1} << n) - 1) : __mmask64{0};
  return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, p), top);
}

// Words of 64 columns of four rows of codes: lane L of w[q], of 128 bits, holds those of columns 16 L + 4 q to
// 16 L + 4 q + 3.
inline void words_of_rows(const __m512i* r, V* w) {
  const __m512i low = _mm512_unpacklo_epi8(r[0], r[1]), high = _mm512_unpackhi_epi8(r[0], r[1]);
  const __m512i next_low = _mm512_unpacklo_epi8(r[2], r[3]), next_high = _mm512_unpackhi_epi8(r[2], r[3]);
  w[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, next_low));
  w[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, next_low));
  w[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high, next_high));
  w[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high, next_high));
}

// A row's inverse: 127 over its largest scale, signs apart; scales too small for one are taken for zero.
inline float inverse_of(const uint16_t* scales, int64_t count) {
  constexpr float kSmallest = 1e-30f;
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 32) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << smaller(32, count - i)) - 1);
    const __m512i sizes = _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, scales + i), _mm512_set1_epi16(0x7fff));
    most = _mm512_max_epu16(most, sizes);
  }
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // There is an instruction for the smallest of eight.
  const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
  const float largest = widen(static_cast<uint16_t>(~_mm_extract_epi16(smallest, 0)));
  return 127.0f / (largest < kSmallest ? kSmallest : largest);
}

// Inverses of rows [from, to) of a weight in NF4 with so many columns.
template <class E>
void find_inverses(const Weight<E>& weight, int64_t from, int64_t to, int64_t columns, float* inverses) {
  for (int64_t r = from; r < to; ++r)
    inverses[r] = inverse_of(weight.scales + (weight.row + r) * weight.scales_ld, pieces(columns, kGroupCodes));
}

// What is multiplied with a weight's rows: their scales as int8.
template <class E>
struct RowScales {
  Weight<E> weight;

  // `lanes` values times the scales from row r on; the others are zeros.
  V operator()(V values, int64_t r, int lanes) const {
    if (weight.inverses) return _mm512_maskz_div_ps(first(lanes), values, get<Float32>(weight.inverses + r, lanes));
    return mul(values, get<BFloat16>(weight.scales + weight.row + r, lanes));
  }
};

// A quad's factors: those of its four rows in a group stand side by side.
constexpr int64_t kFactorGroups = 32;
struct QuadFactors {
  alignas(64) int16_t of[kFactorGroups * kQuad];

  // Where those of a group stand: as the unpacking instructions leave them. The next group's follow an even group's.
  const int16_t* at(int64_t group) const { return of + group % 8 / 2 * 32 + group / 8 * 8 + group % 2 * kQuad; }

  // Of `groups` groups, at most kFactorGroups, from that of column `column` on; the quad is rows [row, row + rows) of
  // the weight, at most four, and the factors of others are anything.
  template <class E>
  void find(const Weight<E>& weight, int64_t row, int64_t rows, int64_t column, int64_t groups) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << groups) - 1);
    const int64_t first = (weight.column + column) / kGroupCodes;
    __m512i r[kQuad];
#pragma GCC unroll 4
    for (int64_t i = 0; i < kQuad; ++i) {
      const int64_t at = i < rows ? row + i : row;
      const uint16_t* scales = weight.scales + (weight.row + at) * weight.scales_ld + first;
      __builtin_prefetch(scales + kFactorsAhead * weight.scales_ld, 0, 2);
      const __m512i pairs = _mm512_maskz_loadu_epi16(mask, scales);
      const V factor = set1(weight.inverses[at] * kFactorUnit);
      const __m512i even = _mm512_cvtps_epi32(mul(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), factor));
      const __m512i high_halves = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
      const __m512i odd = _mm512_cvtps_epi32(mul(_mm512_castsi512_ps(high_halves), factor));
      r[i] = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
    }
    const __m512i low = _mm512_unpacklo_epi16(r[0], r[1]), high = _mm512_unpackhi_epi16(r[0], r[1]);
    const __m512i next_low = _mm512_unpacklo_epi16(r[2], r[3]), next_high = _mm512_unpackhi_epi16(r[2], r[3]);
    _mm512_store_si512(of, _mm512_unpacklo_epi32(low, next_low));
    _mm512_store_si512(of + 32, _mm512_unpackhi_epi32(low, next_low));
    _mm512_store_si512(of + 64, _mm512_unpacklo_epi32(high, next_high));
    _mm512_store_si512(of + 96, _mm512_unpackhi_epi32(high, next_high));
  }

 private:
  static constexpr int64_t kFactorsAhead = 128;  // rows whose scales will be wanted
};

// Four tables of unsigned codes, one in a lane of 128 bits, of factors that fill the lane.
inline __m512i tables_of(__m512i factors) {
  struct Levels {
    alignas(16) int16_t of[16];
    constexpr Levels() : of() {
      // Every level is a whole number of 2048ths.
      for (int i = 0; i < 16; ++i) of[i] = static_cast<int16_t>(flex::kNf4Levels[i] * 2048.0f);
    }
  };
  static constexpr Levels levels;
  const auto half = [&](int i) {
    const __m512i words = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(levels.of + 8 * i)));
    return _mm512_mulhrs_epi16(words, factors);  // 2^-15 of the products, rounded
  };
  return _mm512_xor_si512(_mm512_packs_epi16(half(0), half(1)), _mm512_set1_epi8(static_cast<char>(0x80)));
}

// Which word of 16 bytes fills each lane, for VPSHUFB.
struct WordsOfLanes {
  alignas(64) uint8_t of[64];
  constexpr WordsOfLanes(int w0, int w1, int w2, int w3) : of() {
    const int words[4] = {w0, w1, w2, w3};
    for (int i = 0; i < 64; ++i) of[i] = static_cast<uint8_t>(2 * words[i / 16] + i % 2);
  }
};

// The tables of a quad's four rows in one group.
inline __m512i tables_of_quad(const int16_t* factors) {
  static constexpr WordsOfLanes words{0, 1, 2, 3};
  int64_t four;
  __builtin_memcpy(&four, factors, sizeof four);
  return tables_of(_mm512_shuffle_epi8(_mm512_set1_epi64(four), _mm512_load_si512(words.of)));
}

// Tables of a quad in two groups: of its first two rows, each in either group, and of the other two.
struct PairTables {
  __m512i half[2];
};
inline PairTables tables_of_two_groups(const int16_t* factors) {
  static constexpr WordsOfLanes words[2] = {{0, 4, 1, 5}, {2, 6, 3, 7}};
  const __m512i eight = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(factors)));
  return {tables_of(_mm512_shuffle_epi8(eight, _mm512_load_si512(words[0].of))),
          tables_of(_mm512_shuffle_epi8(eight, _mm512_load_si512(words[1].of)))};
}

// Bytes, of whose codes the low four bits count, in the tables that `which` names in bits four and five.
__attribute__((always_inline)) inline __m512i look_up(__m512i bytes, __m512i which, __m512i tables) {
  constexpr int kBothOrThird = 0xea;
  return _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(0x0f), which, kBothOrThird), tables);
}

// Which of PairTables' tables a row of its half looks up: one in its first group, and one in its second.
__attribute__((always_inline)) inline __m512i tables_of_row(int row) {
  const __m256i one = _mm256_set1_epi8(static_cast<char>(32 * row));
  return _mm512_inserti64x4(_mm512_castsi256_si512(one), _mm256_or_si256(one, _mm256_set1_epi8(16)), 1);
}

// 128 codes of a row of NF4 as unsigned, of which n are there: the even ones, then the odd ones.
struct EvenAndOdd {
  __m512i even, odd;
};
__attribute__((always_inline)) inline EvenAndOdd two_groups_of_row(const char* p, int64_t n, __m512i which,
                                                                   const __m512i& tables) {
  __m512i bytes;
  if (n >= 128)
    bytes = _mm512_loadu_si512(p);
  else
    bytes = _mm512_maskz_loadu_epi8(static_cast<__mmask64>((uint64_t{1} << ((n + 1) / 2)) - 1), p);
  return {look_up(bytes, which, tables), look_up(_mm512_srli_epi16(bytes, 4), which, tables)};
}

// The same order for 128 codes of the other operand.
inline void even_and_odd(const int8_t* from, int64_t n, int8_t* to) {
  alignas(64) static constexpr struct Order {
    uint8_t of[64];
    constexpr Order() : of() {
      for (int i = 0; i < 64; ++i) of[i] = static_cast<uint8_t>(2 * i);
    }
  } order;
  const __m512i even = _mm512_load_si512(order.of), odd = _mm512_or_si512(even, _mm512_set1_epi8(1));
  const __m512i a = _mm512_loadu_si512(from);
  const __m512i b = n > 64 ? _mm512_loadu_si512(from + 64) : _mm512_setzero_si512();
  _mm512_storeu_si512(to, _mm512_permutex2var_epi8(a, even, b));
  _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi8(a, odd, b));
}

// 64 codes of row `row` of a quad of NF4 as unsigned, in order, of which n are there.
__attribute__((always_inline)) inline __m512i group_of_row(const char* p, int64_t n, int row, __m512i tables) {
  const __m512i pairs = _mm512_cvtepu8_epi16(thirty_two_bytes(p, (n + 1) / 2));
  const __m512i bytes = _mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4));
  return look_up(bytes, _mm512_set1_epi8(static_cast<char>(16 * row)), tables);
}

// Words of 64 columns of a quad of NF4, of which `columns` are there: columns 0, 2, ... 30; 1, 3, ... 31; and so on.
// `row_at(i)`: the first byte of row i.
template <class RowAt>
__attribute__((always_inline)) inline void words_of_quad(RowAt row_at, int64_t columns, __m512i tables, V* w) {
  // Byte i of each of four rows of 32 bytes, for 16 of these.
  alignas(64) static constexpr struct Order {
    uint8_t of[2][64];
    constexpr Order() : of() {
      for (int i = 0; i < 128; ++i) of[i / 64][i % 64] = static_cast<uint8_t>(i % 4 * 32 + i / 4);
    }
  } order;
  const auto two = [&](int i) __attribute__((always_inline)) {
    const int64_t bytes = (columns + 1) / 2;
    return _mm512_inserti64x4(_mm512_castsi256_si512(thirty_two_bytes(row_at(i), bytes)),
                              thirty_two_bytes(row_at(i + 1), bytes), 1);
  };
  const __m512i low = two(0), high = two(2), which = _mm512_set1_epi32(0x30201000);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i bytes = _mm512_permutex2var_epi8(low, _mm512_load_si512(order.of[i]), high);
    w[2 * i] = _mm512_castsi512_ps(look_up(bytes, which, tables));
    w[2 * i + 1] = _mm512_castsi512_ps(look_up(_mm512_srli_epi16(bytes, 4), which, tables));
  }
}

// What words_of_rows (words_of_quad) left, or sums of it, in the order of the columns.
template <bool kNf4>
inline void in_order(V* w) {
  if (kNf4) {
    const __m512i front = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    const V even[2] = {w[0], w[2]}, odd[2] = {w[1], w[3]};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      w[2 * i] = _mm512_permutex2var_ps(even[i], front, odd[i]);
      w[2 * i + 1] = _mm512_permutex2var_ps(even[i], back, odd[i]);
    }
    return;
  }
  const V front[2] = {_mm512_shuffle_f32x4(w[0], w[1], 0x44), _mm512_shuffle_f32x4(w[2], w[3], 0x44)};
  const V back[2] = {_mm512_shuffle_f32x4(w[0], w[1], 0xee), _mm512_shuffle_f32x4(w[2], w[3], 0xee)};
  w[0] = _mm512_shuffle_f32x4(front[0], front[1], 0x88);
  w[1] = _mm512_shuffle_f32x4(front[0], front[1], 0xdd);
  w[2] = _mm512_shuffle_f32x4(back[0], back[1], 0x88);
  w[3] = _mm512_shuffle_f32x4(back[0], back[1], 0xdd);
}

}  // namespace
