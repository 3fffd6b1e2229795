// The expert feed-forward in bfloat16 on AMX tiles, forward and backward, over the products of tile_products.h. Weights
// may be codes, which are decoded to bfloat16: from there on nothing differs from plain weights.
//
// Work is cut as in fused.h: a task of the up direction owns rows and columns of one segment, a task of the down
// direction a slice of output columns over all segments in order. `up` leaves its result as B's tiles (TileRows, packed
// in pairs, I rounded up to kHiddenUnit), which `down` multiplies without packing. Tasks are taken from the last: the
// experts that see all tokens stand there, and the largest should start first.
#pragma once

#include "cpu/tasks.h"
#include "cpu/tile_products.h"

namespace {

using flex::kHiddenUnit;
using flex::kPartialColumns;
using flex::Segment;

inline int64_t most_rows(const Segment* segments, int64_t count) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i)
    if (segments[i].rows > most) most = segments[i].rows;
  return most;
}

struct TileCut {
  int64_t rows, most;

  TileCut(const Segment* segments, int64_t count, int64_t hidden, int64_t columns, int threads)
      : rows(tile_rows(hidden)) {
    int64_t units = 0;
    for (int64_t i = 0; i < count; ++i)
      units += pieces(segments[i].rows, rows) * pieces(segments[i].width, kPartialColumns);
    // Four tasks a thread, and columns enough to be worth packing the rows.
    const int64_t share = pieces(units, int64_t{4} * threads) * kPartialColumns;
    most = smaller(share < 2 * kPartialColumns ? 2 * kPartialColumns : share, columns);
  }

  int64_t rows_of(const Segment&) const { return rows; }
  // Columns of a task: as even as whole units allow.
  int64_t columns(const Segment& s) const {
    return s.width ? rounded(pieces(s.width, pieces(s.width, most)), kPartialColumns) : kPartialColumns;
  }
};

// Weight rows `column` on of gate and up, sixteen each.
inline TileStrip gate_strip(const Segment& s, int64_t column) {
  const Weight<BFloat16> gate = gate_up_of<BFloat16>(s).from(column, 0);
  const int64_t rows = smaller(tiles::kRows, s.width - column);
  return {{gate, gate.from(s.width, 0)}, {rows, rows}};
}

// sums [pairs][gate or up][row tile][16 columns][16 rows] of the columns `column` on, which end before `end`.
inline void gate_and_up_tiles(const Segment& s, int64_t column, int64_t end, const TileRows& x, int64_t hidden,
                              float* sums, Word* weight) {
  const TileStrip strip = gate_strip(s, column);
  const bool more = column + tiles::kRows < end;
  const TileStrip next = more ? gate_strip(s, column + tiles::kRows) : strip;
  across(strip, more ? &next : nullptr, 0, hidden, x, sums, weight);
}

// Columns [column, column + 16) of silu(gate) * up as B's tiles; sums beyond the last column are zeros. For an odd
// multiple of sixteen columns, also the zeros of the sixteen that fill the step.
inline void write_hidden(const float* sums, const TileRows& a, int64_t pair, int tile, int64_t column, int64_t width) {
  const TileRun run = a.run(pair, tile, column / kTileStep);
  char* to = const_cast<char*>(run.at) + column % kTileStep / 2 * run.stride;
  const __mmask16 mask = first(static_cast<int>(run.stride / 4));
  const float* gate = sums + tile * kTileSums;
  const float* up = gate + 2 * kTileSums;
  const auto value = [&](int64_t c) {
    const V g = Float32::load(gate + c * W), u = Float32::load(up + c * W);
    return _mm512_cvtepu16_epi32(BFloat16::narrow(mul(mul(g, sigmoid(g)), u)));
  };
  for (int64_t c = 0; c < tiles::kRows; c += 2, to += run.stride)
    _mm512_mask_storeu_epi32(to, mask, _mm512_or_si512(value(c), _mm512_slli_epi32(value(c + 1), 16)));
  if (column % kTileStep == 0 && column + tiles::kRows >= width)
    for (int64_t c = 0; c < tiles::kRows; c += 2, to += run.stride)
      _mm512_mask_storeu_epi32(to, mask, _mm512_setzero_si512());
}

