// The thin products of x with a router's rows and with those of gates, and their gradients, for the vector ISAs.
// Operands are widened to float32 as they are loaded: x and the router are read as stored, once. An element's sum has
// the same order whatever the number of tokens and of threads. Include fused.h first.
//
// Letters: T tokens, H hidden, R columns of a product: a router's experts, then gates.
#pragma once

#include "cpu/kernels.h"

namespace {

using flex::RouterRows;

// A tile keeps its sums in registers, of which AVX-512 has 32 and AVX2 16.
constexpr int kTokensATile = W == 16 ? 4 : 2;
constexpr int kRowsATile = 4, kVectorsATile = 4;
constexpr int64_t kRouterTaskTokens = 16, kRouterTaskRows = 16, kRouterTaskColumns = 256;
// Tokens that a gradient of the rows goes through at a time: so many of x stay in the second-level cache.
constexpr int64_t kRouterBlockTokens = 512;
// Products of two numbers from which on starting threads pays.
constexpr int64_t kRouterWorthThreads = 1 << 16;

// out[t, i] = <x[t, :], rows[i, :]> for kTokens tokens and `count` <= kRowsATile rows.
template <class X, class M, int kTokens>
void product_tile(const typename X::T* x, const typename M::T* rows, int64_t hidden, int count, float* out,
                  int64_t ldo) {
  const typename M::T* row[kRowsATile];
  for (int i = 0; i < kRowsATile; ++i) row[i] = rows + (i < count ? i : 0) * hidden;
  V total[kTokens][kRowsATile];
  for (int t = 0; t < kTokens; ++t)
    for (int i = 0; i < kRowsATile; ++i) total[t][i] = set1(0.0f);
  over(hidden, [&](int64_t c, int lanes) __attribute__((always_inline)) {
    V v[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) v[t] = get<X>(x + t * hidden + c, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kRowsATile; ++i) {
      const V m = get<M>(row[i] + c, lanes);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) total[t][i] = fma(v[t], m, total[t][i]);
    }
  });
  for (int t = 0; t < kTokens; ++t)
    add_sums(four_sums(total[t][0], total[t][1], total[t][2], total[t][3]), count, out + t * ldo, false);
}

template <class X, class M>
void product_task(const typename X::T* x, int64_t tokens, const typename M::T* rows, int64_t count, int64_t hidden,
                  float* out, int64_t ldo) {
  for (int64_t t = 0; t < tokens;) {
    const bool whole = tokens - t >= kTokensATile;
    const auto tile = whole ? product_tile<X, M, kTokensATile> : product_tile<X, M, 1>;
    for (int64_t r = 0; r < count; r += kRowsATile)
      tile(x + t * hidden, rows + r * hidden, hidden, static_cast<int>(smaller(kRowsATile, count - r)),
           out + t * ldo + r, ldo);
    t += whole ? kTokensATile : 1;
  }
}

// M: the dtype of the router.
template <class X, class M>
void router_product(const void* x_, int64_t tokens, int64_t hidden, const RouterRows& rows, float* out, int threads) {
  auto* x = static_cast<const typename X::T*>(x_);
  auto* router = static_cast<const typename M::T*>(rows.router);
  const int64_t ld = rows.experts + rows.gates;
  const int64_t of_router = pieces(rows.experts, kRouterTaskRows);
  const int64_t wide = of_router + pieces(rows.gates, kRouterTaskRows);
  const int64_t tasks = pieces(tokens, kRouterTaskTokens) * wide;
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * ld * hidden >= kRouterWorthThreads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t t = task / wide * kRouterTaskTokens, some = smaller(kRouterTaskTokens, tokens - t);
    const int64_t r = task % wide * kRouterTaskRows, g = r - of_router * kRouterTaskRows;
    if (g < 0)
      product_task<X, M>(x + t * hidden, some, router + r * hidden, smaller(kRouterTaskRows, rows.experts - r), hidden,
                         out + t * ld + r, ld);
    else
      product_task<X, Float32>(x + t * hidden, some, rows.gate_rows + g * hidden,
                               smaller(kRouterTaskRows, rows.gates - g), hidden, out + t * ld + rows.experts + g, ld);
  }
}

