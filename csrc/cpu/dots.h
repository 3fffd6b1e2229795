// Products with rows of the weight, for the vector ISAs: C [rows, columns] = A W^T, the weight contiguous along the
// reduced dimension as A is. Both operands are read in vectors of that dimension, so nothing is transposed: a sum is a
// vector until its end, where four are added up together.
//
// A few weight rows, which stay in the first-level cache, meet groups of A's rows one after another. A's rows are
// packed so that a group is one stretch of memory: a core reads it from the second-level cache at the pace of its
// multiplications. Include products.h first.
#pragma once

#include "cpu/kernels.h"

namespace {

using flex::kBlockRows;
using flex::kDotWords;

// Weight rows and rows of A at a time: kDotColumns * kGroupRows sums, a group's words and one of the weight fit in the
// registers.
constexpr int kDotColumns = W == 16 ? 6 : 4, kGroupRows = W == 16 ? 4 : 3;
// So few rows of A that the bound is the reading of weights.
constexpr int kOnceRows = W == 16 ? kGroupRows : 2 * kGroupRows;

// Rows of one weight, or of two of one shape, each a column of a product; a part's columns are taken in even strips.
template <class E>
struct WeightRows {
  Weight<E> part[2];
  int parts = 1;
  int64_t columns = 0, k = 0;

  WeightRows(const Weight<E>& weight, int64_t columns, int64_t k) : part{weight, weight}, columns(columns), k(k) {}
  // With a second part: the rows from `second` on.
  WeightRows with(const Weight<E>& second) const {
    WeightRows both = *this;
    both.part[both.parts++] = second;
    return both;
  }

  int64_t strips() const { return pieces(columns, kDotColumns); }
  int64_t first_of(int64_t strip) const { return columns * strip / strips(); }

  // What strip `strip`, counted over all parts, reads of the `length` elements from k0 on.
  Area area(int64_t strip, int64_t k0, int64_t length) const {
    const int64_t own = strip % strips(), row = first_of(own);
    return part[strip / strips()].area(row, first_of(own + 1) - row, k0, length);
  }
  Area first_area() const { return area(0, 0, smaller(k, kDotWords * Words<E>::kPerWord)); }
};

// c[m, r] (+)= <a[m], weight row r> for R rows of the weight; a holds M rows as pack_groups leaves them.
template <class E, int R, int M>
void dots(const typename E::T* weight, int64_t ld, int64_t length, const float* a, float* c, int64_t ldc,
          bool accumulate, Ahead& shared) {
  using P = Words<E>;
  constexpr int kStep = W * P::kPerWord;
  Ahead ahead = shared;
  V sums[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = set1(0.0f);
  // Two pointers and ld reach every row with what an x86 address can add up.
  const typename E::T* rows[2] = {weight, weight + 3 * ld};
  const auto step = [&](int n) __attribute__((always_inline)) {
    V words[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) words[m] = Float32::load(a + m * W);
    a += M * W;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V word = P::load_words(rows[r / 3] + r % 3 * ld, n);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[r][m] = P::multiply_add(words[m], word, sums[r][m]);
    }
    rows[0] += kStep;
    rows[1] += kStep;
  };
  for (int64_t i = length / kStep; i > 0; --i) {
    ahead.some();
    step(kStep);
  }
  if (length % kStep) step(static_cast<int>(length % kStep));
  const auto of = [&](int r, int m) __attribute__((always_inline)) { return r < R && m < M ? sums[r][m] : set1(0.0f); };
  constexpr int kWhole = R / 4 * 4, kRest = R - kWhole;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    if (kWhole) add_sums(four_sums(of(0, m), of(1, m), of(2, m), of(3, m)), 4, c + m * ldc, accumulate);
  if (kRest == 3) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      add_sums(four_sums(of(kWhole, m), of(kWhole + 1, m), of(kWhole + 2, m), set1(0.0f)), 3, c + m * ldc + kWhole,
               accumulate);
  } else if (kRest) {
    // Two rows of A at a time.
#pragma GCC unroll 4
    for (int m = 0; m < M; m += 2) {
      const __m128 pairs =
          four_sums(of(kWhole, m), of(kWhole + kRest - 1, m), of(kWhole, m + 1), of(kWhole + kRest - 1, m + 1));
      add_sums(pairs, kRest, c + m * ldc + kWhole, accumulate);
      if (m + 1 < M) add_sums(_mm_movehl_ps(pairs, pairs), kRest, c + (m + 1) * ldc + kWhole, accumulate);
    }
  }
  shared = ahead;
}

template <class E>
struct Dots {
  using Function = void (*)(const typename E::T*, int64_t, int64_t, const float*, float*, int64_t, bool, Ahead&);

  template <int R>
  static Function of_group(int group) {
    static const Function table[] = {
        dots<E, R, 1>, dots<E, R, 2>, dots<E, R, 3>,
#if defined(__AVX512F__)
        dots<E, R, 4>,
#endif
    };
    return table[group - 1];
  }

  static Function of(int columns, int group) {
    switch (columns) {
      case 1: return of_group<1>(group);
      case 2: return of_group<2>(group);
      case 3: return of_group<3>(group);
#if defined(__AVX512F__)
      case 4: return of_group<4>(group);
      case 5: return of_group<5>(group);
      default: return of_group<6>(group);
#else
      default: return of_group<4>(group);
#endif
    }
  }
};

