// Products of a block of rows with weights as stored, in tiles of bfloat16: sums of 16 x 16 float32 in tile registers.
//
// `across`, y = x W^T: weight rows are contiguous along the reduced dimension and are A's tiles as they lie in memory.
// The rows of x, few and used by every weight, are B's: their words are transposed once. Sums come out transposed.
// `along`, dx = dz W: weight rows run along the columns of the product. Two neighbours interleave into B's tile, and
// the rows of dz are A's.
// Either way no weight is transposed, and codes are decoded into the 16 KB that a strip is copied to anyway. Include
// products.h (whose words these are) and tiles.h first.
#pragma once

#include "cpu/tile_codes.h"

namespace {

using Word = uint16_t;  // one bfloat16

constexpr int64_t kTileElements = 512;  // [16 rows, 32], or [16 pairs of rows, 16, 2]
constexpr int64_t kTileSums = 256;      // [16, 16] float32
constexpr int64_t kTileStep = 32;       // of the reduced dimension
constexpr int64_t kTilePair = 32;       // rows of x, or of a strip of weights, in registers at a time: two tiles
// Of the reduced dimension at a time: a strip of weights this deep, 16 KB, stays in the first-level cache while all
// rows pass by it.
constexpr int64_t kTileDepth = 256;
constexpr int64_t kTileRows = 256;      // rows of a block, at most
constexpr int64_t kTileColumns = 512;   // columns of a block whose sums are kept for all of the reduced dimension
constexpr int64_t kHeldElements = int64_t{512} << 10;  // of packed rows: half of a second-level cache of 2 MB

inline int64_t rounded(int64_t n, int64_t unit) { return pieces(n, unit) * unit; }

// Rows of a block, so that all their k columns stay in the second-level cache.
inline int64_t tile_rows(int64_t k) {
  const int64_t fit = kHeldElements / rounded(k, kTileStep) / kTilePair * kTilePair;
  return fit < kTilePair ? kTilePair : smaller(fit, kTileRows);
}

// One thread's buffers, carved from its piece of the caller's scratch.
struct TileWorkspace {
  Word* rows;    // packed rows of x, a block of them over all of the reduced dimension
  Word* weight;  // [steps of kTileDepth][two tiles]
  float* sums;   // [strips of 32 columns][pairs of row tiles][2 x 2 tiles], for kTileColumns columns
  float* gates;  // the same for two strips of 16 columns of gate and up

  static int64_t block(int64_t rows) { return rounded(smaller(rows, kTileRows), kTilePair); }
  static int64_t row_elements(int64_t longest, int64_t rows) {
    const int64_t k = rounded(longest, kTileStep), most = block(rows);
    const int64_t held = kHeldElements < kTilePair * k ? kTilePair * k : kHeldElements;
    const int64_t all = smaller(most * k, held), depth = most * kTileDepth;
    // A tile is read whole, however few of its rows are there: up to one tile beyond the last.
    return (all < depth ? depth : all) + kTileElements;
  }
  static int64_t bytes(int64_t longest, int64_t rows) {
    return 2 * (row_elements(longest, rows) + kTilePair * kTileDepth) +
           4 * block(rows) * (kTileColumns + 2 * kTilePair);
  }

  TileWorkspace(void* scratch, int64_t bytes_a_thread, int thread, int64_t most) {
    weight = reinterpret_cast<Word*>(static_cast<char*>(scratch) + bytes_a_thread * thread);
    sums = reinterpret_cast<float*>(weight + kTilePair * kTileDepth);
    gates = sums + block(most) * kTileColumns;
    rows = reinterpret_cast<Word*>(gates + block(most) * 2 * kTilePair);
  }
};

// A tile operand of every step of the reduced dimension: where the first lies, and how far apart, in bytes.
struct TileRun {
  const char* at;
  int64_t step, stride;
};

// Rows packed for tiles: [pairs of row tiles][steps][rows of the pair][32]. A's tiles hold rows as they are; B's hold
// [16 pairs of columns][rows of the tile][2]. The last pair has fewer than 32 rows, packed as tightly; a tile then
// reads on into what follows, and sums of rows that do not exist are never looked at.
struct TileRows {
  const Word* base;
  int64_t rows, steps;
  bool in_pairs;