// total[t] += d[t, r] rows[r] for `count` rows r; columns of the rows beyond `lanes` count as zero.
template <class M, int kTokens, int kVectors>
inline void spread(const float* d, int64_t ldd, const typename M::T* rows, int64_t count, int64_t hidden, int lanes,
                   V (&total)[kTokens][kVectors]) {
  for (int64_t r = 0; r < count; ++r) {
    V row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = get<M>(rows + r * hidden + v * W, lanes);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const V factor = set1(d[t * ldd + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[t][v] = fma(factor, row[v], total[t][v]);
    }
  }
}

// The columns [column, column + kVectors * W) of dx for kTokens tokens; of a single vector, the first `lanes`.
template <class X, class M, int kTokens, int kVectors>
void input_gradient_tile(const float* d, const RouterRows& rows, int64_t hidden, int64_t column, int lanes,
                         const typename X::T* other, typename X::T* dx) {
  if (kVectors > 1) lanes = W;
  V total[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v)
      total[t][v] = other ? get<X>(other + t * hidden + column + v * W, lanes) : set1(0.0f);
  const int64_t ldd = rows.experts + rows.gates;
  spread<M>(d, ldd, static_cast<const typename M::T*>(rows.router) + column, rows.experts, hidden, lanes, total);
  spread<Float32>(d + rows.experts, ldd, rows.gate_rows + column, rows.gates, hidden, lanes, total);
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) put<X>(dx + t * hidden + column + v * W, total[t][v], lanes);
}

template <class X, class M, int kTokens>
void input_gradient_tokens(const float* d, const RouterRows& rows, int64_t hidden, int64_t first, int64_t last,
                           const typename X::T* other, typename X::T* dx) {
  int64_t c = first;
  for (; c + kVectorsATile * W <= last; c += kVectorsATile * W)
    input_gradient_tile<X, M, kTokens, kVectorsATile>(d, rows, hidden, c, W, other, dx);
  for (; c < last; c += W)
    input_gradient_tile<X, M, kTokens, 1>(d, rows, hidden, c, static_cast<int>(smaller(W, last - c)), other, dx);
}

template <class X, class M>
void router_input_gradient(const float* d, int64_t tokens, int64_t hidden, const RouterRows& rows, const void* other_,
                           void* dx_, int threads) {
  auto* other = static_cast<const typename X::T*>(other_);
  auto* dx = static_cast<typename X::T*>(dx_);
  const int64_t ld = rows.experts + rows.gates, wide = pieces(hidden, kRouterTaskColumns);
  const int64_t tasks = pieces(tokens, kRouterTaskTokens) * wide;
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * ld * hidden >= kRouterWorthThreads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t last = smaller((task / wide + 1) * kRouterTaskTokens, tokens);
    const int64_t column = task % wide * kRouterTaskColumns, end = smaller(column + kRouterTaskColumns, hidden);
    for (int64_t t = task / wide * kRouterTaskTokens; t < last;) {
      const bool whole = last - t >= kTokensATile;
      const auto some = whole ? input_gradient_tokens<X, M, kTokensATile> : input_gradient_tokens<X, M, 1>;
      some(d + t * ld, rows, hidden, column, end, other ? other + t * hidden : nullptr, dx + t * hidden);
      t += whole ? kTokensATile : 1;
    }
  }
}

