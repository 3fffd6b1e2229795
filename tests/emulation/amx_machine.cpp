// The AMX kernels on a whole machine: what Linux must do for tiles (permission, saving, restoring), and the results of
// the table `amx` against sums in double precision. Statically linked, it can be the only process of a machine
// (scripts/amx_bochs); linked with trapped_tiles.cpp it runs its second part on a processor without tiles. The lines
// "bits ..." are digests of every result, to be compared between the two.
//
// Letters: T tokens, H hidden, I expert width, n rows of one segment.
#include <cpuid.h>
#include <signal.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"

extern "C" __attribute__((weak)) int trap_tiles();

namespace {

using flex::Kernels;
using flex::Segment;
using Bytes = std::vector<unsigned char>;
using Numbers = std::vector<double>;

int failed = 0, checks = 0;

void check(bool right, const char* what) {
  ++checks;
  failed += !right;
  std::printf("%s: %s\n", right ? "ok" : "FAILED", what);
}

// Memory of its own pages, never touched before, that ends where a page ends: one byte too many faults.
class Pages {
 public:
  explicit Pages(int64_t bytes) : bytes_(bytes), mapped_((bytes + 2 * kPage - 1) / kPage * kPage) {
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - kPage, kPage, PROT_NONE)) std::abort();
  }
  explicit Pages(const Bytes& content) : Pages(content.size()) { std::memcpy(at<char>(), content.data(), bytes_); }
  ~Pages() { if (base_) munmap(base_, mapped_); }
  Pages(Pages&& other) : bytes_(other.bytes_), mapped_(other.mapped_), base_(other.base_) { other.base_ = nullptr; }

  template <class T>
  T* at() const { return reinterpret_cast<T*>(base_ + mapped_ - kPage - bytes_); }
  int64_t word() const { return reinterpret_cast<int64_t>(at<char>()); }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kPage = 4096;
  int64_t bytes_, mapped_;
  char* base_;
};

uint32_t state = 1;

// Uniform in [-1, 1), the same on every machine.
float number() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
}

uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

Numbers widened(const uint16_t* from, int64_t count) {
  Numbers out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = widen(from[i]);
  return out;
}

void put(Bytes& out, uint16_t value) { out.push_back(value & 0xff), out.push_back(value >> 8); }

Bytes bfloat16s(int64_t count) {
  Bytes out;
  for (int64_t i = 0; i < count; ++i) put(out, narrow(number()));
  return out;
}

// A matrix [rows, columns] of numbers of the size 1 / sqrt(columns), as the kernels read it and as it is.
struct Matrix {
  int64_t kind, ld, scales_ld;
  Numbers values;
  Pages stored, scales;

  static Matrix random(int64_t rows, int64_t columns, int64_t kind) {
    const float size = 1.0f / std::sqrt(static_cast<float>(columns));
    const int64_t groups = kind == flex::kNf4 ? (columns + flex::kGroupColumns - 1) / flex::kGroupColumns : 1;
    const int64_t ld = kind == flex::kNf4 ? (columns + 1) / 2 : columns;
    Bytes stored(kind == flex::kStored ? 0 : rows * ld), scales;
    Numbers values(rows * columns);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<float> scale(groups);
      for (float& s : scale) {
        s = widen(narrow((1.5f + 0.5f * number()) * (kind == flex::kInt8 ? size / 127.0f : size)));
        put(scales, narrow(s));
      }
      for (int64_t c = 0; c < columns; ++c) {
        float value = size * number();
        if (kind == flex::kStored) put(stored, narrow(value));
        if (kind == flex::kInt8) {
          const int code = static_cast<int>(127.0f * number());
          stored[r * ld + c] = static_cast<unsigned char>(code);
          value = static_cast<float>(code) * scale[0];
        }
        if (kind == flex::kNf4) {
          const int code = static_cast<int>(8.0f + 8.0f * number());
          stored[r * ld + c / 2] |= static_cast<unsigned char>(code << (c % 2 * 4));
          value = flex::kNf4Levels[code] * scale[c / flex::kGroupColumns];
        }
        values[r * columns + c] = widen(narrow(value));
      }
    }
    return {kind, ld, groups, values, Pages(stored), Pages(scales)};
  }
};