// Words of a row of `length` elements, in whole vectors.
template <class P>
inline int64_t whole_words(int64_t length) { return pieces(pieces(length, P::kPerWord), W) * W; }

// The words of elements [c, c + n) of weight row r.
template <class E>
inline void row_words(const Weight<E>& weight, int64_t r, int64_t c, int64_t n, typename Words<E>::Word::T* out) {
  using P = Words<E>;
  if constexpr (P::kStoredWords) {
    weight.decode(r, c, n, out);
  } else if (weight.stored()) {
    P::pack_row(weight.at(r, c), n, out);
  } else {
    alignas(64) typename E::T row[kDotWords * P::kPerWord];
    weight.decode(r, c, n, row);
    P::pack_row(row, n, out);
  }
}

// Rows of A in groups: [group][vector of words][row of the group]; row r is `base + (index ? index[r] : r) * lda`.
template <class E>
void pack_groups(const typename E::T* base, int64_t lda, const int32_t* index, int64_t rows, int64_t length,
                 float* out) {
  using P = Words<E>;
  constexpr int64_t kStep = W * P::kPerWord;
  evenly(rows, kGroupRows, [&](int64_t r, int64_t some) {
    const typename E::T* from[kGroupRows];
    for (int64_t i = 0; i < some; ++i) from[i] = base + (index ? index[r + i] : r + i) * lda;
    for (int64_t k = 0; k < length; k += kStep)
      for (int64_t i = 0; i < some; ++i, out += W)
        Float32::store(out, P::load_words(from[i] + k, static_cast<int>(smaller(kStep, length - k))));
  });
}

// The product for codes and few rows, where codes can be used as they are; false where strips are to be decoded.
template <class E>
bool code_dots(const typename E::T*, int64_t, const int32_t*, int64_t, const WeightRows<E>&, float*, int64_t, int64_t,
               const Workspace&) {
  return false;
}

// C [rows, columns] = A W^T, part p of the weight from column p * apart of C on; row r of A is
// `base + (index ? index[r] : r) * lda`. `coming`: what the next product reads first.
template <class E>
void dot_product(const typename E::T* base, int64_t lda, const int32_t* index, int64_t rows,
                 const WeightRows<E>& weights, float* c, int64_t ldc, int64_t apart, const Workspace& work,
                 const Area& coming) {
  using P = Words<E>;
  using S = typename P::Word;
  if (!weights.part[0].stored() && code_dots<E>(base, lda, index, rows, weights, c, ldc, apart, work)) return;
  const int64_t strips = weights.strips(), all = weights.parts * strips;
  // Elements of the reduced dimension at a time. Strips stay in the first-level cache for the next group of rows; where
  // there is none, they are read in stretches as long as the rows of A have room for. It fixes the order of a sum, so
  // it may not depend on threads.
  const bool once = rows <= kOnceRows && weights.part[0].stored();
  const int64_t most = once ? work.room / rows / 32 * 32 : kDotWords, every = pieces(weights.k, P::kPerWord);
  const int64_t block = pieces(pieces(every, pieces(every, most)), 32) * 32 * P::kPerWord;
  alignas(64) typename S::T strip[kDotColumns * kDotWords * P::kPerWord];
  evenly(rows, kBlockRows, [&](int64_t first_row, int64_t some) {
    for (int64_t k0 = 0; k0 < weights.k; k0 += block) {
      const int64_t length = smaller(block, weights.k - k0), words = whole_words<P>(length);
      pack_groups<E>(index ? base + k0 : base + first_row * lda + k0, lda, index ? index + first_row : nullptr, some,
                     length, work.a);
      const int64_t slots = pieces(some, kGroupRows) * (words / W), next = k0 + block;
      for (int64_t s = 0; s < all; ++s) {
        const Weight<E>& weight = weights.part[s / strips];
        const int64_t j = weights.first_of(s % strips), count = weights.first_of(s % strips + 1) - j;
        Ahead ahead(s + 1 < all               ? weights.area(s + 1, k0, length)
                    : next < weights.k        ? weights.area(0, next, smaller(block, weights.k - next))
                    : first_row + some < rows ? weights.area(0, 0, smaller(block, weights.k))
                                              : coming,
                    slots);
        float* to = c + first_row * ldc + s / strips * apart + j;
        const auto each_group = [&](auto* from, int64_t ld, auto kernel_of) {
          evenly(some, kGroupRows, [&](int64_t r, int64_t group) {
            kernel_of(static_cast<int>(count), static_cast<int>(group))(from, ld, length, work.a + r * words,
                                                                        to + r * ldc, ldc, k0 > 0, ahead);
          });
        };
        // Elements that are words as stored are used where they lie, others where that is once.
        if (once || (weight.stored() && P::kStoredWords)) {
          each_group(weight.at(j, k0), weight.ld, Dots<E>::of);
          continue;
        }
        const int64_t ld = words * (sizeof(float) / sizeof(typename S::T));
        for (int64_t r = 0; r < count; ++r) row_words<E>(weight, j + r, k0, length, strip + r * ld);
        each_group(static_cast<const typename S::T*>(strip), ld, Dots<S>::of);
      }
    }
  });
}

}  // namespace
