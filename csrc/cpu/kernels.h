// The CPU kernels as seen by the bindings: one table of functions for each instruction set.
//
// Letters: T tokens, H hidden, E routed experts, K chosen, I expert width, n rows of one segment.
// All matrices are row-major; a leading dimension (ld) counts elements between rows. No function throws.
#pragma once

#include <cstdint>

namespace flex {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How a weight is stored: in x's dtype, or as the codes of flex_kernels/quantize.py.
enum WeightKind : int { kStored = 0, kInt8 = 1, kNf4 = 2 };

constexpr int64_t kGroupColumns = 64;  // columns that share an NF4 scale
constexpr float kNf4Levels[16] = {-1.0f,       -0.6953125f, -0.5234375f, -0.39453125f, -0.28515625f, -0.1845703125f,
                                  -0.0908203125f, 0.0f,     0.07958984375f, 0.1611328125f, 0.24609375f, 0.337890625f,
                                  0.44140625f, 0.5625f,     0.72265625f, 1.0f};

// One expert and the rows it serves: y[tokens[n]] += scale[n] * E(x[tokens[n]]). All words are int64 (table.h lays
// them out). Addresses that a function does not need may be 0.
struct Segment {
  int64_t gate_up;     // [2I, H] address, gate rows first
  int64_t gate_up_ld;  // elements between rows; bytes for codes
  int64_t gate_up_scales, gate_up_scales_ld;  // bfloat16 address and elements between rows, of codes
  int64_t gate_up_kind;                       // a WeightKind
  int64_t down;        // [H, I] address
  int64_t down_ld;
  int64_t down_scales, down_scales_ld, down_kind;
  int64_t width;       // I
  int64_t rows;        // n
  int64_t tokens;      // [n] int32 address
  int64_t scale;       // [n] float address
  int64_t hidden;      // forward: a [n, I], in any order that `down` reads; backward: dz [n, 2I]; in x's dtype
  int64_t preact;      // z [n, 2I] in x's dtype: written by the forward pass, read by the backward pass; 0 for none
  int64_t dscale;      // backward: [n] float, <da, a> of each row
  int64_t scaled;      // backward: scale * a, [n, I] in x's dtype; 0 for none
  // Room for rows rounded to int8, of a segment that may be multiplied so; 0 for none. Codes of n rows of at most H and
  // I elements (backward: H and 2I), each rounded up to kInt8Unit, and a float for every kInt8Group of them.
  int64_t codes, code_scales;
  int64_t dy_codes, dy_scales;  // backward: of n rows of H elements
  int64_t inverses;             // backward, of weights in NF4: a float for every row of either weight
};

// Geometry of the fused kernels, the same for every instruction set. A "word" is 32 bits of packed operand: one
// float32, or two neighbouring bfloat16 along the reduced dimension.
constexpr int64_t kBlockRows = 128;         // rows of a product at a time, packed in the second-level cache
constexpr int64_t kDotWords = 1024;         // words of them where weights lie contiguous along the reduced dimension
constexpr int64_t kTileWords = 128;         // and where they lie contiguous along the columns
constexpr int64_t kForwardColumns = 256;    // columns of I in a task of `up`, at most
constexpr int64_t kBackwardColumns = 128;   // in a task of up_backward
constexpr int64_t kSliceColumns = 512;      // columns of H that a task of the other two owns, at most
constexpr int64_t kPartialColumns = 64;     // columns of I in a part sum of dscale
// Segments of no more rows (of codes) are bound by the reading of weights (thin.h), and want longer stretches of them.
constexpr int64_t kThinRows = 12, kThinCodeRows = 32;
constexpr int64_t kThinColumns = 1024;      // columns in a task
constexpr int64_t kFewRows = 32;            // rows up to which reading weights outweighs multiplying
constexpr int64_t kInt8Group = 128;         // elements of a row that share a scale where it is rounded to int8
constexpr int64_t kInt8Unit = 64;           // elements of its codes come in whole units
// Room of a forward segment's hidden rows: I rounded up to this many elements a row. The last segment of a buffer is
// followed by as many more, which kernels may read.
constexpr int64_t kHiddenUnit = 32;

// Words of packed operands that one thread needs room for, with operands of `longest` elements.
inline int64_t packed_words(int64_t longest) {
  const int64_t whole = (longest + 31) / 32 * 32;
  const int64_t words = kBlockRows * (whole < kDotWords ? whole : kDotWords);
  return words < kBlockRows * kTileWords ? kBlockRows * kTileWords : words;
}

// Bytes of scratch that one thread needs for segments of at most `rows` rows and operands of `longest` elements;
// a weight's gradient takes as much as a segment of kBlockRows rows.
inline int64_t bytes_a_thread(int64_t longest, int64_t rows) {
  const auto rows_of = [rows](int64_t most) { return rows < most ? rows : most; };
  const int64_t thin = 3 * kThinColumns * rows_of(kThinCodeRows), wide = 2 * kForwardColumns * rows_of(kBlockRows);
  static_assert(3 * kBackwardColumns <= 2 * kForwardColumns && kSliceColumns <= 2 * kForwardColumns, "room for all");
  return 4 * (packed_words(longest) + (wide < thin ? thin : wide));
}

// Rows that x meets in a thin product: of a router, in x's dtype or float32, then of gates.
struct RouterRows {
  int router_dtype;
  const void* router;
  int64_t experts;
  const float* gate_rows;
  int64_t gates;
};

struct Kernels {
  const char* name;
  // Whether the fused functions below exist; the plain build leaves products to torch.
  bool fused;
  // Whether they multiply in int8 the segments that have room for codes; others leave that room alone.
  bool int8;

