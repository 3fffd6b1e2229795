// The tile operations of AMX-BF16 and AMX-INT8, one inline function each.
//
// Eight tiles of 16 rows of 64 bytes: tile C [16, 16] float32 += A [16, 32] bfloat16 times B [32, 16], where row p of
// B's tile holds rows 2p and 2p + 1 of B in pairs, column after column; or C in int32, A [16, 64] in int8 and B [64, 16]
// in unsigned bytes, four of its rows in one of the tile's. Every kernel uses whole tiles and pads its operands, so one
// configuration serves all. Registers and configuration belong to a thread.
#pragma once

#include <cstdint>

namespace {
namespace tiles {

constexpr int kRows = 16;
constexpr int kBytesARow = 64;

// The 64 bytes that LDTILECFG reads (Intel SDM, volume 1, "TILECFG"); palette 1 is the only one there is.
struct alignas(64) Configuration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_a_row[16] = {kBytesARow, kBytesARow, kBytesARow, kBytesARow,
                              kBytesARow, kBytesARow, kBytesARow, kBytesARow};
  uint8_t rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
};
static_assert(sizeof(Configuration) == 64, "LDTILECFG reads 64 bytes");

}  // namespace tiles
}  // namespace

// The tests define this to run the kernels where no such unit is: the functions below in plain C++.
#if defined(FLEX_TILES_EMULATED)
#include "tiles_emulated.h"
#else

namespace {
namespace tiles {

// Written as assembly because the register is part of the instruction, and a template argument is no literal to the
// compiler's own macros. With the operand in the constraint, no store into the configuration can be left out either
// (GCC 12 does that around _tile_loadconfig).
inline void configure(const Configuration& configuration) { asm volatile("ldtilecfg %0" : : "m"(configuration)); }
inline void release() { asm volatile("tilerelease" : : : "memory"); }

template <int R>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(R));
}

// Sixteen rows of 64 bytes, `stride` bytes apart.
template <int R>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(R) : "memory");
}

template <int R>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(R) : "memory");
}

// C += A B
template <int C, int A, int B>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// The same for signed bytes in A and unsigned ones in B.
template <int C, int A, int B>
inline void multiply_add_codes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace tiles
}  // namespace

#endif

namespace {
namespace tiles {

// Tiles configured for as long as it lives, on the thread that made it.
struct Session {
  Session() { configure(Configuration()); }
  ~Session() { release(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

}  // namespace tiles
}  // namespace
