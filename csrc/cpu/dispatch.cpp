#include "cpu/dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace flex {

#if defined(__x86_64__)

extern const Kernels avx2_table;
extern const Kernels avx512_table;
extern const Kernels amx_table;

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
  if ((b & needed) != needed || !(c & bit_AVX512VBMI) || !(c & bit_AVX512VNNI)) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBF16);
}

// The tests define this to run the AMX kernels where the unit is emulated.
#if defined(FLEX_TILES_ASSUMED)
bool has_amx() { return has_avx512(); }
#else
// Linux gives a process the 8 KB of tile state only when asked; the first tile instruction is SIGILL otherwise. The
// answer holds for all threads. No other system is known to grant it.
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  constexpr uint32_t kAmxBF16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  constexpr uint32_t kAll = kAmxBF16 | kAmxTile | kAmxInt8;
  constexpr uint64_t kTileStates = uint64_t{3} << 17;
  uint32_t a, b, c, d;
  if (!has_avx512() || (saved_states() & kTileStates) != kTileStates) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  static const bool granted = tiles_granted();
  return granted;
}
#endif

}  // namespace

const Kernels* avx2_kernels() { return has_avx2() ? &avx2_table : nullptr; }
const Kernels* avx512_kernels() { return has_avx512() ? &avx512_table : nullptr; }
const Kernels* amx_kernels() { return has_amx() ? &amx_table : nullptr; }

#else

const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }
const Kernels* amx_kernels() { return nullptr; }

#endif

namespace {

const Kernels* best() {
  if (const Kernels* k = amx_kernels()) return k;
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
  if (!std::strcmp(name, "amx")) wanted = amx_kernels();
  if (wanted) current().store(wanted);
  return wanted != nullptr;
}

}  // namespace flex
