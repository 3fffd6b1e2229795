// Runs the AMX instructions of a real binary on a processor without them: each is an invalid opcode there, and the
// handler of that signal decodes it, does its work on the unit of tile_unit.h and goes on behind it.
//
// Knows the encodings that the kernels use (Intel SDM, volume 2), three-byte VEX, 128 bits, W0, opcode map 0F 38:
// LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBF16PS, TDPBSUD. Any other invalid opcode ends the process.
#include <signal.h>
#include <ucontext.h>

#include <atomic>

#define FLEX_TILES_EMULATED
#include "cpu/tiles.h"

namespace {

std::atomic<uint64_t> trapped{0};

// Thread-local storage of the loader's own pool: its lazy allocation must not happen inside a signal handler.
__attribute__((tls_model("initial-exec"))) thread_local tiles::Unit* held = nullptr;

tiles::Unit& unit() {
  if (!held) held = new tiles::Unit;
  return *held;
}

uint64_t general(const ucontext_t* context, int number) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(context->uc_mcontext.gregs[order[number]]);
}

struct Memory {
  uint64_t base, index;
  int length;  // bytes of ModRM, SIB and displacement
};

Memory memory(const ucontext_t* context, const uint8_t* modrm, bool high_base, bool high_index, uint64_t next) {
  const int mod = modrm[0] >> 6, rm = modrm[0] & 7;
  Memory m{0, 0, 1};
  int base = rm;
  if (rm == 4) {
    const uint8_t sib = modrm[m.length++];
    const int index = (sib >> 3 & 7) + 8 * high_index;
    base = sib & 7;
    if (index != 4) m.index = general(context, index) << (sib >> 6);
  }
  const uint8_t* displacement = modrm + m.length;
  if (mod == 0 && base == 5) {
    int32_t far;
    __builtin_memcpy(&far, displacement, 4);
    m.length += 4;
    m.base = static_cast<uint64_t>(int64_t{far}) + (rm == 5 ? next + m.length : 0);
    return m;
  }
  m.base = general(context, base + 8 * high_base);
  if (mod == 1) m.base += static_cast<int8_t>(displacement[0]), m.length += 1;
  if (mod == 2) {
    int32_t far;
    __builtin_memcpy(&far, displacement, 4);
    m.base += static_cast<uint64_t>(int64_t{far}), m.length += 4;
  }
  return m;
}

// Bytes of the instruction after doing its work; 0 for one that is none of ours.
int run(const ucontext_t* context, const uint8_t* code) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84)) return 0;
  const bool high_reg = !(code[1] & 0x80), high_index = !(code[1] & 0x40), high_base = !(code[1] & 0x20);
  const int third = ~(code[2] >> 3) & 15, prefix = code[2] & 3, opcode = code[3];
  const uint8_t* modrm = code + 4;
  const bool is_register = modrm[0] >> 6 == 3;
  const int reg = modrm[0] >> 3 & 7, rm = modrm[0] & 7;
  constexpr int kNone = 0, kF3 = 2, kF2 = 3;
  if (high_reg) return 0;
  if (opcode == 0x5c && prefix == kF3 && is_register && !high_base && third < 8)
    return unit().multiply_add(reg, rm, third), 5;
  if (opcode == 0x5e && prefix == kF3 && is_register && !high_base && third < 8)
    return unit().multiply_add_codes(reg, rm, third), 5;
  if (third != 0) return 0;
  if (opcode == 0x49 && prefix == kF2 && is_register && rm == 0) return unit().zero(reg), 5;
  if (opcode == 0x49 && prefix == kNone && modrm[0] == 0xc0) return unit().release(), 5;
  if (is_register) return 0;
  const Memory m = memory(context, modrm, high_base, high_index, reinterpret_cast<uint64_t>(modrm));
  if (opcode == 0x49 && prefix == kNone && reg == 0) {
    tiles::Configuration configuration;
    __builtin_memcpy(&configuration, reinterpret_cast<const void*>(m.base + m.index), sizeof(configuration));
    return unit().configure(configuration), 4 + m.length;
  }
  if (opcode != 0x4b || rm != 4) return 0;
  const auto stride = static_cast<int64_t>(m.index);
  if (prefix == kF2) return unit().load(reg, reinterpret_cast<const void*>(m.base), stride), 4 + m.length;
  if (prefix == kF3) return unit().store(reg, reinterpret_cast<void*>(m.base), stride), 4 + m.length;
  return 0;
}

void handle(int, siginfo_t*, void* state) {
  auto* context = static_cast<ucontext_t*>(state);
  auto& next = context->uc_mcontext.gregs[REG_RIP];
  const int length = run(context, reinterpret_cast<const uint8_t*>(next));
  if (!length) {
    signal(SIGILL, SIG_DFL);
    return;
  }
  next += length;
  ++trapped;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int trap_tiles() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr);
}

extern "C" __attribute__((visibility("default"))) uint64_t tiles_trapped() { return trapped; }
