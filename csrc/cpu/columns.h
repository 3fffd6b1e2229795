// Products with columns of the weight, for the vector ISAs: C [rows, columns] = A B, row k of B a stretch of row k of
// the weight.
//
// A tile of the weight, 32 columns (16) and kTileWords words deep, meets groups of A's rows one after another. The
// first group reads the weight as stored, puts neighbouring rows together into words in registers and leaves these in
// the first-level cache, where the other groups find them: there is no pass that only packs. Include products.h first.
#pragma once

#include "cpu/kernels.h"

namespace {

using flex::kBlockRows;
using flex::kTileWords;

// Rows of A at a time: two vectors of sums each, and the tile's two words, fit in the registers.
constexpr int kRowsAtOnce = W == 16 ? 12 : 6;

// Where a group of rows finds the words of a tile: in the weight, in the weight and leaves them, where they were left.
enum class Tile { kOnce, kFirst, kAgain };

// c [M, kPanelColumns] (+)= a [M, words] tile, in the order of Words::plain_words. `length`: rows of the weight at
// `from`, `ld` apart; `columns` of them.
template <class E, int M, Tile kTile>
void tile_product(const typename E::T* from, int64_t ld, int columns, int64_t length, float* tile, const float* a,
                  float* c, int64_t ldc, bool accumulate, Ahead& shared) {
  using P = Words<E>;
  Ahead ahead = shared;
  V sums[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    sums[i][0] = accumulate ? Float32::load(c + i * ldc) : set1(0.0f);
    sums[i][1] = accumulate ? Float32::load(c + i * ldc + W) : set1(0.0f);
  }
  for (int64_t k = 0; k < length; k += P::kPerWord, ++a, from += P::kPerWord * ld, tile += kPanelColumns) {
    ahead.some();
    V low, high;
    if (kTile == Tile::kAgain) {
      low = Float32::load(tile);
      high = Float32::load(tile + W);
    } else {
      P::plain_words(from, k + 1 < length ? from + ld : nullptr, columns, low, high);
    }
    if (kTile == Tile::kFirst) {
      Float32::store(tile, low);
      Float32::store(tile + W, high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const V word = set1(a[i * kTileWords]);
      sums[i][0] = P::multiply_add(word, low, sums[i][0]);
      sums[i][1] = P::multiply_add(word, high, sums[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    Float32::store(c + i * ldc, sums[i][0]);
    Float32::store(c + i * ldc + W, sums[i][1]);
  }
  shared = ahead;
}

template <class E, Tile kTile>
struct TileProduct {
  using Function = void (*)(const typename E::T*, int64_t, int, int64_t, float*, const float*, float*, int64_t, bool,
                            Ahead&);
  template <int M>
  static constexpr Function with = tile_product<E, M, kTile>;
  static Function of(int rows) {
    static const Function table[] = {
        with<1>, with<2>, with<3>, with<4>, with<5>, with<6>,
#if defined(__AVX512F__)
        with<7>, with<8>, with<9>, with<10>, with<11>, with<12>,
#endif
    };
    return table[rows - 1];
  }
};

// The words of a tile of codes.
template <class E>
void decode_tile(const Weight<E>& weight, int64_t k, int64_t length, int64_t column, int columns, float* tile) {
  using P = Words<E>;
  alignas(64) typename E::T row[2][kPanelColumns];
  for (int64_t i = 0; i < length; i += P::kPerWord, tile += kPanelColumns) {
    V low, high;
    for (int64_t j = 0; j < P::kPerWord && i + j < length; ++j) weight.decode(k + i + j, column, columns, row[j]);
    P::plain_words(row[0], i + 1 < length ? row[1] : nullptr, columns, low, high);
    Float32::store(tile, low);
    Float32::store(tile + W, high);
  }
}

// The first `columns` columns of a weight with k rows.
template <class E>
struct WeightColumns {
  using P = Words<E>;
  static constexpr int64_t kBlock = kTileWords * P::kPerWord;
  Weight<E> weight;
  int64_t columns, k;

  // What a tile reads.
  Area area(int64_t k0, int64_t column) const {
    return weight.area(k0, smaller(kBlock, k - k0), column, smaller(kPanelColumns, columns - column));
  }
};

// C [rows, columns rounded up to kPanelColumns] = A B for at most kBlockRows rows. `pack(k0, length)` leaves the words
// of A's elements [k0, k0 + length) in work.a, kTileWords from row to row. `coming`: what the next product reads first.
template <class E, class Pack>
void packed_column_product(Pack pack, int64_t rows, const WeightColumns<E>& b, float* c, int64_t ldc,
                           const Workspace& work, const Area& coming) {
  using P = Words<E>;
  constexpr int64_t kBlock = WeightColumns<E>::kBlock;
  const Weight<E>& weight = b.weight;
  const bool stored = weight.stored();
  alignas(64) float tile[kTileWords * kPanelColumns];
  for (int64_t k0 = 0; k0 < b.k; k0 += kBlock) {
    const int64_t length = smaller(kBlock, b.k - k0), slots = pieces(rows, kRowsAtOnce) * pieces(length, P::kPerWord);
    pack(k0, length);
    for (int64_t j = 0; j < b.columns; j += kPanelColumns) {
      const int columns = static_cast<int>(smaller(kPanelColumns, b.columns - j));
      Ahead ahead(j + kPanelColumns < b.columns ? b.area(k0, j + kPanelColumns)
                  : k0 + kBlock < b.k           ? b.area(k0 + kBlock, 0)
                                                : coming,
                  slots);
      if (!stored) decode_tile<E>(weight, k0, length, j, columns, tile);
      const typename E::T* from = stored ? weight.at(k0, j) : nullptr;
      evenly(rows, kRowsAtOnce, [&](int64_t r, int64_t some) {
        const auto run = !stored || r         ? TileProduct<E, Tile::kAgain>::of
                         : rows > kRowsAtOnce ? TileProduct<E, Tile::kFirst>::of
                                            : TileProduct<E, Tile::kOnce>::of;
        run(static_cast<int>(some))(from, stored ? weight.ld : 0, columns, length, tile, work.a + r * kTileWords,
                                    c + r * ldc + j, ldc, k0 > 0, ahead);
      });
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < b.columns; j += kPanelColumns) P::settle(c + r * ldc + j);
}

// The same where row r of A is `base + (index ? index[r] : r) * lda`.
template <class E>
void column_product(const typename E::T* base, int64_t lda, const int32_t* index, int64_t rows,
                    const WeightColumns<E>& b, float* c, int64_t ldc, const Workspace& work, const Area& coming) {
  const auto pack = [&](int64_t k0, int64_t length) {
    for (int64_t r = 0; r < rows; ++r)
      Words<E>::pack_row(base + (index ? index[r] : r) * lda + k0, length, work.a + r * kTileWords);
  };
  packed_column_product<E>(pack, rows, b, c, ldc, work, coming);
}

}  // namespace