struct Shape {
  std::vector<int64_t> rows;  // of every segment
  int64_t H, I;
  int64_t gate_up_kind, down_kind;
  bool int8_products = false;  // the other operands are rounded to int8 too
};

// What the four fused functions of a table give for one shape, backward with z as kept and with z computed again.
struct Results {
  Numbers z, y, dscale, dz, scaled, dx, dz_again, dx_again;
  uint64_t digest = 14695981039346656037u;

  void add(const Pages& pages) {
    for (int64_t i = 0; i < pages.bytes(); ++i) digest = (digest ^ pages.at<uint8_t>()[i]) * 1099511628211u;
  }
};

// One problem: its operands, and its results in double precision.
class Problem {
 public:
  explicit Problem(const Shape& shape) : s_(shape), T_(5) {
    for (int64_t n : s_.rows) T_ = n + 5 > T_ ? n + 5 : T_;
    T_ |= 1;  // no multiple of the step between tokens
    x_.reset(new Pages(bfloat16s(T_ * s_.H)));
    dy_.reset(new Pages(bfloat16s(T_ * s_.H)));
    for (size_t e = 0; e < s_.rows.size(); ++e) {
      const int64_t n = s_.rows[e];
      gate_up_.push_back(Matrix::random(2 * s_.I, s_.H, s_.gate_up_kind));
      down_.push_back(Matrix::random(s_.H, s_.I, s_.down_kind));
      tokens_.emplace_back(new Pages(4 * n));
      scale_.emplace_back(new Pages(4 * n));
      for (int64_t r = 0; r < n; ++r) {
        tokens_[e]->at<int32_t>()[r] = static_cast<int32_t>((2 * r + static_cast<int64_t>(e)) % T_);
        scale_[e]->at<float>()[r] = 1.0f + 0.5f * number();
      }
    }
    solve();
  }

