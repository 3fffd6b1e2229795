// What products with weights share: words of packed operands, prefetching, one thread's buffers. Include vector_*.h and
// rows.h first.
#pragma once

#include "cpu/kernels.h"
#include "cpu/weights.h"
#include "cpu/words.h"

namespace {

// Columns of two vectors of words.
constexpr int kPanelColumns = 2 * W;

// Calls f(first, count) for pieces of at most `most`, shared out evenly: 13 rows go as 7 and 6, never as 12 and 1.
template <class F>
inline void evenly(int64_t count, int64_t most, F f) {
  const int64_t steps = pieces(count, most);
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t begin = count * step / steps;
    f(begin, count * (step + 1) / steps - begin);
  }
}

// Brings an area into the second-level cache, a few lines at a time between multiplications: else who reads it next
// waits for memory while nothing is multiplied, and a burst would leave memory idle after it.
class Ahead {
 public:
  // In about `slots` calls of some().
  Ahead(const Area& area, int64_t slots) : at_(area.at), step_(area.step), bytes_(area.bytes) {
    left_ = area.rows * pieces(area.bytes, 64);
    each_ = pieces(left_, slots < 1 ? 1 : slots);
  }

  // Inlined by force, as Weight::prefetch. The last call may go on a little beyond the area.
  __attribute__((always_inline)) void some() {
    if (left_ <= 0) return;
    left_ -= each_;
    for (int64_t i = each_; i > 0; --i) {
      __builtin_prefetch(at_ + offset_, 0, 2);
      if ((offset_ += 64) < bytes_) continue;
      offset_ = 0;
      at_ += step_;
    }
  }

 private:
  const char* at_;
  int64_t step_, bytes_, offset_ = 0, left_, each_;
};

// One thread's buffers, carved from its piece of the caller's scratch.
struct Workspace {
  float* a;      // packed rows
  int64_t room;  // their words at most
  float* c;      // [rows][columns of a task]

  Workspace(void* scratch, int64_t bytes, int thread, int64_t longest) {
    a = reinterpret_cast<float*>(static_cast<char*>(scratch) + bytes * thread);
    room = flex::packed_words(longest);
    c = a + room;
  }
};

}  // namespace