// Rows of sixteen pre-activations, gate and up, to z [n, 2I].
inline void write_preact(const float* sums, int tile, int64_t rows, int64_t columns, Word* z, int64_t width) {
  for (int half = 0; half < 2; ++half) {
    __m512i turned[tiles::kRows];
    turn(sums + (2 * half + tile) * kTileSums, turned);
    for (int64_t r = 0; r < rows; ++r)
      put<BFloat16>(z + 2 * r * width + half * width, _mm512_castsi512_ps(turned[r]), static_cast<int>(columns));
  }
}

// Rows of a pair that its tile holds.
inline int64_t rows_of_tile(const TileRows& rows, int64_t pair, int tile) {
  return smaller(tiles::kRows, rows.of_pair(pair) - tile * tiles::kRows);
}

// a = silu(x gate^T) * (x up^T)
inline void up_tiles(const Word* x, int64_t hidden, const Segment* segments, int64_t count, void* scratch,
                     int64_t bytes, int threads) {
  const Grid<TileCut> grid(segments, count, hidden, 2 * kTileColumns, threads);
  const int64_t tasks = grid.tasks(segments, count), most = most_rows(segments, count);
#pragma omp parallel num_threads(threads)
  {
    const tiles::Session session;
    const TileWorkspace work(scratch, bytes, thread_index(), most);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const Place place = grid.place(tasks - 1 - task, segments);
      const Segment& s = *place.segment;
      const TileRows rows = pack_rows_in_pairs(x, hidden, address<const int32_t>(s.tokens) + place.first_row,
                                               place.rows, hidden, work.rows);
      const int64_t room = rounded(s.width, kHiddenUnit), end = place.column + place.columns;
      const TileRows a{address<Word>(s.hidden) + place.first_row * room, place.rows, room / kTileStep, true};
      for (int64_t column = place.column; column < end; column += tiles::kRows) {
        gate_and_up_tiles(s, column, end, rows, hidden, work.gates, work.weight);
        for (int64_t pair = 0; pair < rows.pairs(); ++pair)
          for (int tile = 0; tile < rows.tiles(pair); ++tile) {
            const float* sums = work.gates + pair * 4 * kTileSums;
            write_hidden(sums, a, pair, tile, column, s.width);
            if (!s.preact) continue;
            const int64_t row = place.first_row + pair * kTilePair + tile * tiles::kRows;
            write_preact(sums, tile, rows_of_tile(rows, pair, tile), smaller(tiles::kRows, end - column),
                         address<Word>(s.preact) + 2 * row * s.width + column, s.width);
          }
      }
    }
  }
}

// Slices of the output's columns, the same number for every thread.
struct TileSlices {
  int64_t hidden, width;
  TileSlices(int64_t hidden, int threads) : hidden(hidden) {
    const int64_t slices = pieces(pieces(hidden, kTileColumns), threads) * threads;
    width = rounded(pieces(hidden, slices), kTilePair);
  }
  int64_t count() const { return pieces(hidden, width); }
};

inline TileStrip down_strip(const Segment& s, int64_t column, int64_t end) {
  const Weight<BFloat16> weight = down_of<BFloat16>(s).from(column, 0);
  const int64_t rows = smaller(kTilePair, end - column), upper = smaller(tiles::kRows, rows);
  return {{weight, weight.from(tiles::kRows, 0)}, {upper, rows - upper}};
}