  Results run(const Kernels& k, int threads) const {
    const auto count = static_cast<int64_t>(s_.rows.size()), H = s_.H, I = s_.I, room = (I + 31) / 32 * 32;
    int64_t total = 0, most = 0;
    for (int64_t n : s_.rows) total += n, most = n > most ? n : most;
    // Fresh for every call: the first touch of each page is a fault, in the middle of a tile too.
    Pages hidden(2 * (total * room + flex::kHiddenUnit)), z(4 * total * I), dz(4 * total * I), scaled(2 * total * I);
    Pages dscale(4 * total), y(4 * T_ * H), dx(4 * T_ * H), partial(4 * total * ((I + 63) / 64));
    // Rows rounded to int8, of at most H or 2I elements, and what NF4 is multiplied with then: a float for every row.
    const int64_t widest = H > 2 * I ? H : 2 * I, kept_rows = s_.int8_products ? total : 0;
    const int64_t ld = (widest + flex::kInt8Unit - 1) / flex::kInt8Unit * flex::kInt8Unit;
    const int64_t groups = (widest + flex::kInt8Group - 1) / flex::kInt8Group;
    Pages codes(kept_rows * ld), code_scales(4 * kept_rows * groups), dy_codes(kept_rows * ld);
    Pages dy_scales(4 * kept_rows * groups), inverses(s_.int8_products ? 4 * count * widest : 0);
    std::vector<Segment> forward(count), backward(count);
    for (int64_t e = 0, at = 0; e < count; at += s_.rows[e++]) {
      const Matrix &up = gate_up_[e], &down = down_[e];
      const int64_t z_at = z.word() + 4 * at * I;
      forward[e] = {up.stored.word(), up.ld, up.scales.word(), up.scales_ld, up.kind, down.stored.word(), down.ld,
                    down.scales.word(), down.scales_ld, down.kind, I, s_.rows[e], tokens_[e]->word(),
                    scale_[e]->word(), hidden.word() + 2 * at * room, z_at, 0, 0, 0, 0, 0, 0, 0};
      if (s_.int8_products) {
        forward[e].codes = codes.word() + at * ld;
        forward[e].code_scales = code_scales.word() + 4 * at * groups;
        forward[e].dy_codes = dy_codes.word() + at * ld;
        forward[e].dy_scales = dy_scales.word() + 4 * at * groups;
        forward[e].inverses = inverses.word() + 4 * e * widest;
      }
      backward[e] = forward[e];
      backward[e].hidden = dz.word() + 4 * at * I;
      backward[e].dscale = dscale.word() + 4 * at;
      backward[e].scaled = scaled.word() + 2 * at * I;
    }
    const int64_t longest = H > 2 * I ? H : 2 * I, usual = flex::bytes_a_thread(longest, most);
    const int64_t own = k.own_bytes_a_thread ? k.own_bytes_a_thread(longest, most) : 0;
    const int64_t bytes = own < usual ? usual : own;
    Pages scratch(bytes * threads);
    Results found;
    k.up(flex::kBFloat16, x_->at<void>(), H, forward.data(), count, scratch.at<void>(), bytes, threads);
    k.down(flex::kBFloat16, forward.data(), count, H, y.at<float>(), scratch.at<void>(), bytes, threads);
    for (bool kept : {true, false}) {
      std::memset(dx.at<char>(), 0, dx.bytes());
      for (Segment& s : backward)
        if (!kept) s.preact = 0;
      k.up_backward(flex::kBFloat16, x_->at<void>(), dy_->at<void>(), H, backward.data(), count, partial.at<float>(),
                    scratch.at<void>(), bytes, threads);
      k.down_backward(flex::kBFloat16, backward.data(), count, H, dx.at<float>(), scratch.at<void>(), bytes, threads);
      (kept ? found.dz : found.dz_again) = widened(dz.at<uint16_t>(), 2 * total * I);
      (kept ? found.dx : found.dx_again).assign(dx.at<float>(), dx.at<float>() + T_ * H);
      for (const Pages* p : {&z, &y, &dscale, &dz, &scaled, &dx}) found.add(*p);
    }
    found.z = widened(z.at<uint16_t>(), 2 * total * I);
    found.scaled = widened(scaled.at<uint16_t>(), total * I);
    found.y.assign(y.at<float>(), y.at<float>() + T_ * H);
    found.dscale.assign(dscale.at<float>(), dscale.at<float>() + total);
    return found;
  }

  // The largest |got - want| / |want| over all results, as norms.
  double error(const Results& got) const {
    double worst = 0.0;
    const auto compare = [&worst](const Numbers& a, const Numbers& b) {
      double difference = 0.0, size = 1e-300;
      for (size_t i = 0; i < b.size(); ++i) difference += (a[i] - b[i]) * (a[i] - b[i]), size += b[i] * b[i];
      const double error = std::sqrt(difference / size);
      worst = error <= worst ? worst : error;
    };
    compare(got.z, want_.z), compare(got.y, want_.y), compare(got.dscale, want_.dscale), compare(got.dz, want_.dz);
    compare(got.scaled, want_.scaled), compare(got.dx, want_.dx);
    compare(got.dz_again, want_.dz), compare(got.dx_again, want_.dx);
    return worst;
  }

