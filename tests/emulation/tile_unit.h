// The tile unit of AMX in plain C++: eight registers and a configuration a thread.
//
// Follows the Intel SDM: the configuration's rows and bytes a row are honoured, what a load or product leaves outside
// them is zero, and TDPBF16PS takes denormals as zero, sums the even and the odd products apart by fused multiply-adds
// and rounds to nearest; TDPBSUD adds integers modulo 2^32. What the processor answers with a fault ends the process.
// Include cpu/tiles.h first.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {
namespace tiles {

struct Register {
  alignas(64) uint8_t bytes[kRows][kBytesARow];
};

class Unit {
 public:
  void configure(const Configuration& configuration) {
    if (configuration.palette != 1 || configuration.start_row != 0) fault("unknown palette or start row");
    for (int r = 0; r < 16; ++r) {
      const int rows = configuration.rows[r], bytes = configuration.bytes_a_row[r];
      if (rows > kRows || bytes > kBytesARow || (rows == 0) != (bytes == 0) || (r > 7 && rows))
        fault("a tile of impossible size");
    }
    configuration_ = configuration;
    configured_ = true;
    std::memset(registers_, 0, sizeof(registers_));
  }

  void release() {
    configured_ = false;
    std::memset(registers_, 0, sizeof(registers_));
  }

  void zero(int r) {
    rows_of(r);
    std::memset(&registers_[r], 0, sizeof(Register));
  }

  void load(int r, const void* from, int64_t stride) {
    const int rows = rows_of(r);
    zero(r);
    for (int row = 0; row < rows; ++row)
      std::memcpy(registers_[r].bytes[row], static_cast<const char*>(from) + row * stride, bytes_of(r));
  }

  void store(int r, void* to, int64_t stride) const {
    const int rows = rows_of(r);
    for (int row = 0; row < rows; ++row)
      std::memcpy(static_cast<char*>(to) + row * stride, registers_[r].bytes[row], bytes_of(r));
  }

  void multiply_add(int c, int a, int b) {
    const int rows = rows_of(c), columns = bytes_of(c) / 4, pairs = bytes_of(a) / 4;
    check_product(c, a, b);
    for (int m = 0; m < rows; ++m) {
      float even[16] = {}, odd[16] = {}, sums[16];
      for (int p = 0; p < pairs; ++p) {
        uint32_t x, y[16];
        std::memcpy(&x, registers_[a].bytes[m] + 4 * p, 4);
        std::memcpy(y, registers_[b].bytes[p], sizeof(y));
        const float x_even = normal(as_float(x << 16)), x_odd = normal(as_float(x & 0xffff0000u));
        for (int n = 0; n < columns; ++n) {
          even[n] = normal(__builtin_fmaf(x_even, normal(as_float(y[n] << 16)), even[n]));
          odd[n] = normal(__builtin_fmaf(x_odd, normal(as_float(y[n] & 0xffff0000u)), odd[n]));
        }
      }
      std::memcpy(sums, registers_[c].bytes[m], sizeof(sums));
      for (int n = 0; n < columns; ++n) sums[n] = normal(normal(sums[n]) + normal(even[n] + odd[n]));
      std::memset(registers_[c].bytes[m], 0, kBytesARow);
      std::memcpy(registers_[c].bytes[m], sums, 4 * columns);
    }
  }

  // TDPBSUD: signed bytes of a, unsigned ones of b.
  void multiply_add_codes(int c, int a, int b) {
    const int rows = rows_of(c), columns = bytes_of(c) / 4, quads = bytes_of(a) / 4;
    check_product(c, a, b);
    for (int m = 0; m < rows; ++m) {
      uint32_t sums[16];
      std::memcpy(sums, registers_[c].bytes[m], sizeof(sums));
      for (int q = 0; q < quads; ++q)
        for (int n = 0; n < columns; ++n)
          for (int i = 0; i < 4; ++i)
            sums[n] += static_cast<uint32_t>(static_cast<int8_t>(registers_[a].bytes[m][4 * q + i]) *
                                             int{registers_[b].bytes[q][4 * n + i]});
      std::memset(registers_[c].bytes[m], 0, kBytesARow);
      std::memcpy(registers_[c].bytes[m], sums, 4 * columns);
    }
  }

 private:
  void check_product(int c, int a, int b) const {
    if (c == a || c == b || a == b) fault("a product wants three different tiles");
    if (rows_of(a) != rows_of(c) || bytes_of(b) != bytes_of(c) || 4 * rows_of(b) != bytes_of(a))
      fault("tiles that do not fit");
  }

  [[noreturn]] static void fault(const char* why) {
    std::fprintf(stderr, "emulated tiles: %s\n", why);
    std::abort();
  }

  int rows_of(int r) const {
    if (!configured_) fault("no configuration on this thread");
    return configuration_.rows[r];
  }
  int bytes_of(int r) const { return configuration_.bytes_a_row[r]; }

  static float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  // Denormals as zero, with their sign.
  static float normal(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return as_float(bits & 0x7f800000u ? bits : bits & 0x80000000u);
  }

  bool configured_ = false;
  Configuration configuration_;
  Register registers_[8];
};

}  // namespace tiles
}  // namespace