// out[r, :] += sum over t of d[t, r] x[t, :] for kRows rows r; of a single vector, the first `lanes` columns.
template <class X, int kRows, int kVectors>
void rows_gradient_tile(const float* d, int64_t ldd, const typename X::T* x, int64_t tokens, int64_t hidden, int lanes,
                        float* out) {
  if (kVectors > 1) lanes = W;
  V total[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) total[r][v] = get<Float32>(out + r * hidden + v * W, lanes);
  for (int64_t t = 0; t < tokens; ++t) {
    V row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = get<X>(x + t * hidden + v * W, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V factor = set1(d[t * ldd + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[r][v] = fma(factor, row[v], total[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) put<Float32>(out + r * hidden + v * W, total[r][v], lanes);
}

template <class X, int kRows>
void rows_gradient_columns(const float* d, int64_t ldd, const typename X::T* x, int64_t tokens, int64_t hidden,
                           int64_t columns, float* out) {
  int64_t c = 0;
  for (; c + kVectorsATile * W <= columns; c += kVectorsATile * W)
    rows_gradient_tile<X, kRows, kVectorsATile>(d, ldd, x + c, tokens, hidden, W, out + c);
  for (; c < columns; c += W)
    rows_gradient_tile<X, kRows, 1>(d, ldd, x + c, tokens, hidden, static_cast<int>(smaller(W, columns - c)), out + c);
}

template <class X>
void router_rows_gradient(const float* d, int64_t ldd, const void* x_, int64_t tokens, int64_t hidden, int64_t count,
                          float* out, int threads) {
  auto* x = static_cast<const typename X::T*>(x_);
  const int64_t tasks = pieces(hidden, kRouterTaskColumns);
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * count * hidden >= kRouterWorthThreads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t c = task * kRouterTaskColumns, columns = smaller(kRouterTaskColumns, hidden - c);
    for (int64_t r = 0; r < count; ++r)
      over(columns, [&](int64_t i, int lanes) { put<Float32>(out + r * hidden + c + i, set1(0.0f), lanes); });
    for (int64_t t = 0; t < tokens; t += kRouterBlockTokens)
      for (int64_t r = 0; r < count;) {
        const bool whole = count - r >= kTokensATile;
        const auto some = whole ? rows_gradient_columns<X, kTokensATile> : rows_gradient_columns<X, 1>;
        some(d + t * ldd + r, ldd, x + t * hidden + c, smaller(kRouterBlockTokens, tokens - t), hidden, columns,
             out + r * hidden + c);
        r += whole ? kTokensATile : 1;
      }
  }
}

// The router's rows are of x's dtype or float32.
void router_product_any(int dtype, const void* x, int64_t tokens, int64_t hidden, const RouterRows& rows, float* out,
                      int threads) {
  const bool wide = rows.router_dtype == flex::kFloat32;
  switch (dtype) {
    case flex::kFloat32: return router_product<Float32, Float32>(x, tokens, hidden, rows, out, threads);
    case flex::kBFloat16:
      return wide ? router_product<BFloat16, Float32>(x, tokens, hidden, rows, out, threads)
                  : router_product<BFloat16, BFloat16>(x, tokens, hidden, rows, out, threads);
    default:
      return wide ? router_product<Float16, Float32>(x, tokens, hidden, rows, out, threads)
                  : router_product<Float16, Float16>(x, tokens, hidden, rows, out, threads);
  }
}

void router_input_gradient_any(int dtype, const float* d, int64_t tokens, int64_t hidden, const RouterRows& rows,
                               const void* other, void* dx, int threads) {
  const bool wide = rows.router_dtype == flex::kFloat32;
  switch (dtype) {
    case flex::kFloat32: return router_input_gradient<Float32, Float32>(d, tokens, hidden, rows, other, dx, threads);
    case flex::kBFloat16:
      return wide ? router_input_gradient<BFloat16, Float32>(d, tokens, hidden, rows, other, dx, threads)
                  : router_input_gradient<BFloat16, BFloat16>(d, tokens, hidden, rows, other, dx, threads);
    default:
      return wide ? router_input_gradient<Float16, Float32>(d, tokens, hidden, rows, other, dx, threads)
                  : router_input_gradient<Float16, Float16>(d, tokens, hidden, rows, other, dx, threads);
  }
}

void router_rows_gradient_any(int dtype, const float* d, int64_t ldd, const void* x, int64_t tokens, int64_t hidden,
                            int64_t count, float* out, int threads) {
  FLEX_BY_DTYPE(dtype, router_rows_gradient, d, ldd, x, tokens, hidden, count, out, threads)
}

}  // namespace