  int64_t pairs() const { return pieces(rows, kTilePair); }
  int64_t of_pair(int64_t pair) const { return smaller(kTilePair, rows - pair * kTilePair); }
  int tiles(int64_t pair) const { return of_pair(pair) > tiles::kRows ? 2 : 1; }
  TileRun run(int64_t pair, int tile, int64_t first_step) const {
    const int64_t some = of_pair(pair), own = tile ? some - tiles::kRows : smaller(tiles::kRows, some);
    const Word* at = base + (pair * steps * kTilePair + first_step * some + tile * tiles::kRows) * kTileStep;
    return {reinterpret_cast<const char*>(at), some * tiles::kBytesARow, in_pairs ? 4 * own : tiles::kBytesARow};
  }
};

// Weights that come next, fetched into the second-level cache a few lines a step.
struct TileRegion {
  const char* base = nullptr;
  int64_t ld = 0, rows = 0, bytes = 0;  // of a row; `ld` as well

  TileRegion() = default;
  // Rows and columns from the start of `weight`, as many bytes as its codes take.
  TileRegion(const Weight<BFloat16>& weight, int64_t rows, int64_t columns)
      : base(weight.byte(0, 0)), ld(weight.byte(1, 0) - base), rows(rows),
        bytes(columns > 0 ? weight.byte(0, columns - 1) + 1 - base : 0) {}
};

class TileAhead {
 public:
  // All of both regions over `calls` calls of fetch().
  TileAhead(const TileRegion& a, const TileRegion& b, int64_t calls) : regions_{a, b} {
    for (const TileRegion& r : regions_) left_ += lines(r);
    quota_ = pieces(left_, calls);
    enter(0);
  }
  TileAhead() = default;

