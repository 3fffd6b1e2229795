// Routing on the CPU: choice of experts, gates, counting sort, gather. Plain C++: a few operations a logit.
#include <cmath>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/kernels.h"

namespace flex {

namespace {

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Scores and gates from which on starting threads pays.
constexpr int64_t kWorthThreads = 2048;

float sigmoid_of(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// A row's scores; `score` may be `row`.
void score_row(const float* row, int64_t experts, bool sigmoid, float* score) {
  if (sigmoid) {
    for (int64_t e = 0; e < experts; ++e) score[e] = sigmoid_of(row[e]);
    return;
  }
  float largest = row[0], total = 0.0f;
  for (int64_t e = 1; e < experts; ++e) largest = row[e] > largest ? row[e] : largest;
  for (int64_t e = 0; e < experts; ++e) total += score[e] = std::exp(row[e] - largest);
  for (int64_t e = 0; e < experts; ++e) score[e] /= total;
}

}  // namespace

void gather_rows(const void* source, const int32_t* tokens, void* out, int64_t rows, int64_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(static_cast<char*>(out) + r * bytes, static_cast<const char*>(source) + tokens[r] * bytes, bytes);
}

void sort_rows(const int32_t* ids, const float* weights, const float* closed, int64_t tokens, int64_t top_k,
               int64_t experts, int32_t* offsets, int32_t* order, int32_t* token, float* scale) {
  const int64_t slots = tokens * top_k;
  std::memset(offsets, 0, (experts + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < slots; ++i)
    if (ids[i] >= 0 && ids[i] < experts) ++offsets[ids[i] + 1];
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  // offsets[e] serves as the write position of expert e and ends as the start of expert e + 1: shift it back after.
  for (int64_t t = 0, i = 0; t < tokens; ++t)
    for (int64_t k = 0; k < top_k; ++k, ++i) {
      if (ids[i] < 0 || ids[i] >= experts) continue;
      const int64_t place = offsets[ids[i]]++;
      order[place] = static_cast<int32_t>(i);
      token[place] = static_cast<int32_t>(t);
      scale[place] = closed ? weights[i] * closed[t] : weights[i];
    }
  for (int64_t e = experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
  for (int64_t place = offsets[experts]; place < slots; ++place) order[place] = token[place] = 0, scale[place] = 0.0f;
}

void unsort_rows(const float* values, const int32_t* order, int64_t used, int64_t slots, float* out) {
  std::memset(out, 0, slots * sizeof(float));
  for (int64_t place = 0; place < used; ++place) out[order[place]] = values[place];
}

void choose(const float* logits, int64_t ld, const float* bias, int64_t tokens, int64_t experts, int64_t top_k,
            bool normalize, bool sigmoid, float scale, int32_t* ids, float* weights, float* scratch, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * experts >= kWorthThreads)
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = logits + t * ld;
    float* score = scratch + thread_index() * 2 * experts;
    float* key = score + experts;
    score_row(row, experts, sigmoid, score);
    // One pass keeps the best so far in descending order. A score that is not a number counts as the largest, as in
    // torch: it must show, not silently choose something else. A tie stays behind the lower index already there.
    int32_t* chosen = ids + t * top_k;
    for (int64_t e = 0, held = 0; e < experts; ++e) {
      const float value = bias ? score[e] + bias[e] : score[e];
      key[e] = std::isnan(value) ? INFINITY : value;
      if (held == top_k && !(key[e] > key[chosen[held - 1]])) continue;
      int64_t place = held < top_k ? held++ : held - 1;
      for (; place > 0 && key[e] > key[chosen[place - 1]]; --place) chosen[place] = chosen[place - 1];
      chosen[place] = static_cast<int32_t>(e);
    }
    float* weight = weights + t * top_k;
    float total = 0.0f;
    for (int64_t k = 0; k < top_k; ++k) total += weight[k] = score[chosen[k]];
    const float factor = normalize ? scale / (total + 1e-20f) : scale;
    for (int64_t k = 0; k < top_k; ++k) weight[k] *= factor;
  }
}

void choose_backward(float* logits, int64_t ld, const int32_t* ids, const float* grad_weights, const float* added,
                     int64_t tokens, int64_t experts, int64_t top_k, bool normalize, bool sigmoid, float scale,
                     float* scratch, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * experts >= kWorthThreads)
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = logits + t * ld;
    score_row(row, experts, sigmoid, row);
    const int32_t* chosen = ids + t * top_k;
    const float* grad = grad_weights + t * top_k;
    float total = 0.0f, inner = 0.0f;
    for (int64_t k = 0; k < top_k; ++k) total += row[chosen[k]], inner += grad[k] * row[chosen[k]];
    // Of weights scale * s / sum(s), with s the chosen scores; else of scale * s.
    total += 1e-20f;
    const float factor = normalize ? scale / total : scale, shift = normalize ? inner / total : 0.0f;
    // ds = factor (grad - shift); softmax takes the same from all: <ds, s>.
    float common = 0.0f;
    float* change = scratch + thread_index() * top_k;
    for (int64_t k = 0; k < top_k; ++k) {
      const float score = row[chosen[k]], ds = factor * (grad[k] - shift);
      change[k] = ds * score * (sigmoid ? 1.0f - score : 1.0f);
      common += ds * score;
    }
    const float taken = sigmoid ? 0.0f : common;
    for (int64_t e = 0; e < experts; ++e) row[e] = (added ? added[t * experts + e] : 0.0f) - taken * row[e];
    for (int64_t k = 0; k < top_k; ++k) row[chosen[k]] += change[k];
  }
}

void open_gates_backward(const float* gates, const float* grad_gates, int64_t tokens, int64_t count, float* out,
                         int64_t ld, float* totals) {
  for (int64_t g = 0; g < count; ++g) {
    double total = 0.0;
    for (int64_t t = 0; t < tokens; ++t) {
      const float gate = gates[g * tokens + t];
      total += out[t * ld + g] = grad_gates[g * tokens + t] * gate * (1.0f - gate);
    }
    totals[g] = static_cast<float>(total);
  }
}

void open_gates(const float* logits, int64_t ld, int64_t first, const float* bias, int64_t tokens, int64_t count,
                float* gates, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * count >= kWorthThreads)
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < count; ++g) gates[g * tokens + t] = sigmoid_of(logits[t * ld + first + g] + bias[g]);
}

}  // namespace flex
