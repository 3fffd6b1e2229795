// Products of a block of rows with weights as stored, for the vector ISAs: C [rows, columns] += A [rows, k] B.
//
// B is packed, a block of the reduced dimension at a time, into panels of kPanelColumns columns whose words (see
// kernels.h) lie [word][column]; A's rows are copied, gathered where need be, to a fixed stride, so that twelve rows
// never share a cache set. Both fit in the caches of one core. Include vector_*.h and rows.h first.
#pragma once

#include "cpu/kernels.h"
#include "cpu/weights.h"

namespace {

using flex::kBackwardColumns;
using flex::kBlockRows;
using flex::kDeepColumns;
using flex::kWideColumns;

constexpr int kPanelColumns = 2 * W;
constexpr int kPanels = kWideColumns / kPanelColumns;
// One cache line more than a power of two.
constexpr int64_t kRowWords = flex::kPanelWords / kDeepColumns + 16;


// Up to kPanelColumns columns of B. Transposed: column j is row j of the weight, contiguous along k. Plain: column j
// is column j of the weight.
template <class E>
struct Panel {
  Weight<E> weight;
  int columns;
  bool transposed;
};

// Into the second-level cache, which has room for what is far ahead. Inlined by force, as Weight::prefetch.
template <class T>
__attribute__((always_inline)) inline void prefetch(const T* p, int elements) {
  for (int byte = 0; byte < elements * static_cast<int>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
}

}  // namespace

#if defined(__AVX512F__)
#include "cpu/pack_avx512.h"
#else
#include "cpu/pack_avx2.h"
#endif

namespace {

// The right operand of a product: panels of `k` elements each, or none.
template <class E>
struct Panels {
  Panel<E> panel[kPanels];
  int count = 0;
  int64_t k = 0;
  // Elements of the reduced dimension that are packed at a time. It fixes the order of a sum, so it may depend on
  // neither threads nor rows.
  int64_t block = 1;

  // Room for `columns` columns.
  Panels(int64_t elements, int64_t columns) : k(elements) {
    // Equal blocks of whole vectors: 1,408 words go as three of 480, not as 512, 512 and 384.
    const int64_t all = pieces(k, Packing<E>::kPerWord), blocks = pieces(all, flex::kPanelWords / columns);
    if (blocks) block = pieces(pieces(all, blocks), 32) * 32 * Packing<E>::kPerWord;
  }

  void add(const Weight<E>& weight, int64_t columns, bool transposed) {
    for (int64_t j = 0; j < columns && count < kPanels; j += kPanelColumns)
      panel[count++] = {transposed ? weight.from(j, 0) : weight.from(0, j),
                        static_cast<int>(smaller(kPanelColumns, columns - j)), transposed};
  }
};

// Brings the weights that will be packed next into the second-level cache, a line at a time between multiplications:
// else the packing of a block waits for memory while nothing is multiplied.
class Ahead {
 public:
  // The block of the panels from k0 on, in about `slots` calls of some().
  template <class E>
  Ahead(const Panels<E>& coming, int64_t k0, int64_t slots) {
    const int64_t length = smaller(coming.block, coming.k - k0);
    if (!coming.count || length < 1) return;
    const Panel<E>& one = coming.panel[0];
    for (int p = 0; p < coming.count && one.transposed; ++p) {
      const Panel<E>& panel = coming.panel[p];
      // Neighbours of one matrix are one stretch of rows.
      if (stretches_ && panel.weight.byte(0, k0) == base_[stretches_ - 1] + rows_[stretches_ - 1] * step_) {
        rows_[stretches_ - 1] += panel.columns;
        continue;
      }
      if (stretches_ == 2) break;
      base_[stretches_] = panel.weight.byte(0, k0);
      rows_[stretches_++] = panel.columns;
      step_ = panel.weight.byte(1, k0) - panel.weight.byte(0, k0);
      bytes_ = panel.weight.byte(0, k0 + length - 1) + 1 - panel.weight.byte(0, k0);
    }
    if (!one.transposed) {
      const int64_t columns = (coming.count - 1) * kPanelColumns + coming.panel[coming.count - 1].columns;
      stretches_ = 1;
      base_[0] = one.weight.byte(k0, 0);
      rows_[0] = length;
      step_ = one.weight.byte(k0 + 1, 0) - base_[0];
      bytes_ = one.weight.byte(k0, columns - 1) + 1 - base_[0];
    }
    at_ = base_[0];
    const int64_t lines = pieces(bytes_, 64);
    for (int i = 0; i < stretches_; ++i) left_ += rows_[i] * lines;
    each_ = static_cast<int>(pieces(left_, slots < 1 ? 1 : slots));
  }

