// Scores, choice and weights of the router for one token, by one warp, in registers.
//
// Letters: E routed experts, K chosen.
#pragma once

#include "common.cuh"

namespace flex {

// Maps floats to integers of the same order. NaN of either sign comes above everything, as in torch.sort, so that a NaN
// shows in the weights instead of being dropped. No float maps to 0, which marks experts that are taken or absent.
__device__ __forceinline__ unsigned ordered_key(float v) {
  if (v != v) return 0xffffffffu;
  const unsigned bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Lane l holds the logits of experts l, l + 32, ...: logit[i] is that of expert 32 i + l, anything where that is >= E.
// On return lane k < K holds the id and the weight of the k-th best expert.
//
//   p = softmax(logit) or sigmoid(logit);  choice = p + bias;  ties go to the lowest index
//   w = p[chosen] (/ (sum + 1e-20) if normalised) * scale
template <int SLOTS>
__device__ __forceinline__ void select_experts(const float (&logit)[SLOTS], const float* bias_E, const Routing& routing,
                                               int lane, int& id, float& weight) {
  float score[SLOTS];
  if (routing.sigmoid) {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) score[i] = sigmoid(logit[i]);
  } else {
    float peak = -INFINITY;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      if (i * kWarp + lane < routing.experts) peak = fmaxf(peak, logit[i]);
    }
    peak = warp_max(peak);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      score[i] = i * kWarp + lane < routing.experts ? expf(logit[i] - peak) : 0.0f;
      sum += score[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) score[i] /= sum;
  }
  unsigned key[SLOTS];
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) {
    const int expert = i * kWarp + lane;
    key[i] = 0;
    if (expert < routing.experts) key[i] = ordered_key(bias_E == nullptr ? score[i] : score[i] + bias_E[expert]);
  }
  id = 0;
  weight = 0.0f;
#pragma unroll 1
  for (int k = 0; k < routing.top_k; ++k) {
    unsigned best = 0, best_expert = ~0u;
    float best_score = 0.0f;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      if (key[i] > best) {
        best = key[i];
        best_expert = i * kWarp + lane;
        best_score = score[i];
      }
    }
    const unsigned top = __reduce_max_sync(kFullWarp, best);
    const unsigned chosen = __reduce_min_sync(kFullWarp, best == top ? best_expert : ~0u);
    const float chosen_score = __shfl_sync(kFullWarp, best_score, chosen % kWarp);
    if (lane == k) {
      id = static_cast<int>(chosen);
      weight = chosen_score;
    }
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      if (i * kWarp + lane == static_cast<int>(chosen)) key[i] = 0;
    }
  }
  if (routing.normalize) weight /= warp_sum(weight) + 1e-20f;
  weight *= routing.scale;
}

}  // namespace flex
