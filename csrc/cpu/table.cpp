#include "cpu/table.h"

namespace flex {

void lay_out_segments(const SegmentBlock* blocks, const Piece* pieces, int64_t count, Segment* out) {
  int64_t row = 0, inverse = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Piece& piece = pieces[i];
    const SegmentBlock& block = blocks[piece.block];
    const Stack &gate_up = block.gate_up, &down = block.down;
    Segment& s = out[i];
    s.gate_up = gate_up.of(piece.expert);
    s.gate_up_ld = gate_up.ld;
    s.gate_up_scales = gate_up.scales_of(piece.expert);
    s.gate_up_scales_ld = gate_up.scales_ld;
    s.gate_up_kind = gate_up.kind;
    s.down = down.of(piece.expert);
    s.down_ld = down.ld;
    s.down_scales = down.scales_of(piece.expert);
    s.down_scales_ld = down.scales_ld;
    s.down_kind = down.kind;
    s.width = block.width;
    s.rows = piece.rows;
    s.tokens = block.tokens.of(piece.row);
    s.scale = block.scale.of(piece.row);
    s.hidden = block.hidden.of(piece.at);
    s.preact = block.preact.of(piece.row);
    s.dscale = block.dscale.of(piece.row);
    s.scaled = block.scaled.of(piece.at);
    s.codes = block.codes[0].of(row);
    s.code_scales = block.code_scales[0].of(row);
    s.dy_codes = block.codes[1].of(row);
    s.dy_scales = block.code_scales[1].of(row);
    s.inverses = block.inverse_count ? block.inverses + inverse * static_cast<int64_t>(sizeof(float)) : 0;
    row += piece.rows;
    inverse += block.inverse_count;
  }
}

}  // namespace flex
