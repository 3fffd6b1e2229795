// Kernels over rows, written in the operations of vector_*.h, which must be included first.
#pragma once

#include "cpu/kernels.h"

namespace {

// Calls f(column, lanes) over a row; the last vector may be partial.
template <class F>
inline void over(int64_t columns, F f) {
  int64_t c = 0;
  for (; c + W <= columns; c += W) f(c, W);
  if (c < columns) f(c, static_cast<int>(columns - c));
}

template <class E>
inline V get(const typename E::T* p, int lanes) {
  return lanes == W ? E::load(p) : E::load(p, lanes);
}

template <class E>
inline void put(typename E::T* p, V v, int lanes) {
  if (lanes == W) E::store(p, v);
  else E::store(p, v, lanes);
}

// a = silu(gate) * up
template <class G, class E>
inline void swiglu_row(const typename G::T* gate, const typename G::T* up, typename E::T* a, int64_t width) {
  over(width, [&](int64_t c, int lanes) {
    const V g = get<G>(gate + c, lanes), u = get<G>(up + c, lanes);
    put<E>(a + c, mul(mul(g, sigmoid(g)), u), lanes);
  });
}

// Returns <da, a>; writes scale * da * d(a)/d(gate, up) and, unless `scaled` is null, scale * a.
template <class G, class D, class E>
inline float swiglu_backward_row(const typename G::T* gate, const typename G::T* up, const typename D::T* da,
                                 float scale, typename E::T* dgate, typename E::T* dup, typename E::T* scaled,
                                 int64_t width) {
  V total = set1(0.0f);
  const V s = set1(scale), one = set1(1.0f);
  over(width, [&](int64_t c, int lanes) {
    const V g = get<G>(gate + c, lanes), u = get<G>(up + c, lanes), d = get<D>(da + c, lanes);
    const V sig = sigmoid(g), silu = mul(g, sig), a = mul(silu, u), sd = mul(s, d);
    // Lanes beyond the row were loaded as zeros and add nothing.
    total = fma(d, a, total);
    if (scaled) put<E>(scaled + c, mul(s, a), lanes);
    put<E>(dgate + c, mul(mul(sd, u), mul(sig, add(one, sub(g, silu)))), lanes);
    put<E>(dup + c, mul(sd, silu), lanes);
  });
  return sum(total);
}

// out += scale * source
template <class E>
inline void add_row(const typename E::T* source, float scale, float* out, int64_t columns) {
  const V s = set1(scale);
  over(columns, [&](int64_t c, int lanes) {
    put<Float32>(out + c, fma(s, get<E>(source + c, lanes), get<Float32>(out + c, lanes)), lanes);
  });
}

template <class E>
void swiglu(const void* z_, void* a_, int64_t rows, int64_t width, int threads) {
  auto* z = static_cast<const typename E::T*>(z_);
  auto* a = static_cast<typename E::T*>(a_);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    swiglu_row<E, E>(z + 2 * r * width, z + (2 * r + 1) * width, a + r * width, width);
}

template <class E>
void swiglu_backward(const void* z_, const void* da_, const float* scale, void* dz_, float* dscale, void* scaled_,
                     int64_t rows, int64_t width, int threads) {
  auto* z = static_cast<const typename E::T*>(z_);
  auto* da = static_cast<const typename E::T*>(da_);
  auto* dz = static_cast<typename E::T*>(dz_);
  auto* scaled = static_cast<typename E::T*>(scaled_);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    dscale[r] = swiglu_backward_row<E, E, E>(z + 2 * r * width, z + (2 * r + 1) * width, da + r * width, scale[r],
                                             dz + 2 * r * width, dz + (2 * r + 1) * width,
                                             scaled ? scaled + r * width : nullptr, width);
}

// Threads share the columns, not the rows: a token may come twice, and the order of its sum must not depend on them.
template <class E>
void scatter_add(const void* source_, const int32_t* tokens, const float* scale, float* out, int64_t rows,
                 int64_t columns, int threads) {
  constexpr int64_t kSlice = 256;
  auto* source = static_cast<const typename E::T*>(source_);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < columns; c += kSlice)
    for (int64_t r = 0; r < rows; ++r)
      add_row<E>(source + r * columns + c, scale ? scale[r] : 1.0f, out + tokens[r] * columns + c,
                 columns - c < kSlice ? columns - c : kSlice);
}

// Turns template functions of an element type into one function of a dtype.
#define FLEX_BY_DTYPE(dtype, function, ...)                                          \
  switch (dtype) {                                                                   \
    case flex::kFloat32: return function<Float32>(__VA_ARGS__);                      \
    case flex::kBFloat16: return function<BFloat16>(__VA_ARGS__);                    \
    default: return function<Float16>(__VA_ARGS__);                                  \
  }

void swiglu_any(int dtype, const void* z, void* a, int64_t rows, int64_t width, int threads) {
  FLEX_BY_DTYPE(dtype, swiglu, z, a, rows, width, threads)
}

void swiglu_backward_any(int dtype, const void* z, const void* da, const float* scale, void* dz, float* dscale,
                         void* scaled, int64_t rows, int64_t width, int threads) {
  FLEX_BY_DTYPE(dtype, swiglu_backward, z, da, scale, dz, dscale, scaled, rows, width, threads)
}

void scatter_add_any(int dtype, const void* source, const int32_t* tokens, const float* scale, float* out,
                     int64_t rows, int64_t columns, int threads) {
  FLEX_BY_DTYPE(dtype, scatter_add, source, tokens, scale, out, rows, columns, threads)
}

}  // namespace
