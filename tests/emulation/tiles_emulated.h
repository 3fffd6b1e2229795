// The tile operations of csrc/cpu/tiles.h on the unit of tile_unit.h, so that the AMX kernels run on any AVX-512
// processor.
#pragma once

#include "tile_unit.h"

namespace {
namespace tiles {

inline Unit& unit() {
  static thread_local Unit held;
  return held;
}

inline void configure(const Configuration& configuration) { unit().configure(configuration); }
inline void release() { unit().release(); }

template <int R>
void zero() { unit().zero(R); }

template <int R>
void load(const void* from, int64_t stride) { unit().load(R, from, stride); }

template <int R>
void store(void* to, int64_t stride) { unit().store(R, to, stride); }

template <int C, int A, int B>
void multiply_add() { unit().multiply_add(C, A, B); }

template <int C, int A, int B>
void multiply_add_codes() { unit().multiply_add_codes(C, A, B); }

}  // namespace tiles
}  // namespace
