// The scheduler of the host emulation: one block at a time, one fiber a thread, random order from a seed.

#include <algorithm>
#include <csetjmp>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>
#include <ucontext.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

constexpr size_t kSharedBytes = 48 * 1024;  // what a launch gets without asking for more
constexpr size_t kGuardBytes = 4 * 1024;
alignas(16) unsigned char shared_memory[kSharedBytes + kGuardBytes];

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kWarp = 32;

enum class State { kRunnable, kWaiting, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf resume;
  bool started;
  State state;
  Op op;
  unsigned mask, source_lane;
  uint64_t value;
  uint64_t barriers_seen;
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
unsigned current, threads;
const std::function<void()>* body;

std::mt19937_64 random_engine;
int64_t dropped_barrier = -1;
std::string failure;

[[noreturn]] void to_scheduler() { _longjmp(scheduler, 1); }

void fiber_main() {
  (*body)();
  fibers[current].state = State::kDone;
  to_scheduler();
}

void switch_to(unsigned thread) {
  current = thread;
  const unsigned x = thread % blockDim.x, rest = thread / blockDim.x;
  threadIdx = {x, rest % blockDim.y, rest / blockDim.y};
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[thread];
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

uint64_t result_for(unsigned lane, unsigned first, unsigned mask) {
  const Fiber& own = fibers[first + lane];
  uint64_t result = own.op == Op::kReduceMin ? ~uint64_t{0} : 0;
  for (unsigned l = 0; l < kWarp; ++l) {
    if ((mask >> l & 1u) == 0) continue;
    const Fiber& other = fibers[first + l];
    switch (own.op) {
      case Op::kShuffle:
        if (l == own.source_lane) result = other.value;
        break;
      case Op::kMatchAny:
        if (other.value == own.value) result |= uint64_t{1} << l;
        break;
      case Op::kReduceMax:
        result = std::max(result, other.value);
        break;
      case Op::kReduceMin:
        result = std::min(result, other.value);
        break;
      default:
        break;
    }
  }
  return result;
}

// Releases the lanes of the current thread's collective once all of them wait in it.
void try_release_warp() {
  const Fiber& own = fibers[current];
  const unsigned first = current / kWarp * kWarp;
  for (unsigned l = 0; l < kWarp; ++l) {
    if ((own.mask >> l & 1u) == 0) continue;
    if (first + l >= threads) {
      failure = "a warp collective names a lane that the block does not have";
      return;
    }
    const Fiber& other = fibers[first + l];
    if (other.state != State::kWaiting || other.op != own.op || other.mask != own.mask) return;
  }
  uint64_t results[kWarp];
  for (unsigned l = 0; l < kWarp; ++l) {
    if (own.mask >> l & 1u) results[l] = result_for(l, first, own.mask);
  }
  const unsigned mask = own.mask;
  for (unsigned l = 0; l < kWarp; ++l) {
    if ((mask >> l & 1u) == 0) continue;
    fibers[first + l].value = results[l];
    fibers[first + l].state = State::kRunnable;
  }
}

// As the hardware: a barrier opens when every thread that has not ended waits at it.
bool try_release_block() {
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& fiber = fibers[t];
    if (fiber.state == State::kRunnable) return false;
    if (fiber.state == State::kWaiting && fiber.op != Op::kSyncBlock) return false;
  }
  bool any = false;
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t].state != State::kWaiting) continue;
    fibers[t].state = State::kRunnable;
    any = true;
  }
  return any;
}

// Lets every runnable lane of a warp run to its next barrier or collective; whether there was one.
bool run_warp(unsigned warp) {
  unsigned lanes[kWarp];
  for (unsigned l = 0; l < kWarp; ++l) lanes[l] = warp * kWarp + l;
  std::shuffle(lanes, lanes + kWarp, random_engine);
  bool ran = false;
  for (const unsigned thread : lanes) {
    if (thread >= threads || fibers[thread].state != State::kRunnable) continue;
    switch_to(thread);
    if (!failure.empty()) return true;
    ran = true;
  }
  return ran;
}

void run_block(size_t shared_bytes) {
  const auto pattern = static_cast<unsigned char>(random_engine() | 1u);
  std::memset(shared_memory, pattern, sizeof shared_memory);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.started = false;
    fiber.state = State::kRunnable;
    fiber.barriers_seen = 0;
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
  std::vector<unsigned> warps((threads + kWarp - 1) / kWarp);
  for (unsigned w = 0; w < warps.size(); ++w) warps[w] = w;
  // A fair order alone would hide missing barriers: half of the warps run as far as they can before another starts.
  while (failure.empty()) {
    std::shuffle(warps.begin(), warps.end(), random_engine);
    bool progress = false;
    for (const unsigned w : warps) {
      const bool greedy = random_engine() & 1u;
      while (run_warp(w)) {
        progress = true;
        if (!failure.empty()) return;
        if (!greedy) break;
      }
    }
    if (progress || try_release_block()) continue;
    const auto done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
    if (std::all_of(fibers.begin(), fibers.begin() + threads, done)) break;
    failure = "deadlock: some threads never reach a barrier or warp collective";
  }
  for (size_t i = shared_bytes; i < sizeof shared_memory; ++i) {
    if (shared_memory[i] != pattern) failure = "a write past the end of shared memory";
  }
}

}  // namespace

unsigned lane() { return current % kWarp; }

uint64_t meet(Op op, unsigned mask, uint64_t value, unsigned source_lane) {
  Fiber& fiber = fibers[current];
  if (op == Op::kSyncBlock || op == Op::kSyncWarp) {
    if (static_cast<int64_t>(fiber.barriers_seen++) == dropped_barrier) return 0;
  }
  fiber.op = op;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source_lane = source_lane;
  fiber.state = State::kWaiting;
  if (op != Op::kSyncBlock) try_release_warp();
  if (_setjmp(fiber.resume) == 0) to_scheduler();
  return fibers[current].value;
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t size = uint64_t{block.x} * block.y * block.z;
  if (size == 0 || size > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > kSharedBytes) return cudaErrorInvalidValue;
  failure.clear();
  threads = static_cast<unsigned>(size);
  if (fibers.size() < threads) fibers.resize(threads);
  gridDim = grid;
  blockDim = block;
  body = &kernel;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(config.dynamicSmemBytes);
        if (!failure.empty()) return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return emulation::failure.c_str();
  }
  return "unknown error";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

#pragma GCC visibility push(default)
extern "C" {

// Orders the threads of later launches by this seed.
void emulation_seed(uint64_t seed) { emulation::random_engine.seed(seed); }

// The n-th __syncthreads or __syncwarp that a thread meets (from 0) does nothing; -1 keeps them all. For tests of the
// tests: without a barrier that it needs, a kernel must be caught.
void emulation_drop_barrier(int64_t index) { emulation::dropped_barrier = index; }
}
#pragma GCC visibility pop
