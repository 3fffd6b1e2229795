// exp and sigmoid of a vector, written in the operations of vector_*.h.
#pragma once

namespace {

// x = n log 2 + r with |r| <= log(2) / 2, exp(r) by a Taylor-like polynomial of degree 7: relative error below 2e-7.
// Inputs beyond +-87 saturate, which neither sigmoid nor silu can tell apart in float32.
inline V exp(V x) {
  x = clamp(x, -87.0f, 87.0f);
  const V n = nearest(mul(x, set1(1.44269504f)));
  // log 2 in two parts: the product with the first is exact.
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return times_power_of_2(p, n);
}

inline V sigmoid(V x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(set1(0.0f), x)))); }

}  // namespace
