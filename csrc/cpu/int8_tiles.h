// Rows of int8 against a tile of codes on AMX: the integers of int8_vectors.h, and so the same bits. Included by
// int8_products.h.
//
// Rows are A's tiles as they are, codes of the weight, put together four to a word, B's. A group of a row's elements is
// two steps of 64; then its sums leave the tile registers, to be multiplied by the group's scale.
#pragma once

#include "cpu/int8_rows.h"
#include "cpu/tiles.h"

namespace {

constexpr int64_t kRowPair = 2 * tiles::kRows;
constexpr int64_t kCodesAStep = tiles::kBytesARow;
static_assert(kInt8Group % kCodesAStep == 0 && flex::kInt8Unit == kCodesAStep, "groups are whole steps");

// At most kBlockRows rows of an operand, packed in `words`: [tiles of rows][steps][16 rows][64 codes]. Rows of the last
// tile that do not exist are never looked at. While it lives, tiles are configured on this thread.
class Int8Rows {
 public:
  Int8Rows(const Int8Operand& a, int64_t first, int64_t rows, float* words)
      : a_(a), first_(first), rows_(rows), packed_(reinterpret_cast<char*>(words)) {}

  // The codes [block, block + codes), whole units of them.
  void pack(int64_t block, int64_t codes) {
    block_ = block;
    tile_bytes_ = codes * tiles::kRows;
    find_starts(a_, first_, rows_, block, codes, start_);
    for (int64_t r = 0; r < rows_; ++r) {
      const int8_t* from = a_.codes + (first_ + r) * a_.ld() + block;
      char* to = packed_ + r / tiles::kRows * tile_bytes_ + r % tiles::kRows * kCodesAStep;
      for (int64_t k = 0; k < codes; k += kCodesAStep, to += kStepBytes)
        _mm512_storeu_si512(to, _mm512_loadu_si512(from + k));
    }
  }

  // Calls of Ahead::some() by multiply().
  int64_t slots(int64_t length, int vectors) const {
    return pieces(rows_, kRowPair) * pieces(length, kCodesAStep) * vectors / 2;
  }

  // c [rows, vectors * W] (+)= the codes [k, k + length) of the block times a tile.
  void multiply(const float* tile, int vectors, int64_t k, int64_t length, float* c, int64_t ldc,
                Ahead& shared) const {
    Ahead ahead = shared;
    const int64_t stride = vectors * tiles::kBytesARow, step = kCodesAStep / 4 * vectors * W;
    for (int v = 0; v < vectors; v += 2)
      for (int64_t r = 0; r < rows_; r += kRowPair) {
        const bool pair = rows_ - r > tiles::kRows;
        for (int64_t g = 0; g < length; g += kInt8Group) {
          const float* b = tile + (g / 4 * vectors + v) * W;
          const char* a = packed_ + r / tiles::kRows * tile_bytes_ + (k + g) * tiles::kRows;
          tiles::zero<0>(), tiles::zero<1>();
          if (pair) tiles::zero<2>(), tiles::zero<3>();
          for (int64_t left = smaller(kInt8Group, length - g); left > 0; left -= kCodesAStep) {
            ahead.some();
            tiles::load<4>(a, kCodesAStep);
            tiles::load<6>(b, stride);
            tiles::load<7>(b + W, stride);
            tiles::multiply_add_codes<0, 4, 6>();
            tiles::multiply_add_codes<1, 4, 7>();
            if (pair) {
              tiles::load<5>(a + tile_bytes_, kCodesAStep);
              tiles::multiply_add_codes<2, 5, 6>();
              tiles::multiply_add_codes<3, 5, 7>();
            }
            a += kStepBytes;
            b += step;
          }
          alignas(64) int32_t sums[2][2][tiles::kRows][W];
          tiles::store<0>(sums[0][0], tiles::kBytesARow);
          tiles::store<1>(sums[0][1], tiles::kBytesARow);
          if (pair) {
            tiles::store<2>(sums[1][0], tiles::kBytesARow);
            tiles::store<3>(sums[1][1], tiles::kBytesARow);
          }
          add_group(sums[0], r, (k + g) / kInt8Group, c + v * W, ldc);
          if (pair) add_group(sums[1], r + tiles::kRows, (k + g) / kInt8Group, c + v * W, ldc);
        }
      }
    shared = ahead;
  }

 private:
  static constexpr int64_t kStepBytes = tiles::kRows * kCodesAStep;

  // c (+)= scale * sums, of a tile of rows from `first` on and two of columns; `group` of the block.
  void add_group(const int32_t (&sums)[2][tiles::kRows][W], int64_t first, int64_t group, float* c, int64_t ldc) const {
    const int64_t all = block_ / kInt8Group + group, end = smaller(first + tiles::kRows, rows_);
    for (int64_t r = first; r < end; ++r) {
      const V factor = set1(a_.scales[(first_ + r) * a_.groups() + all]);
      const __m512i start = _mm512_set1_epi32(start_[r][group]);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const V part = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(sums[v][r - first]), start));
        float* to = c + r * ldc + v * W;
        Float32::store(to, all > 0 ? fma(part, factor, Float32::load(to)) : mul(part, factor));
      }
    }
  }

  const tiles::Session session_;
  const Int8Operand& a_;
  int64_t first_, rows_, block_ = 0, tile_bytes_ = 0;
  char* packed_;
  int32_t start_[kBlockRows][kStarts];
};

}  // namespace
