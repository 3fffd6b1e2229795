// The kernels for AMX-TILE, AMX-BF16 and AMX-INT8 beside AVX-512: products of bfloat16 go through tiles, of int8 with
// int8 too, others through the AVX-512 table. As there: an anonymous namespace and no standard template.
#define FLEX_INT8_TILES
#include "cpu/vector_avx512.h"
#include "cpu/rows.h"
#include "cpu/fused.h"
#include "cpu/tiles.h"
#include "cpu/fused_amx.h"
#include "cpu/router_products.h"

namespace flex {

extern const Kernels avx512_table;

namespace {

// So few rows use each code once in thin_codes.h, in registers; a strip for the tiles would be written and read again
// for little multiplication.
constexpr int64_t kFewCodeRows = 4;

// What computes segments that stand beside each other.
enum class Unit { kVectors, kTiles, kInt8Tiles };

// Segments in int8 go through fused.h with products on tiles; to the AVX-512 kernels go other dtypes, and codes where
// every expert has few rows, as when text is generated. `up` and `down` see the same segments, so that both take the
// same way.
Unit unit_of(int dtype, const Segment* segments, int64_t count) {
  if (dtype != kBFloat16) return Unit::kVectors;
  if (in_int8(segments[0])) return Unit::kInt8Tiles;
  bool codes = false;
  for (int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    if (s.rows > kFewCodeRows) return Unit::kTiles;
    codes = codes || s.gate_up_kind != kStored || s.down_kind != kStored;
  }
  return codes ? Unit::kVectors : Unit::kTiles;
}

// Calls f(unit, first segment, count) for every run of segments that are in int8, or are not.
template <class F>
void each_run(int dtype, const Segment* segments, int64_t count, F f) {
  for (int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && in_int8(segments[end]) == in_int8(segments[begin]);) ++end;
    f(unit_of(dtype, segments + begin, end - begin), segments + begin, end - begin);
  }
}

void up_amx(int dtype, const void* x, int64_t hidden, const Segment* segments, int64_t count, void* scratch,
            int64_t bytes, int threads) {
  each_run(dtype, segments, count, [&](Unit unit, const Segment* run, int64_t some) {
    if (unit == Unit::kVectors) return avx512_table.up(dtype, x, hidden, run, some, scratch, bytes, threads);
    if (unit == Unit::kInt8Tiles) return up<BFloat16>(x, hidden, run, some, scratch, bytes, threads);
    up_tiles(static_cast<const Word*>(x), hidden, run, some, scratch, bytes, threads);
  });
}

void down_amx(int dtype, const Segment* segments, int64_t count, int64_t hidden, float* out, void* scratch,
              int64_t bytes, int threads) {
  each_run(dtype, segments, count, [&](Unit unit, const Segment* run, int64_t some) {
    if (unit == Unit::kVectors) return avx512_table.down(dtype, run, some, hidden, out, scratch, bytes, threads);
    if (unit == Unit::kInt8Tiles) return down<BFloat16>(run, some, hidden, out, scratch, bytes, threads);
    down_tiles(run, some, hidden, out, scratch, bytes, threads);
  });
}

void up_backward_amx(int dtype, const void* x, const void* dy, int64_t hidden, const Segment* segments, int64_t count,
                     float* partial, void* scratch, int64_t bytes, int threads) {
  each_run(dtype, segments, count, [&](Unit unit, const Segment* run, int64_t some) {
    if (unit == Unit::kVectors)
      avx512_table.up_backward(dtype, x, dy, hidden, run, some, partial, scratch, bytes, threads);
    else if (unit == Unit::kInt8Tiles)
      up_backward<BFloat16>(x, dy, hidden, run, some, partial, scratch, bytes, threads);
    else
      up_backward_tiles(static_cast<const Word*>(x), static_cast<const Word*>(dy), hidden, run, some, partial, scratch,
                        bytes, threads);
  });
}

void down_backward_amx(int dtype, const Segment* segments, int64_t count, int64_t hidden, float* dx, void* scratch,
                       int64_t bytes, int threads) {
  each_run(dtype, segments, count, [&](Unit unit, const Segment* run, int64_t some) {
    if (unit == Unit::kVectors)
      return avx512_table.down_backward(dtype, run, some, hidden, dx, scratch, bytes, threads);
    if (unit == Unit::kInt8Tiles) return down_backward<BFloat16>(run, some, hidden, dx, scratch, bytes, threads);
    down_backward_tiles(run, some, hidden, dx, scratch, bytes, threads);
  });
}

}  // namespace

extern const Kernels amx_table;
const Kernels amx_table = {"amx", true, true, swiglu_any, swiglu_backward_any, scatter_add_any,
                           router_product_any, router_input_gradient_any, router_rows_gradient_any,
                           up_amx, down_amx, up_backward_amx, down_backward_amx, nullptr, TileWorkspace::bytes};

}  // namespace flex
