#include "cpu/dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace flex {

#if defined(__x86_64__)

extern const Kernels avx2_table;
extern const Kernels avx512_table;

namespace {

// The register states that the operating system saves: without them the instructions fault whatever CPUID says.
uint64_t saved_states() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return static_cast<uint64_t>(d) << 32 | a;
}

bool has_avx2() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_FMA) || !(c & bit_F16C)) return false;
  return (saved_states() & 0x6) == 0x6 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}

bool has_avx512() {
  uint32_t a, b, c, d;
  if (!has_avx2() || (saved_states() & 0xe6) != 0xe6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const uint32_t needed = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  constexpr uint32_t kBF16 = 1u << 5;
  return (b & needed) == needed && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBF16);
}

}  // namespace

const Kernels* avx2_kernels() { return has_avx2() ? &avx2_table : nullptr; }
const Kernels* avx512_kernels() { return has_avx512() ? &avx512_table : nullptr; }

#else

const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }

#endif

namespace {

const Kernels* best() {
  if (const Kernels* k = avx512_kernels()) return k;
  if (const Kernels* k = avx2_kernels()) return k;
  return generic_kernels();
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{best()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *current().load(); }

bool use_kernels(const char* name) {
  const Kernels* wanted = nullptr;
  if (!std::strcmp(name, "auto")) wanted = best();
  if (!std::strcmp(name, "generic")) wanted = generic_kernels();
  if (!std::strcmp(name, "avx2")) wanted = avx2_kernels();
  if (!std::strcmp(name, "avx512")) wanted = avx512_kernels();
  if (wanted) current().store(wanted);
  return wanted != nullptr;
}

}  // namespace flex