  void fetch() {
    int64_t n = smaller(quota_, left_);
    for (left_ -= n; n > 0;) {
      const int64_t run = smaller(n, in_row_);
      const char* at = at_;
      for (int64_t i = 0; i < run; ++i) __builtin_prefetch(at + i * kLine, 0, 2);
      at_ = at + run * kLine;
      n -= run;
      in_row_ -= run;
      if (in_row_ == 0) next_row();
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes
  static int64_t in_row(const TileRegion& r) { return pieces(r.bytes, kLine); }
  static int64_t lines(const TileRegion& r) { return r.rows > 0 ? r.rows * in_row(r) : 0; }

  void enter(int region) {
    while (region < 2 && lines(regions_[region]) == 0) ++region;
    if (region == 2) return;
    now_ = region;
    row_ = 0;
    at_ = regions_[region].base;
    in_row_ = in_row(regions_[region]);
  }

  void next_row() {
    const TileRegion& r = regions_[now_];
    if (++row_ == r.rows) return enter(now_ + 1);
    at_ = r.base + row_ * r.ld;
    in_row_ = in_row(r);
  }

  TileRegion regions_[2];
  const char* at_ = nullptr;
  int64_t quota_ = 0, left_ = 0, in_row_ = 0, row_ = 0;
  int now_ = 0;
};

// sums[i][j] (+)= A's tile i times B's tile j, over `steps` steps. M and N of the two tiles of A and B exist.
template <int M, int N>
void multiply_tiles(int64_t steps, const TileRun* a, const TileRun* b, float* sums, bool accumulate, TileAhead& ahead) {
  constexpr int64_t kRow = tiles::kBytesARow;
  if (accumulate) {
    tiles::load<0>(sums, kRow);
    if (N == 2) tiles::load<1>(sums + kTileSums, kRow);
    if (M == 2) tiles::load<2>(sums + 2 * kTileSums, kRow);
    if (M == 2 && N == 2) tiles::load<3>(sums + 3 * kTileSums, kRow);
  } else {
    tiles::zero<0>();
    if (N == 2) tiles::zero<1>();
    if (M == 2) tiles::zero<2>();
    if (M == 2 && N == 2) tiles::zero<3>();
  }
  for (int64_t s = 0; s < steps; ++s) {
    tiles::load<4>(a[0].at + s * a[0].step, a[0].stride);
    tiles::load<6>(b[0].at + s * b[0].step, b[0].stride);
    tiles::multiply_add<0, 4, 6>();
    if (N == 2) {
      tiles::load<7>(b[1].at + s * b[1].step, b[1].stride);
      tiles::multiply_add<1, 4, 7>();
    }
    if (M == 2) {
      tiles::load<5>(a[1].at + s * a[1].step, a[1].stride);
      tiles::multiply_add<2, 5, 6>();
    }
    if (M == 2 && N == 2) tiles::multiply_add<3, 5, 7>();
    ahead.fetch();
  }
  tiles::store<0>(sums, kRow);
  if (N == 2) tiles::store<1>(sums + kTileSums, kRow);
  if (M == 2) tiles::store<2>(sums + 2 * kTileSums, kRow);
  if (M == 2 && N == 2) tiles::store<3>(sums + 3 * kTileSums, kRow);
}

inline void multiply_tiles(int m, int n, int64_t steps, const TileRun* a, const TileRun* b, float* sums,
                           bool accumulate, TileAhead& ahead) {
  const auto run = m == 2 ? (n == 2 ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                          : (n == 2 ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
  run(steps, a, b, sums, accumulate, ahead);
}

// Rows `base + (index ? index[r] : r) * ld`, columns [0, length), as A's tiles, zeros after the last column.
inline TileRows pack_rows(const Word* base, int64_t ld, const int32_t* index, int64_t rows, int64_t length, Word* out) {
  const TileRows packed{out, rows, pieces(length, kTileStep), false};
  for (int64_t r = 0; r < rows; ++r) {
    const Word* from = base + (index ? index[r] : r) * ld;
    const int64_t pair = r / kTilePair, step = packed.of_pair(pair) * kTileStep;
    Word* to = out + (pair * packed.steps * kTilePair + r % kTilePair) * kTileStep;
    for (int64_t k = 0; k < length; k += kTileStep, to += step)
      _mm512_storeu_si512(to, Words<BFloat16>::words(from + k, static_cast<int>(smaller(kTileStep, length - k))));
  }
  return packed;
}

// The same rows as B's tiles: 16 x 16 words transposed at a time.
inline TileRows pack_rows_in_pairs(const Word* base, int64_t ld, const int32_t* index, int64_t rows, int64_t length,
                                   Word* out) {
  const TileRows packed{out, rows, pieces(length, kTileStep), true};
  for (int64_t first_row = 0; first_row < rows; first_row += tiles::kRows) {
    const int64_t pair = first_row / kTilePair, own = smaller(tiles::kRows, rows - first_row);
    const int64_t step = packed.of_pair(pair) * kTileStep;
    Word* to = out + (pair * packed.steps * kTilePair + first_row % kTilePair) * kTileStep;
    const Word* from[tiles::kRows];
    for (int64_t r = 0; r < own; ++r) from[r] = base + (index ? index[first_row + r] : first_row + r) * ld;
    for (int64_t k = 0; k < length; k += kTileStep, to += step) {
      const int n = static_cast<int>(smaller(kTileStep, length - k));
      __m512i words[tiles::kRows];
      for (int64_t r = 0; r < tiles::kRows; ++r)
        words[r] = r < own ? Words<BFloat16>::words(from[r] + k, n) : _mm512_setzero_si512();
      transpose(words);
      const __mmask16 mask = first(static_cast<int>(own));
      for (int64_t p = 0; p < tiles::kRows; ++p) _mm512_mask_storeu_epi32(to + p * own * 2, mask, words[p]);
    }
  }
  return packed;
}

// Memory must not rest while a strip is packed either: a share of what comes next is fetched every few rows, as far
// apart in time as the steps of multiply_tiles.
constexpr int64_t kStoredRowsAFetch = 4;   // of 256 columns; codes: every row
constexpr int64_t kPairedRowsAFetch = 16;  // of 32 columns

// Calls of fetch() in pack_strip and in pack_strip_in_pairs.
inline int64_t strip_fetches(const Weight<BFloat16>& weight) {
  return weight.stored() ? tiles::kRows / kStoredRowsAFetch : tiles::kRows;
}
inline int64_t paired_fetches(int64_t length) { return pieces(length, kPairedRowsAFetch); }

// Up to 16 weight rows, columns [k0, k0 + length), as A's tiles kTilePair rows a step; rows that do not exist are
// zeros. `length` is at most kTileDepth.
inline void pack_strip(const Weight<BFloat16>& weight, int64_t rows, int64_t k0, int64_t length, Word* out,
                       TileAhead& ahead) {
  const int64_t decoded = weight.stored() ? 0 : smaller(rows, tiles::kRows);
  if (decoded > 0) decode_rows(weight, decoded, k0, length, out, 2 * kTileElements, [&] { ahead.fetch(); });
  for (int64_t r = decoded; r < tiles::kRows; ++r) {
    if (r % kStoredRowsAFetch == 0) ahead.fetch();
    const Word* from = weight.at(r, k0);
    Word* to = out + r * kTileStep;
    for (int64_t k = 0; k < length; k += kTileStep, to += 2 * kTileElements)
      _mm512_storeu_si512(to, r < rows ? Words<BFloat16>::words(from + k,
                                                                  static_cast<int>(smaller(kTileStep, length - k)))
                                       : _mm512_setzero_si512());
  }
}

// `length` weight rows of up to 32 columns as pairs of B's tiles, zeros after the last row. The columns of the two
// tiles are in the order of Words::plain_words, which Words::settle undoes in the sums.
inline void pack_strip_in_pairs(const Weight<BFloat16>& weight, int columns, int64_t length, Word* out,
                                TileAhead& ahead) {
  const auto put = [&](int64_t k, V low, V high) {
    if (k % kPairedRowsAFetch == 0) ahead.fetch();
    Word* to = out + k / kTileStep * 2 * kTileElements + k % kTileStep * tiles::kRows;
    _mm512_storeu_ps(to, low);
    _mm512_storeu_ps(to + kTileElements, high);
  };
  if (!weight.stored()) {
    decode_pairs(weight, columns, length, put);
  } else {
    const Word* row = weight.at(0, 0);
    const int64_t ld = weight.ld;
    for (int64_t k = 0; k < length; k += 2, row += 2 * ld) {
      V low, high;
      Words<BFloat16>::plain_words(row, k + 1 < length ? row + ld : nullptr, columns, low, high);
      put(k, low, high);
    }
  }
  for (int64_t k = rounded(length, 2); k < rounded(length, kTileStep); k += 2) put(k, set1(0.0f), set1(0.0f));
}

// Two tiles of rows of a weight.
struct TileStrip {
  Weight<BFloat16> first[2];
  int64_t rows[2];

  // Whether its tiles can be loaded from where the weight lies.
  bool loads() const { return first[0].stored() && rows[0] == tiles::kRows && rows[1] == tiles::kRows; }
  TileRegion region(int tile, int64_t k, int64_t length) const {
    return {first[tile].from(0, k), rows[tile], length};
  }
};

// sums [pairs][weight tile][row tile][16 weight rows][16 rows] (+)= strip, columns [begin, end), times the rows.
// Meanwhile the same columns of `next`, where given, come into the second-level cache.
inline void across(const TileStrip& strip, const TileStrip* next, int64_t begin, int64_t end, const TileRows& x,
                   float* sums, Word* weight) {
  const int m = strip.rows[1] > 0 ? 2 : 1;
  const auto ahead_of = [&](int64_t k, int64_t length, int64_t calls) {
    return next ? TileAhead(next->region(0, k, length), next->region(1, k, length), calls) : TileAhead();
  };
  const auto rows_of = [&](int64_t pair, int64_t step, TileRun* b) {
    b[0] = x.run(pair, 0, step);
    if (x.tiles(pair) == 2) b[1] = x.run(pair, 1, step);
  };
  int64_t k = begin;
  // One pair of row tiles uses each weight once: the tiles are loaded from where they lie.
  if (x.pairs() == 1 && strip.loads() && end - begin >= kTileStep) {
    const int64_t steps = (end - begin) / kTileStep, stride = strip.first[0].ld * 2;
    TileRun b[2];
    rows_of(0, begin / kTileStep, b);
    const TileRun a[2] = {{strip.first[0].byte(0, begin), tiles::kBytesARow, stride},
                          {strip.first[1].byte(0, begin), tiles::kBytesARow, stride}};
    TileAhead ahead = ahead_of(begin, end - begin, steps);
    multiply_tiles(2, x.tiles(0), steps, a, b, sums, begin > 0, ahead);
    k += steps * kTileStep;
  }
  for (; k < end; k += kTileDepth) {
    const int64_t length = smaller(kTileDepth, end - k), steps = pieces(length, kTileStep);
    TileAhead ahead = ahead_of(k, length, m * strip_fetches(strip.first[0]) + steps * x.pairs());
    for (int tile = 0; tile < m; ++tile)
      pack_strip(strip.first[tile], strip.rows[tile], k, length, weight + tile * kTileElements, ahead);
    const char* at = reinterpret_cast<const char*>(weight);
    const TileRun a[2] = {{at, 4 * kTileElements, tiles::kBytesARow},
                          {at + 2 * kTileElements, 4 * kTileElements, tiles::kBytesARow}};
    for (int64_t pair = 0; pair < x.pairs(); ++pair) {
      TileRun b[2];
      rows_of(pair, k / kTileStep, b);
      multiply_tiles(m, x.tiles(pair), steps, a, b, sums + pair * 4 * kTileSums, k > 0, ahead);
    }
  }
}

// sums [strips of 32 columns][pairs][row tile][column tile][16 rows][16 columns] = rows [., k] times weight
// [k, columns], the columns of a strip in the order of Words::plain_words. Packs the rows into work.rows.
//
// The reduced dimension is the outer loop, so that weight rows are read in stretches of all columns: they lie pages
// apart. A group of four strips brings in the next four, a quarter of its rows each.
inline void along(const Word* base, int64_t lda, const int32_t* index, int64_t rows, int64_t k,
                  const Weight<BFloat16>& weight, int64_t columns, float* sums, const TileWorkspace& work) {
  constexpr int64_t kGroup = 4, kGroupColumns = kGroup * kTilePair, kQuarter = kTileDepth / kGroup;
  const char* at = reinterpret_cast<const char*>(work.weight);
  const TileRun b[2] = {{at, 4 * kTileElements, tiles::kBytesARow},
                        {at + 2 * kTileElements, 4 * kTileElements, tiles::kBytesARow}};
  for (int64_t k0 = 0; k0 < k; k0 += kTileDepth) {
    const int64_t length = smaller(kTileDepth, k - k0);
    const TileRows packed = pack_rows(base + k0, lda, index, rows, length, work.rows);
    float* to = sums;
    for (int64_t j = 0; j < columns; j += kTilePair) {
      const int64_t group = j / kGroupColumns * kGroupColumns + kGroupColumns;
      const bool wrap = group >= columns;
      const int64_t row = (wrap ? k0 + kTileDepth : k0) + j % kGroupColumns / kTilePair * kQuarter;
      const int64_t column = wrap ? 0 : group, end = wrap ? k : k0 + length;
      const TileRegion next(weight.from(row, column), smaller(kQuarter, end - row),
                            smaller(kGroupColumns, columns - column));
      TileAhead ahead(next, TileRegion(), paired_fetches(length) + packed.steps * packed.pairs());
      pack_strip_in_pairs(weight.from(k0, j), static_cast<int>(smaller(kTilePair, columns - j)), length, work.weight,
                          ahead);
      for (int64_t pair = 0; pair < packed.pairs(); ++pair, to += 4 * kTileSums) {
        TileRun a[2];
        a[0] = packed.run(pair, 0, 0);
        if (packed.tiles(pair) == 2) a[1] = packed.run(pair, 1, 0);
        multiply_tiles(packed.tiles(pair), 2, packed.steps, a, b, to, k0 > 0, ahead);
      }
    }
  }
}

// out[r] = row r of the transposed tile of sums: 16 columns of one row of x.
inline void turn(const float* sums, __m512i* out) {
  for (int i = 0; i < tiles::kRows; ++i) out[i] = _mm512_loadu_si512(sums + i * tiles::kRows);
  transpose(out);
}

}  // namespace
