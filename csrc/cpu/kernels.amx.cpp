// The kernels for AMX-TILE and AMX-BF16 beside AVX-512: products of bfloat16 go through tiles, others through the
// AVX-512 table. As there: an anonymous namespace and no standard template.
#include "cpu/vector_avx512.h"
#include "cpu/rows.h"
#include "cpu/products.h"
#include "cpu/tiles.h"
#include "cpu/fused_amx.h"

namespace flex {

extern const Kernels avx512_table;

namespace {

// So few rows use each code once in thin_codes.h, in registers; a strip for the tiles would be written and read again
// for little multiplication.
constexpr int64_t kFewCodeRows = 4;

// Whether the AVX-512 kernels do this call: other dtypes, and codes where every expert has few rows, as when text is
// generated. `up` and `down` see the same segments, so that both take the same way.
bool leave(int dtype, const Segment* segments, int64_t count) {
  if (dtype != kBFloat16) return true;
  bool codes = false;
  for (int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    if (s.rows > kFewCodeRows) return false;
    codes = codes || s.gate_up_kind != kStored || s.down_kind != kStored;
  }
  return codes;
}

void up_amx(int dtype, const void* x, int64_t hidden, const Segment* segments, int64_t count, void* scratch,
            int64_t bytes, int threads) {
  if (leave(dtype, segments, count))
    return avx512_table.up(dtype, x, hidden, segments, count, scratch, bytes, threads);
  up_tiles(static_cast<const Word*>(x), hidden, segments, count, scratch, bytes, threads);
}

void down_amx(int dtype, const Segment* segments, int64_t count, int64_t hidden, float* out, void* scratch,
              int64_t bytes, int threads) {
  if (leave(dtype, segments, count))
    return avx512_table.down(dtype, segments, count, hidden, out, scratch, bytes, threads);
  down_tiles(segments, count, hidden, out, scratch, bytes, threads);
}

void up_backward_amx(int dtype, const void* x, const void* dy, int64_t hidden, const Segment* segments, int64_t count,
                     float* partial, void* scratch, int64_t bytes, int threads) {
  if (leave(dtype, segments, count))
    return avx512_table.up_backward(dtype, x, dy, hidden, segments, count, partial, scratch, bytes, threads);
  up_backward_tiles(static_cast<const Word*>(x), static_cast<const Word*>(dy), hidden, segments, count, partial,
                    scratch, bytes, threads);
}

void down_backward_amx(int dtype, const Segment* segments, int64_t count, int64_t hidden, float* dx, void* scratch,
                       int64_t bytes, int threads) {
  if (leave(dtype, segments, count))
    return avx512_table.down_backward(dtype, segments, count, hidden, dx, scratch, bytes, threads);
  down_backward_tiles(segments, count, hidden, dx, scratch, bytes, threads);
}

}  // namespace

extern const Kernels amx_table;
const Kernels amx_table = {"amx", true, false, swiglu_any, swiglu_backward_any, scatter_add_any,
                           up_amx, down_amx, up_backward_amx, down_backward_amx, nullptr, TileWorkspace::bytes};

}  // namespace flex
