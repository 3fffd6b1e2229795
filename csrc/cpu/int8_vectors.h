// Rows of int8 against a tile of codes by VPDPBUSD. Included by int8_products.h.
#pragma once

#include "cpu/int8_rows.h"

namespace {

constexpr int kInt8RowsAtOnce = 12;  // 24 vectors of sums

// c [M, kPanelColumns] (+)= scale * a [words][W], of whose rows there are M, times two vectors of a tile whose words
// are `step` apart: one group. start and scale hold a value a row, kStarts and `groups` apart.
template <int M>
void int8_tile_product(const float* tile, int64_t step, int64_t words, const float* a, const int32_t* start,
                       const float* scale, int64_t groups, float* c, int64_t ldc, bool accumulate, Ahead& shared) {
  Ahead ahead = shared;
  V sums[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    sums[i][0] = _mm512_castsi512_ps(_mm512_set1_epi32(start[i * kStarts]));
    sums[i][1] = sums[i][0];
  }
  for (; words > 0; --words, tile += step, a += W) {
    ahead.some();
    const V low = Float32::load(tile), high = Float32::load(tile + W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const V word = set1(a[i]);
      add_products(sums[i][0], low, word);
      add_products(sums[i][1], high, word);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    const V factor = set1(scale[i * groups]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* to = c + i * ldc + v * W;
      const V part = _mm512_cvtepi32_ps(_mm512_castps_si512(sums[i][v]));
      Float32::store(to, accumulate ? fma(part, factor, Float32::load(to)) : mul(part, factor));
    }
  }
  shared = ahead;
}

template <int... M>
struct Int8TileProducts {
  using Function = void (*)(const float*, int64_t, int64_t, const float*, const int32_t*, const float*, int64_t, float*,
                            int64_t, bool, Ahead&);
  static constexpr Function of[] = {int8_tile_product<M>...};
};

inline auto int8_tile_product_of(int64_t rows) {
  return Int8TileProducts<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>::of[rows - 1];
}

// out [count][W]: `count` words from element `block` on of the operand's rows [first, first + rows), of which there are
// at most W.
inline void pack_operand(const Int8Operand& a, int64_t first, int64_t rows, int64_t block, int64_t count, float* out) {
  const int8_t* from = a.codes + first * a.ld() + block;
  for (int64_t w = 0; w < count; w += W, out += W * W) {
    __m512i square[W];
    for (int64_t r = 0; r < W; ++r)
      square[r] = r < rows ? _mm512_loadu_si512(from + r * a.ld() + 4 * w) : _mm512_setzero_si512();
    transpose(square);
    for (int64_t r = 0; r < W; ++r) _mm512_storeu_si512(out + r * W, square[r]);
  }
}

// At most kBlockRows rows of an operand, packed in `words` in even groups, word by word.
class Int8Rows {
 public:
  Int8Rows(const Int8Operand& a, int64_t first, int64_t rows, float* words)
      : a_(a), first_(first), rows_(rows), words_(words) {}

  // The codes [block, block + codes), whole units of them.
  void pack(int64_t block, int64_t codes) {
    block_ = block;
    count_ = codes / 4;
    find_starts(a_, first_, rows_, block, codes, start_);
    evenly(rows_, kInt8RowsAtOnce, [&](int64_t r, int64_t some) {
      pack_operand(a_, first_ + r, some, block, count_, words_ + group_of(r) * count_ * W);
    });
  }

  // Calls of Ahead::some() by multiply().
  int64_t slots(int64_t length, int vectors) const {
    return pieces(rows_, kInt8RowsAtOnce) * pieces(length, 4) * vectors / 2;
  }

  // c [rows, vectors * W] (+)= the codes [k, k + length) of the block times a tile.
  void multiply(const float* tile, int vectors, int64_t k, int64_t length, float* c, int64_t ldc, Ahead& ahead) const {
    for (int v = 0; v < vectors; v += 2)
      evenly(rows_, kInt8RowsAtOnce, [&](int64_t r, int64_t some) {
        const auto run = int8_tile_product_of(some);
        const float* packed = words_ + (group_of(r) * count_ + k / 4) * W;
        for (int64_t g = 0; g < length; g += kInt8Group)
          run(tile + (g / 4 * vectors + v) * W, vectors * W, pieces(smaller(kInt8Group, length - g), 4),
              packed + g / 4 * W, start_[r] + (k + g) / kInt8Group,
              a_.scales + (first_ + r) * a_.groups() + (block_ + k + g) / kInt8Group, a_.groups(),
              c + r * ldc + v * W, ldc, block_ + k + g > 0, ahead);
      });
  }

 private:
  // Which of the even groups of rows begins with row r.
  int64_t group_of(int64_t r) const { return pieces(r * pieces(rows_, kInt8RowsAtOnce), rows_); }

  const Int8Operand& a_;
  int64_t first_, rows_, block_ = 0, count_ = 0;
  float* words_;
  int32_t start_[kBlockRows][kStarts];
};

}  // namespace