// out[tokens] += scale * (a down^T)
inline void down_tiles(const Segment* segments, int64_t count, int64_t hidden, float* out, void* scratch,
                       int64_t bytes, int threads) {
  constexpr int64_t kReach = kHeldElements / kTileRows;  // of the reduced dimension, while all rows fit in the cache
  const TileSlices slices(hidden, threads);
  const int64_t tasks = slices.count(), most = most_rows(segments, count);
#pragma omp parallel num_threads(threads)
  {
    const tiles::Session session;
    const TileWorkspace work(scratch, bytes, thread_index(), most);
#pragma omp for schedule(dynamic)
    for (int64_t slice = 0; slice < tasks; ++slice) {
      const int64_t start = slice * slices.width, end = smaller(start + slices.width, hidden);
      for (int64_t i = 0; i < count; ++i) {
        const Segment& s = segments[i];
        const int64_t room = rounded(s.width, kHiddenUnit);
        for (int64_t row = 0; row < s.rows && s.width; row += kTileRows) {
          const int64_t some = smaller(kTileRows, s.rows - row);
          const TileRows a{address<const Word>(s.hidden) + row * room, some, room / kTileStep, true};
          for (int64_t k = 0; k < s.width; k += kReach) {
            const int64_t reach = smaller(k + kReach, s.width);
            float* sums = work.sums;
            for (int64_t column = start; column < end; column += kTilePair, sums += a.pairs() * 4 * kTileSums) {
              const TileStrip strip = down_strip(s, column, end);
              const bool more = column + kTilePair < end;
              const Segment& later = more || i + 1 == count ? s : segments[i + 1];
              const TileStrip next = down_strip(later, more ? column + kTilePair : start, end);
              across(strip, &next, k, reach, a, sums, work.weight);
              if (reach < s.width) continue;
              for (int64_t pair = 0; pair < a.pairs(); ++pair)
                for (int tile = 0; tile < a.tiles(pair); ++tile)
                  for (int half = 0; half < 2 && strip.rows[half] > 0; ++half) {
                    __m512i turned[tiles::kRows];
                    turn(sums + (4 * pair + 2 * half + tile) * kTileSums, turned);
                    const int64_t at = row + pair * kTilePair + tile * tiles::kRows;
                    const int columns = static_cast<int>(strip.rows[half]);
                    for (int64_t r = 0; r < rows_of_tile(a, pair, tile); ++r) {
                      float* to = out + address<const int32_t>(s.tokens)[at + r] * hidden + column + half * W;
                      const V scale = set1(address<const float>(s.scale)[at + r]);
                      put<Float32>(to, fma(scale, _mm512_castsi512_ps(turned[r]), get<Float32>(to, columns)), columns);
                    }
                  }
            }
          }
        }
      }
    }
  }
}

// dx[tokens] += dz gate_up
inline void down_backward_tiles(const Segment* segments, int64_t count, int64_t hidden, float* dx, void* scratch,
                                int64_t bytes, int threads) {
  const TileSlices slices(hidden, threads);
  const int64_t tasks = slices.count(), most = most_rows(segments, count);
#pragma omp parallel num_threads(threads)
  {
    const tiles::Session session;
    const TileWorkspace work(scratch, bytes, thread_index(), most);
#pragma omp for schedule(dynamic)
    for (int64_t slice = 0; slice < tasks; ++slice) {
      const int64_t start = slice * slices.width, columns = smaller(slices.width, hidden - start);
      for (int64_t i = 0; i < count; ++i) {
        const Segment& s = segments[i];
        for (int64_t row = 0; row < s.rows && s.width; row += kTileRows) {
          const int64_t some = smaller(kTileRows, s.rows - row);
          along(address<const Word>(s.hidden) + row * 2 * s.width, 2 * s.width, nullptr, some, 2 * s.width,
                gate_up_of<BFloat16>(s).from(0, start), columns, work.sums, work);
          const float* sums = work.sums;
          for (int64_t column = 0; column < columns; column += kTilePair)
            for (int64_t pair = 0; pair < some; pair += kTilePair, sums += 4 * kTileSums)
              for (int64_t r = 0; r < smaller(kTilePair, some - pair); ++r) {
                const float* low = sums + r / tiles::kRows * 2 * kTileSums + r % tiles::kRows * W;
                float settled[kTilePair];
                Words<BFloat16>::settle(settled, Float32::load(low), Float32::load(low + kTileSums));
                const int32_t token = address<const int32_t>(s.tokens)[row + pair + r];
                add_row<Float32>(settled, 1.0f, dx + token * hidden + start + column,
                                 smaller(kTilePair, columns - column));
              }
        }
      }
    }
  }
}

// One row tile of `up_backward`, 32 columns: rows of gate, up and da in order.
struct TurnedRows {
  float gate[tiles::kRows][kTilePair], up[tiles::kRows][kTilePair], da[tiles::kRows][kTilePair];