  // a[r, :] = silu(z[r, :I]) * z[r, I:]
  void (*swiglu)(int dtype, const void* z, void* a, int64_t rows, int64_t width, int threads);
  // dscale[r] = <da, a>; dz = scale * da * da/dz; scaled = scale * a unless null. dz may be z.
  void (*swiglu_backward)(int dtype, const void* z, const void* da, const float* scale, void* dz, float* dscale,
                          void* scaled, int64_t rows, int64_t width, int threads);
  // out[tokens[r], :] += scale[r] * rows[r, :], r ascending; scale null means 1.
  void (*scatter_add)(int dtype, const void* source, const int32_t* tokens, const float* scale, float* out,
                      int64_t rows, int64_t columns, int threads);

  // The products of x [T, hidden] with R = experts + gates rows, in float32; null where torch multiplies. Of d [T, R]:
  // dx = d rows, plus `other` unless null; the gradient out [count, hidden] of rows, from d's columns [0, count).
  void (*router_product)(int dtype, const void* x, int64_t tokens, int64_t hidden, const RouterRows& rows, float* out,
                         int threads);
  void (*router_input_gradient)(int dtype, const float* d, int64_t tokens, int64_t hidden, const RouterRows& rows,
                                const void* other, void* dx, int threads);
  void (*router_rows_gradient)(int dtype, const float* d, int64_t ldd, const void* x, int64_t tokens, int64_t hidden,
                               int64_t count, float* out, int threads);

  // The expert feed-forward on blocks of rows. This is the seam for kernels on other units (AMX): same tables, same
  // results. `scratch` holds `threads` pieces of scratch_bytes().
  void (*up)(int dtype, const void* x, int64_t hidden, const Segment* segments, int64_t count, void* scratch,
             int64_t scratch_bytes, int threads);
  void (*down)(int dtype, const Segment* segments, int64_t count, int64_t hidden, float* out, void* scratch,
               int64_t scratch_bytes, int threads);
  // `partial` holds, for every segment in turn, rows * ceil(I / kPartialColumns) floats.
  void (*up_backward)(int dtype, const void* x, const void* dy, int64_t hidden, const Segment* segments,
                      int64_t count, float* partial, void* scratch, int64_t scratch_bytes, int threads);
  void (*down_backward)(int dtype, const Segment* segments, int64_t count, int64_t hidden, float* dx, void* scratch,
                        int64_t scratch_bytes, int threads);
  // out [height, width] (+)= left^T right, both of `rows` rows without gaps, summed in float32 in the order of rows;
  // null where torch has the faster product.
  void (*weight_gradient)(int dtype, const void* left, const void* right, int64_t rows, int64_t height, int64_t width,
                          float* out, bool accumulate, void* scratch, int64_t scratch_bytes, int threads);
  // Scratch of these five, where it may exceed bytes_a_thread(); null where not.
  int64_t (*own_bytes_a_thread)(int64_t longest, int64_t rows);
};

const Kernels* generic_kernels();
const Kernels* avx2_kernels();    // null where this build or this processor lacks it
const Kernels* avx512_kernels();  // AVX-512 F, BW, DQ, VL, VBMI, VNNI and BF16
const Kernels* amx_kernels();     // these, AMX-TILE and AMX-BF16

// Rows of `source` [., bytes] picked by `tokens` into `out` [rows, bytes].
void gather_rows(const void* source, const int32_t* tokens, void* out, int64_t rows, int64_t bytes, int threads);

// Stable counting sort of the slots [tokens, top_k] by expert; ids outside [0, experts) take no place. Of every place:
// its slot, its token, and the weight of its slot, times closed[token] unless that is null; 0 behind the last.
void sort_rows(const int32_t* ids, const float* weights, const float* closed, int64_t tokens, int64_t top_k,
               int64_t experts, int32_t* offsets, int32_t* order, int32_t* token, float* scale);

// out [slots] = the values of the first `used` places, at the slots that `order` gives them; 0 elsewhere.
void unsort_rows(const float* values, const int32_t* order, int64_t used, int64_t slots, float* out);

// Scores of logits [tokens, ld], columns [0, experts); the top_k best by score + bias (null for none), ties to the
// lowest index. weights = scale * score, divided by the sum of the chosen when `normalize`.
// `scratch` holds `threads` rows of 2 * experts floats.
void choose(const float* logits, int64_t ld, const float* bias, int64_t tokens, int64_t experts, int64_t top_k,
            bool normalize, bool sigmoid, float scale, int32_t* ids, float* weights, float* scratch, int threads);

// The gradient of logits [tokens, ld], columns [0, experts), in their place: of what `choose` made of them, plus
// `added` [tokens, experts] unless null. `scratch` holds `threads` rows of top_k floats.
void choose_backward(float* logits, int64_t ld, const int32_t* ids, const float* grad_weights, const float* added,
                     int64_t tokens, int64_t experts, int64_t top_k, bool normalize, bool sigmoid, float scale,
                     float* scratch, int threads);

// gates [count, tokens] = sigmoid(logits [tokens, ld] columns [first, first + count) + bias [count])
void open_gates(const float* logits, int64_t ld, int64_t first, const float* bias, int64_t tokens, int64_t count,
                float* gates, int threads);

// The gradient of the logits of gates [count, tokens]: out [tokens, ld], columns [0, count); and totals [count] of it.
void open_gates_backward(const float* gates, const float* grad_gates, int64_t tokens, int64_t count, float* out,
                         int64_t ld, float* totals);

}  // namespace flex