  __attribute__((always_inline)) void some() {
    for (int i = 0; i < each_ && left_ > 0; ++i, --left_) {
      __builtin_prefetch(at_ + offset_, 0, 2);
      if ((offset_ += 64) < bytes_) continue;
      offset_ = 0;
      at_ += step_;
      if (++row_ == rows_[stretch_]) row_ = 0, at_ = base_[++stretch_ & 1];
    }
  }

 private:
  const char *base_[2] = {}, *at_ = nullptr;
  int64_t rows_[2] = {}, step_ = 0, bytes_ = 0, offset_ = 0, row_ = 0, left_ = 0;
  int stretches_ = 0, stretch_ = 0, each_ = 0;
};

constexpr int64_t kBetweenPrefetches = 8;  // words

// c [M, kPanelColumns] (+)= a [M, words] b [words, kPanelColumns]
template <class P, int M>
void micro(int64_t words, const float* a, const float* b, float* c, int64_t ldc, bool accumulate, Ahead& ahead) {
  V sums[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sums[i][0] = sums[i][1] = set1(0.0f);
  for (int64_t k = 0; k < words;) {
    const int64_t end = smaller(k + kBetweenPrefetches, words);
    ahead.some();
    for (; k < end; ++k) {
      const V b0 = Float32::load(b + k * kPanelColumns), b1 = Float32::load(b + k * kPanelColumns + W);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const V word = set1(a[i * kRowWords + k]);
        sums[i][0] = P::multiply_add(word, b0, sums[i][0]);
        sums[i][1] = P::multiply_add(word, b1, sums[i][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    float* row = c + i * ldc;
    if (accumulate) {
      sums[i][0] = add(sums[i][0], Float32::load(row));
      sums[i][1] = add(sums[i][1], Float32::load(row + W));
    }
    Float32::store(row, sums[i][0]);
    Float32::store(row + W, sums[i][1]);
  }
}

template <class P>
struct Micro {
  using Function = void (*)(int64_t, const float*, const float*, float*, int64_t, bool, Ahead&);
  static Function of(int rows) {
    static const Function table[] = {
        micro<P, 1>, micro<P, 2>, micro<P, 3>, micro<P, 4>, micro<P, 5>, micro<P, 6>,
#if defined(__AVX512F__)
        micro<P, 7>, micro<P, 8>, micro<P, 9>, micro<P, 10>, micro<P, 11>, micro<P, 12>,
#endif
    };
    return table[rows - 1];
  }
  static constexpr int kMost = W == 16 ? 12 : 6;
};

// One thread's buffers, carved from its piece of the caller's scratch.
struct Workspace {
  float* b;  // [panels][block words][kPanelColumns]
  float* a;  // [Micro::kMost][kRowWords]
  float* c;  // [rows][columns of a task]

  Workspace(void* scratch, int64_t bytes, int thread, int64_t longest) {
    const int64_t fewest = 64 * flex::kThinRows, panels = smaller(flex::kPanelWords, kWideColumns * longest);
    b = reinterpret_cast<float*>(static_cast<char*>(scratch) + bytes * thread);
    a = b + (panels < fewest ? fewest : panels);
    c = a + flex::kPanelRows * kRowWords;
  }
};

// C [rows, panels.count * kPanelColumns] = A B for panels of B; row r of A is `base + (index ? index[r] : r) * lda`.
// `coming`: what the next product will pack.
template <class E>
void product(const typename E::T* base, int64_t lda, const int32_t* index, int64_t rows, const Panels<E>& panels,
             float* c, int64_t ldc, const Workspace& work, const Panels<E>& coming) {
  using P = Packing<E>;
  const int64_t steps = pieces(rows, Micro<P>::kMost);
  const int count = panels.count;
  for (int64_t k0 = 0; k0 < panels.k; k0 += panels.block) {
    const int64_t length = smaller(panels.block, panels.k - k0), words = pieces(length, P::kPerWord);
    P::pack(panels.panel, count, k0, length, work.b);
    const int64_t slots = steps * count * pieces(words, kBetweenPrefetches), next = k0 + panels.block;
    Ahead ahead = next < panels.k ? Ahead(panels, next, slots) : Ahead(coming, 0, slots);
    for (int64_t step = 0; step < steps; ++step) {
      // Rows are shared out evenly: 13 go as 7 and 6, never as 12 and 1.
      const int64_t first_row = rows * step / steps, some = rows * (step + 1) / steps - first_row;
      for (int64_t i = 0; i < some; ++i) {
        const int64_t row = index ? index[first_row + i] : first_row + i;
        P::pack_row(base + row * lda + k0, length, work.a + i * kRowWords);
      }
      const auto run = Micro<P>::of(static_cast<int>(some));
      for (int p = 0; p < count; ++p)
        run(words, work.a, work.b + p * words * kPanelColumns, c + first_row * ldc + p * kPanelColumns, ldc, k0 > 0,
            ahead);
    }
  }
}

}  // namespace