 private:
  void solve() {
    const int64_t H = s_.H, I = s_.I;
    want_.y.assign(T_ * H, 0.0), want_.dx.assign(T_ * H, 0.0);
    for (size_t e = 0; e < s_.rows.size(); ++e)
      for (int64_t r = 0; r < s_.rows[e]; ++r) {
        const int64_t t = tokens_[e]->at<int32_t>()[r];
        const double scale = scale_[e]->at<float>()[r];
        const Numbers x = widened(x_->at<uint16_t>() + t * H, H), dy = widened(dy_->at<uint16_t>() + t * H, H);
        Numbers z(2 * I), a(I), da(I), dz(2 * I);
        for (int64_t i = 0; i < 2 * I; ++i)
          for (int64_t h = 0; h < H; ++h) z[i] += gate_up_[e].values[i * H + h] * x[h];
        for (int64_t h = 0; h < H; ++h)
          for (int64_t i = 0; i < I; ++i) da[i] += down_[e].values[h * I + i] * dy[h];
        double dscale = 0.0;
        for (int64_t i = 0; i < I; ++i) {
          const double g = z[i], u = z[I + i], sigmoid = 1.0 / (1.0 + std::exp(-g));
          a[i] = g * sigmoid * u;
          dscale += a[i] * da[i];
          dz[i] = scale * da[i] * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
          dz[I + i] = scale * da[i] * g * sigmoid;
          want_.scaled.push_back(scale * a[i]);
        }
        for (int64_t h = 0; h < H; ++h)
          for (int64_t i = 0; i < I; ++i) want_.y[t * H + h] += scale * down_[e].values[h * I + i] * a[i];
        for (int64_t i = 0; i < 2 * I; ++i)
          for (int64_t h = 0; h < H; ++h) want_.dx[t * H + h] += gate_up_[e].values[i * H + h] * dz[i];
        want_.z.insert(want_.z.end(), z.begin(), z.end());
        want_.dz.insert(want_.dz.end(), dz.begin(), dz.end());
        want_.dscale.push_back(dscale);
      }
  }

  Shape s_;
  int64_t T_;
  std::unique_ptr<Pages> x_, dy_;
  std::vector<Matrix> gate_up_, down_;
  std::vector<std::unique_ptr<Pages>> tokens_, scale_;
  Results want_;
};

// The status of a child that does `work`, as of waitpid().
template <class Work>
int in_a_child(Work work) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) _exit(work());
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

bool ends_well(int status) { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }

int touch_a_tile() {
  alignas(64) static unsigned char configuration[64] = {1};
  configuration[16] = 64, configuration[48] = 16;
  __asm__ volatile("ldtilecfg %0; tilezero %%tmm0; tilerelease" : : "m"(configuration));
  return 0;
}

int amx_with_a_small_signal_stack() {
  static char stack[8192];  // SIGSTKSZ of old; a frame with tiles needs more
  stack_t small = {};
  small.ss_sp = stack, small.ss_size = sizeof(stack);
  if (sigaltstack(&small, nullptr)) return 2;
  return flex::use_kernels("amx") || !flex::use_kernels("auto") || std::strcmp(flex::kernels().name, "avx512");
}

volatile sig_atomic_t alarms = 0;

// Leaves nothing of the vector registers, nor of the tiles' registers that it may use.
void disturb(int) {
  touch_a_tile();
  __asm__ volatile("vpternlogd $255, %%zmm1, %%zmm1, %%zmm1" : : : "memory");
  __asm__ volatile("vpternlogd $255, %%zmm17, %%zmm17, %%zmm17" : : : "memory");
  alarms = alarms + 1;
}

void set_alarms(int microseconds) {
  struct sigaction action = {};
  action.sa_handler = disturb;
  action.sa_flags = SA_RESTART;
  sigaction(SIGALRM, &action, nullptr);
  const itimerval every = {{0, microseconds}, {0, microseconds}};
  setitimer(ITIMER_REAL, &every, nullptr);
}

uint64_t states_in_use() {
  uint32_t a, d;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(1));
  return static_cast<uint64_t>(d) << 32 | a;
}

void system_part() {
  uint32_t a, b, c, d;
  __cpuid_count(7, 0, a, b, c, d);
  check(d >> 22 & d >> 24 & d >> 25 & 1, "CPUID has AMX-BF16, AMX-TILE and AMX-INT8");
  const int refused = in_a_child(touch_a_tile);
  check(WIFSIGNALED(refused) && WTERMSIG(refused) == SIGILL, "a tile without permission is SIGILL");
  check(ends_well(in_a_child(amx_with_a_small_signal_stack)), "refused permission leaves the AVX-512 kernels");
  check(!std::strcmp(flex::kernels().name, "amx"), "the best kernels are amx");
  check(flex::use_kernels("amx"), "the kernels named amx can be used");
  uint64_t permitted = 0;
  syscall(SYS_arch_prctl, 0x1022, &permitted);
  check(permitted >> 18 & 1, "Linux has given permission for tile data");
}