  // `z` points at the pair's sums of two strips of sixteen columns, `strip` apart, `d` at those of `along`.
  TurnedRows(const float* z, int64_t strip, const float* d, int tile) {
    for (int half = 0; half < 2 && z; ++half) {
      __m512i turned[tiles::kRows];
      turn(z + half * strip + tile * kTileSums, turned);
      for (int r = 0; r < tiles::kRows; ++r) _mm512_storeu_si512(gate[r] + half * W, turned[r]);
      turn(z + half * strip + (2 + tile) * kTileSums, turned);
      for (int r = 0; r < tiles::kRows; ++r) _mm512_storeu_si512(up[r] + half * W, turned[r]);
    }
    for (int r = 0; r < tiles::kRows; ++r) {
      const float* low = d + tile * 2 * kTileSums + r * W;
      Words<BFloat16>::settle(da[r], Float32::load(low), Float32::load(low + kTileSums));
    }
  }
};

// da = dy down; with z recomputed or as kept: dz, <da, a> in part sums a column block, scale * a where asked for.
inline void up_backward_tiles(const Word* x, const Word* dy, int64_t hidden, const Segment* segments, int64_t count,
                              float* partial, void* scratch, int64_t bytes, int threads) {
  const Grid<TileCut> grid(segments, count, hidden, kTileColumns, threads);
  const int64_t tasks = grid.tasks(segments, count), most = most_rows(segments, count);
#pragma omp parallel num_threads(threads)
  {
    const tiles::Session session;
    const TileWorkspace work(scratch, bytes, thread_index(), most);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const Place place = grid.place(tasks - 1 - task, segments);
      const Segment& s = *place.segment;
      const int32_t* tokens = address<const int32_t>(s.tokens) + place.first_row;
      const int64_t units = pieces(s.width, kPartialColumns), end = place.column + place.columns;
      float* parts = partial + place.first_row * units;
      for (const Segment* before = segments; before != &s; ++before)
        parts += before->rows * pieces(before->width, kPartialColumns);

      along(dy, hidden, tokens, place.rows, hidden, down_of<BFloat16>(s).from(0, place.column), place.columns,
            work.sums, work);
      const TileRows rows = s.preact ? TileRows{nullptr, place.rows, 0, true}
                                     : pack_rows_in_pairs(x, hidden, tokens, place.rows, hidden, work.rows);
      const int64_t strip = rows.pairs() * 4 * kTileSums;
      const float* da = work.sums;
      for (int64_t column = place.column; column < end; column += kTilePair, da += strip) {
        const int64_t some = smaller(kTilePair, end - column);
        for (int64_t half = 0; half * tiles::kRows < some && !s.preact; ++half)
          gate_and_up_tiles(s, column + half * tiles::kRows, end, rows, hidden, work.gates + half * strip, work.weight);
        for (int64_t pair = 0; pair < rows.pairs(); ++pair)
          for (int tile = 0; tile < rows.tiles(pair); ++tile) {
            const float* z = s.preact ? nullptr : work.gates + pair * 4 * kTileSums;
            const TurnedRows turned(z, strip, da + pair * 4 * kTileSums, tile);
            for (int64_t r = 0; r < rows_of_tile(rows, pair, tile); ++r) {
              const int64_t at = pair * kTilePair + tile * tiles::kRows + r, row = place.first_row + at;
              const float scale = address<const float>(s.scale)[row];
              Word* dz = address<Word>(s.hidden) + 2 * row * s.width + column;
              Word* scaled = s.scaled ? address<Word>(s.scaled) + row * s.width + column : nullptr;
              float sum;
              if (s.preact) {
                const Word* kept = address<const Word>(s.preact) + 2 * row * s.width + column;
                sum = swiglu_backward_row<BFloat16, Float32, BFloat16>(kept, kept + s.width, turned.da[r], scale, dz,
                                                                       dz + s.width, scaled, some);
              } else {
                sum = swiglu_backward_row<Float32, Float32, BFloat16>(turned.gate[r], turned.up[r], turned.da[r],
                                                                      scale, dz, dz + s.width, scaled, some);
              }
              float& part = parts[at * units + column / kPartialColumns];
              part = column % kPartialColumns ? part + sum : sum;
            }
          }
      }
    }
  }
  add_parts(segments, count, partial);
}

}  // namespace
