// The C interface between the CUDA kernels and Python: raw pointers, sizes, device ordinal and stream.
//
// Letters: T tokens, H hidden, E routed experts, K chosen, N = T*K slots, G sigmoid gates, R rows of the thin product.
// Every launcher enqueues work on `stream` of device `device` and returns without waiting: 0, or the cudaError_t that
// stopped it. No launcher allocates memory or reads device memory, so all of them can be captured in a CUDA graph.
// Pointers are device pointers; a nullptr is accepted only where it says "or nullptr".
#pragma once

#include <cstdint>

namespace flex {

// Codes of the element types, the same as in flex_kernels/cuda/ops.py.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int kMaxExperts = 512;
constexpr int kMaxTopK = 32;

// Most rows of the scratch of launch_permute, on any device.
constexpr int kMaxPermuteChunks = 256;

struct Routing {
  int experts;      // E <= kMaxExperts
  int top_k;        // K <= min(E, kMaxTopK); 0 computes the gates alone
  int gates;        // G
  bool normalize;   // divide the chosen scores by their sum + 1e-20
  bool sigmoid;     // sigmoid of each logit, else softmax over all experts
  float scale;      // applied last
};

struct RoutingOutput {
  int32_t* ids_TK;
  float* weights_TK;
  float* gates_GT;
  float* logits_TE;      // or nullptr
  int32_t* histogram_E;  // or nullptr; incremented, so the caller zeroes it
};

// Columns of logits_TR: `parts` blocks of E, then `gate_parts` blocks of G. Block j counts with weight part_scale^j
// (see launch_split_rows); a plain product has one part of each.
struct Logits {
  const float* logits_TR;
  int64_t stride;  // elements between rows, at least parts * E + gate_parts * G
  int parts;
  int gate_parts;
  float part_scale;
};

int launch_route(int device, void* stream, Logits logits, const float* bias_E, const float* gate_bias_G, int64_t tokens,
                 Routing routing, RoutingOutput output);

// x_TH in x_dtype; weight_EH in x_dtype or float32; gate_weight_GH float32. All contiguous and aligned to 16 bytes, and
// hidden a multiple of 16 / sizeof(x); else cudaErrorInvalidValue.
int launch_route_fused(int device, void* stream, const void* x_TH, int x_dtype, const void* weight_EH, int weight_dtype,
                       const float* bias_E, const float* gate_weight_GH, const float* gate_bias_G, int64_t tokens,
                       int hidden, Routing routing, RoutingOutput output);

// Writes rows_RH in the 16-bit `dtype`: the router's rows (one part if weight_dtype == dtype, three if it is float32),
// three parts of the gates' float32 rows, zeros up to `rows`. w = sum_j part_j * part_scale^j.
int launch_split_rows(int device, void* stream, const void* weight_EH, int weight_dtype, const float* gate_weight_GH,
                      void* rows_RH, int dtype, int experts, int gates, int hidden, int rows, float part_scale);

struct Permutation {
  int32_t* offsets_E1;
  int32_t* order_N;
  int32_t* inverse_N;
  int32_t* tile_expert;  // or nullptr, [tile_bound]; -1 past the last tile
  int32_t* tile_row;     // [tile_bound], where tile_expert is given
  int32_t* tile_count;   // [1], where tile_expert is given
  int tile_bound;        // at least the number of tiles: N / block_rows + min(E, N)
  int block_rows;
};

// Rows of the scratch counts [chunks, E + 1] that launch_permute needs; 0 when it needs none. Host arithmetic only.
int permute_chunks(int64_t slots);

int launch_permute(int device, void* stream, const int32_t* ids_N, int64_t slots, int experts, int32_t* counts_CE1,
                   Permutation permutation);

struct Combination {
  const void* rows_NH;           // read at inverse_N[t * K + k]
  const int32_t* inverse_N;      // negative: the slot is skipped
  const float* weights_TK;       // or nullptr: ones
  const void* personal_TH;       // or nullptr: none
  const float* gate_T;           // or nullptr: ones
  const void* shared_TH;         // or nullptr: none
  const float* shared_gate_T;    // or nullptr: ones
  void* y_TH;
  int64_t tokens;
  int hidden;
  int top_k;
  bool convex;
};

int launch_combine(int device, void* stream, Combination combination, int dtype);

const char* error_string(int code);

// 0 and the number of devices, or the error code that the CUDA runtime answers.
int device_count(int* count);

}  // namespace flex
