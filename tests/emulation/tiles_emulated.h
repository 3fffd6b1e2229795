// The tile operations of csrc/cpu/tiles.h in plain C++, so that the AMX kernels run on any AVX-512 processor.
//
// Follows the Intel SDM: the configuration's rows and bytes a row are honoured, what a load or product leaves outside
// them is zero, and TDPBF16PS takes denormals as zero, sums the even and the odd products apart by fused multiply-adds
// and rounds to nearest. What the processor answers with a fault ends the process.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {
namespace tiles {

struct Register {
  alignas(64) uint8_t bytes[kRows][kBytesARow];
};

struct State {
  bool configured = false;
  Configuration configuration;
  Register registers[8];
};

inline State& state() {
  static thread_local State held;
  return held;
}

[[noreturn]] inline void fault(const char* why) {
  std::fprintf(stderr, "emulated tiles: %s\n", why);
  std::abort();
}

inline int rows_of(int r) {
  if (!state().configured) fault("no configuration on this thread");
  return state().configuration.rows[r];
}
inline int bytes_of(int r) { return state().configuration.bytes_a_row[r]; }

inline void configure(const Configuration& configuration) {
  if (configuration.palette != 1 || configuration.start_row != 0) fault("unknown palette or start row");
  for (int r = 0; r < 16; ++r) {
    const int rows = configuration.rows[r], bytes = configuration.bytes_a_row[r];
    if (rows > kRows || bytes > kBytesARow || (rows == 0) != (bytes == 0) || (r > 7 && rows))
      fault("a tile of impossible size");
  }
  state().configuration = configuration;
  state().configured = true;
  std::memset(state().registers, 0, sizeof(state().registers));
}

inline void release() { state() = State(); }

template <int R>
void zero() {
  rows_of(R);
  std::memset(&state().registers[R], 0, sizeof(Register));
}

template <int R>
void load(const void* from, int64_t stride) {
  const int rows = rows_of(R);
  zero<R>();
  for (int row = 0; row < rows; ++row)
    std::memcpy(state().registers[R].bytes[row], static_cast<const char*>(from) + row * stride, bytes_of(R));
}

template <int R>
void store(void* to, int64_t stride) {
  const int rows = rows_of(R);
  for (int row = 0; row < rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, state().registers[R].bytes[row], bytes_of(R));
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float without_denormals(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return as_float(bits & 0x7f800000u ? bits : bits & 0x80000000u);
}

template <int C, int A, int B>
void multiply_add() {
  static_assert(C != A && C != B && A != B, "TDPBF16PS wants three different tiles");
  const int rows = rows_of(C), columns = bytes_of(C) / 4, pairs = bytes_of(A) / 4;
  if (rows_of(A) != rows || bytes_of(B) != bytes_of(C) || rows_of(B) != pairs) fault("tiles that do not fit");
  for (int m = 0; m < rows; ++m) {
    float even[16] = {}, odd[16] = {}, sums[16];
    for (int p = 0; p < pairs; ++p) {
      uint32_t a, b[16];
      std::memcpy(&a, state().registers[A].bytes[m] + 4 * p, 4);
      std::memcpy(b, state().registers[B].bytes[p], sizeof(b));
      const float a_even = without_denormals(as_float(a << 16));
      const float a_odd = without_denormals(as_float(a & 0xffff0000u));
      for (int n = 0; n < columns; ++n) {
        const float b_even = without_denormals(as_float(b[n] << 16));
        const float b_odd = without_denormals(as_float(b[n] & 0xffff0000u));
        even[n] = without_denormals(__builtin_fmaf(a_even, b_even, even[n]));
        odd[n] = without_denormals(__builtin_fmaf(a_odd, b_odd, odd[n]));
      }
    }
    std::memcpy(sums, state().registers[C].bytes[m], sizeof(sums));
    for (int n = 0; n < columns; ++n)
      sums[n] = without_denormals(without_denormals(sums[n]) + without_denormals(even[n] + odd[n]));
    std::memset(state().registers[C].bytes[m], 0, kBytesARow);
    std::memcpy(state().registers[C].bytes[m], sums, 4 * columns);
  }
}

}  // namespace tiles
}  // namespace
