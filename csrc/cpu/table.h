// The table of segments that the fused kernels take, laid out from what the segments of a block share.
#pragma once

#include "cpu/kernels.h"

namespace flex {

// A stack of one weight of several experts: addresses, and bytes between experts; the rest as in Segment.
struct Stack {
  int64_t address, step, ld;
  int64_t scales, scales_step, scales_ld;
  int64_t kind;

  int64_t of(int64_t expert) const { return address + expert * step; }
  int64_t scales_of(int64_t expert) const { return scales ? scales + expert * scales_step : 0; }
};

// A buffer with a stretch for every row; an address of 0 for none.
struct Rows {
  int64_t address, step;

  int64_t of(int64_t row) const { return address ? address + row * step : 0; }
};

// What the segments of one block share. All words are int64, so that Python can lay out an array of them.
struct SegmentBlock {
  Stack gate_up, down;
  int64_t width;
  Rows tokens, scale, preact, dscale;  // of the block's rows
  Rows hidden, scaled;                 // of the elements that Piece::at counts
  Rows codes[2], code_scales[2];       // of a batch's rows, for x (dz) and for dy; none: not multiplied in int8
  int64_t inverses, inverse_count;     // address, and floats that a segment takes
};

// Rows [row, row + rows) of a block, which `expert` serves.
struct Piece {
  int64_t block, expert, row, rows, at;
};

// The segments of the pieces of one batch, in order.
void lay_out_segments(const SegmentBlock* blocks, const Piece* pieces, int64_t count, Segment* out);

}  // namespace flex
