// Products of int8 with int8, AVX-512 and AMX: quantised experts where the caller allows their other operand to be
// rounded to int8 as well. Include products.h and thin.h first.
//
// A tile of codes, put together four to a word, stays in the first-level cache and meets groups of rows one after
// another. Sums of a group of elements are exact integers; groups are added up in float32. What multiplies is an
// Int8Rows, of one header or another: VPDPBUSD or, where FLEX_INT8_TILES is defined, AMX; bits do not depend on it.
#pragma once

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/int8_rows.h"
#include "cpu/int8_few.h"

namespace {

constexpr int64_t kTileCodes = 256;    // of the reduced dimension that a tile in the first-level cache holds
constexpr int64_t kBlockCodes = 2048;  // of the reduced dimension that packed rows hold
constexpr int64_t kStarts = kBlockCodes / kInt8Group;

// Words of a tile: word w of column j at w * columns + j, its four codes from low to high.
using Int8Tile = float[kTileCodes / 4 * kPanelCodes];

// start[r][g]: what the sums of group g of row r of `rows` from `first` on begin with, of the codes from element
// `block` on.
inline void find_starts(const Int8Operand& a, int64_t first, int64_t rows, int64_t block, int64_t codes,
                        int32_t (*start)[kStarts]) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g * kInt8Group < codes; ++g)
      start[r][g] = -128 * sum_of_codes(a, first + r, block / kInt8Group + g);
}

}  // namespace

#if defined(FLEX_INT8_TILES)
#include "cpu/int8_tiles.h"
#else
#include "cpu/int8_vectors.h"
#endif

namespace {

// Factors of a product with NF4. Of a panel of rows: those of a block's groups, a quad of rows at a time. Of columns:
// those of all columns' groups, a quad of a block's rows at a time and without gaps, as there are many.
struct Factors {
  static constexpr int64_t kColumnGroups = flex::kThinColumns / kGroupCodes;
  static_assert(kBlockCodes <= kFactorGroups * kGroupCodes && kColumnGroups <= kFactorGroups, "room");
  static_assert(flex::kSliceColumns <= flex::kThinColumns, "room for the columns of every product");
  union {
    QuadFactors of_rows[kPanelCodes / kQuad];
    int16_t of_columns[kBlockCodes / kQuad][kColumnGroups][kQuad];
  };