void kernels_part(bool whole_system) {
  constexpr int S = flex::kStored, J = flex::kInt8, N = flex::kNf4;
  const std::vector<Shape> shapes = {
      {{33, 5, 70}, 1, 40, S, S},     {{33, 5, 70}, 31, 15, S, S},   {{1, 16, 17, 32}, 33, 47, S, S},
      {{40, 3}, 65, 33, S, S},        {{31, 64, 65}, 96, 64, S, S},  {{7, 130}, 129, 65, S, S},
      {{20}, 257, 17, S, S},          {{20}, 40, 600, S, S},         {{34, 2}, 520, 70, S, S},
      {{33, 9, 70}, 66, 63, J, J},    {{33, 9, 70}, 130, 31, N, N},  {{40, 20, 1, 7}, 99, 67, N, J},
      {{18, 64}, 255, 129, J, S},     {{35}, 63, 320, S, N},         {{260}, 48, 40, S, S},
      {{40}, 2100, 20, S, S},         {{33, 9, 70}, 66, 63, J, J, true},
      {{17, 130, 3}, 130, 65, N, N, true}, {{35}, 63, 320, N, J, true}, {{40}, 2100, 20, J, J, true},
  };
  double worst = 0.0, worst_avx512 = 0.0, worst_int8 = 0.0;
  uint64_t all = 0;
  bool same = true, alike = true;
  for (const Shape& shape : shapes) {
    const Problem problem(shape);
    const Results found = problem.run(*flex::amx_kernels(), 1);
    const Results vectors = problem.run(*flex::avx512_kernels(), 1);
    const double error = problem.error(found), other = problem.error(vectors);
    std::printf("bits %016llx H %lld I %lld codes %lld %lld%s: error %.2e, AVX-512 %.2e\n",
                static_cast<unsigned long long>(found.digest), static_cast<long long>(shape.H),
                static_cast<long long>(shape.I), static_cast<long long>(shape.gate_up_kind),
                static_cast<long long>(shape.down_kind), shape.int8_products ? " in int8" : "", error, other);
    std::fflush(stdout);
    if (shape.int8_products) {
      alike = alike && found.digest == vectors.digest;
      worst_int8 = error <= worst_int8 ? worst_int8 : error;
    } else {
      worst = error <= worst ? worst : error;
      worst_avx512 = other <= worst_avx512 ? worst_avx512 : other;
    }
    all ^= found.digest;
    if (!whole_system || shape.H > 150 || shape.I > 150) continue;
    set_alarms(500);
    same = same && problem.run(*flex::amx_kernels(), 3).digest == found.digest;
    set_alarms(0);
    same = same && ends_well(in_a_child([&] { return problem.run(*flex::amx_kernels(), 1).digest != found.digest; }));
  }
  // Two roundings to bfloat16, of at most 2^-9 each, stand between operands and results.
  check(worst < 0x1p-8 && worst_avx512 < 0x1p-8, "every result is within 2^-8 of double precision");
  check(alike, "products in int8 give the bits of the AVX-512 kernels");
  // NF4 is multiplied as an int8 weight near to it.
  check(worst_int8 < 0x1p-4, "products in int8 are within 2^-4 of double precision");
  if (!whole_system) return;
  check(same, "three threads under signals, and a child process, give the same bits");
  check(alarms > 100, "there were signals");
  check((states_in_use() & uint64_t{3} << 17) == 0, "tiles are released");
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (trap_tiles) {
    if (trap_tiles()) return 2;
    kernels_part(false);
  } else {
    system_part();
    kernels_part(true);
  }
  std::printf("%d checks, %d failed\n", checks, failed);
  if (getpid() != 1) return failed != 0;
  // The first process: nothing is left to do but to switch Bochs off.
  tcdrain(1);
  if (ioperm(0x8900, 1, 1) == 0)
    for (const char* c = "Shutdown"; *c; ++c) outb(static_cast<unsigned char>(*c), 0x8900);
  for (;;) pause();
}