  template <class E>
  void find_of_rows(const Weight<E>& weight, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    for (int64_t i = 0; i < rows; i += kQuad)
      of_rows[i / kQuad].find(weight, row + i, smaller(kQuad, rows - i), column, pieces(columns, kGroupCodes));
  }
  template <class E>
  void find_of_columns(const Weight<E>& weight, int64_t row, int64_t rows, int64_t columns) {
    const int64_t groups = pieces(columns, kGroupCodes);
    for (int64_t i = 0; i < rows; i += kQuad) {
      QuadFactors quad;
      quad.find(weight, row + i, smaller(kQuad, rows - i), 0, groups);
      for (int64_t g = 0; g < groups; g += 2)
        std::memcpy(of_columns[i / kQuad][g], quad.at(g), 2 * sizeof of_columns[0][0]);
    }
  }
};

// A tile whose columns are `columns` rows of the weight from `row` on, elements [k0, k0 + length) of each.
// `first_group`: of the factors.
template <bool kNf4, class E>
void pack_rows_of_codes(const Weight<E>& weight, int64_t row, int64_t columns, int64_t k0, int64_t length, int vectors,
                        const Factors* factors, int64_t first_group, float* tile) {
  for (int v = 0; v < vectors; ++v)
    for (int64_t k = 0; k < length; k += 64) {
      __m512i r[16], tables = _mm512_setzero_si512();
      for (int i = 0; i < 16; ++i) {
        const int64_t column = v * 16 + i;
        if (column >= columns) {
          r[i] = _mm512_setzero_si512();
        } else if (kNf4) {
          if (i % kQuad == 0)
            tables = tables_of_quad(factors->of_rows[column / kQuad].at(first_group + k / kGroupCodes));
          r[i] = group_of_row(weight.byte(row + column, k0 + k), length - k, i % kQuad, tables);
        } else {
          r[i] = unsigned_codes(weight.byte(row + column, k0 + k), length - k);
        }
      }
      transpose(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(tile + ((k / 4 + i) * vectors + v) * 16, r[i]);
    }
}

// A tile whose columns are `columns` columns of the weight from `column` on, its rows [k0, k0 + length). `first_quad`:
// of the factors.
template <bool kNf4, class E>
void pack_columns_of_codes(const Weight<E>& weight, int64_t column, int64_t columns, int64_t k0, int64_t length,
                           int vectors, const Factors* factors, int64_t first_quad, float* tile) {
  for (int64_t k = 0; k < length; k += kQuad, tile += vectors * 16) {
    V words[4];
    if (kNf4) {
      // Rows that are not there meet zeros.
      const auto row_at = [&](int i) { return weight.byte(k0 + k + (k + i < length ? i : 0), column); };
      const auto& quad = factors->of_columns[first_quad + k / kQuad];
      words_of_quad(row_at, columns, tables_of_quad(quad[column / kGroupCodes]), words);
    } else {
      __m512i r[kQuad];
      for (int64_t i = 0; i < kQuad; ++i)
        r[i] = k + i < length ? unsigned_codes(weight.byte(k0 + k + i, column), columns) : _mm512_setzero_si512();
      words_of_rows(r, words);
    }
    in_order<kNf4>(words);
    for (int v = 0; v < vectors; ++v) Float32::store(tile + v * W, words[v]);
  }
}

// C [rows, columns rounded up to kPanelColumns] = A B for at most kBlockRows rows, those of `a` from `first_row` on.
// B's columns are rows of the weight (kReduceRows) or its columns; `coming`: what the next product reads first.
template <bool kReduceRows, bool kNf4, class E>
void int8_product_of(const Int8Operand& a, int64_t first_row, int64_t rows, const Weight<E>& weight, int64_t columns,
                     float* c, int64_t ldc, const Workspace& work, const Area& coming) {
  if (rows <= kFewInt8Rows) {
    if (kReduceRows) return few_rows_product<kNf4>(a, first_row, rows, weight, columns, c, ldc);
    return few_columns_product<kNf4>(a, first_row, rows, weight, columns, c, ldc, coming);
  }
  alignas(64) Int8Tile tile;
  alignas(64) Factors factors;
  Int8Rows packed(a, first_row, rows, work.a);
  const auto area = [&](int64_t j, int64_t k0) {
    const int64_t some = smaller(kPanelCodes, columns - j), length = smaller(kTileCodes, a.k - k0);
    return kReduceRows ? weight.area(j, some, k0, length) : weight.area(k0, length, j, some);
  };
  for (int64_t block = 0; block < a.k; block += kBlockCodes) {
    const int64_t stretch = smaller(kBlockCodes, a.k - block);
    packed.pack(block, pieces(stretch, flex::kInt8Unit) * flex::kInt8Unit);
    if (kNf4 && !kReduceRows) factors.find_of_columns(weight, block, stretch, columns);
    for (int64_t j = 0; j < columns; j += kPanelCodes) {
      const int64_t some = smaller(kPanelCodes, columns - j);
      if (kNf4 && kReduceRows) factors.find_of_rows(weight, j, some, block, stretch);
      const int vectors = some > 2 * W ? 4 : 2;
      for (int64_t k = 0; k < stretch; k += kTileCodes) {
        const int64_t k0 = block + k, length = smaller(kTileCodes, stretch - k);
        Ahead ahead(k + kTileCodes < stretch    ? area(j, k0 + kTileCodes)
                    : j + kPanelCodes < columns ? area(j + kPanelCodes, block)
                    : block + kBlockCodes < a.k ? area(0, block + kBlockCodes)
                                                : coming,
                    packed.slots(length, vectors));
        if (kReduceRows)
          pack_rows_of_codes<kNf4>(weight, j, some, k0, length, vectors, &factors, k / kGroupCodes, tile);
        else
          pack_columns_of_codes<kNf4>(weight, j, some, k0, length, vectors, &factors, k / kQuad, tile);
        packed.multiply(tile, vectors, k, length, c + j, ldc, ahead);
      }
    }
  }
}

template <bool kReduceRows, class E>
void int8_product(const Int8Operand& a, int64_t first_row, int64_t rows, const Weight<E>& weight, int64_t columns,
                  float* c, int64_t ldc, const Workspace& work, const Area& coming) {
  if (weight.kind == flex::kNf4)
    int8_product_of<kReduceRows, true>(a, first_row, rows, weight, columns, c, ldc, work, coming);
  else
    int8_product_of<kReduceRows, false>(a, first_row, rows, weight, columns, c, ldc, work, coming);
}

// C = A B, B's columns being those of a weight whose scales A was multiplied with.
template <class E>
void int8_columns_product(const Int8Operand& a, int64_t first_row, int64_t rows, const Weight<E>& weight,
                          int64_t columns, float* c, int64_t ldc, const Workspace& work, const Area& coming) {
  int8_product<false>(a, first_row, rows, weight, columns, c, ldc, work, coming);
}

// C = A W^T for rows [0, columns) of a weight, at most kThinColumns; their scales multiply the columns.
template <class E>
void int8_rows_product(const Int8Operand& a, int64_t first_row, int64_t rows, Weight<E> weight, int64_t columns,
                       float* c, int64_t ldc, const Workspace& work, const Area& coming) {
  static_assert(flex::kSliceColumns <= flex::kThinColumns && flex::kForwardColumns <= flex::kThinColumns, "room");
  float inverses[flex::kThinColumns];
  if (weight.kind == flex::kNf4) {
    find_inverses(weight, 0, columns, a.k, inverses);
    weight.inverses = inverses;
  }
  int8_product<true>(a, first_row, rows, weight, columns, c, ldc, work, coming);
  for (int64_t r = 0; r < rows; ++r)
    over(columns, [&](int64_t j, int lanes) {
      float* to = c + r * ldc + j;
      put<Float32>(to, RowScales<E>{weight}(get<Float32>(to, lanes), j, lanes), lanes);
    });
}

}  // namespace
