// Stable counting sort of the T*K chosen slots by expert: GPU plan, step 2.
//
// Letters: E routed experts, N = T*K slots, C chunks of neighbouring slots, B = E + 1 bins (the last one for slots to
// skip). No float and no result of an atomic decides a position: the outcome is the same in every run.

#include "common.cuh"

namespace flex {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
// Slots of one warp whose ids are loaded before the first of them is used, in units of a warp.
constexpr int kBatch = 4;
// Up to here one block sorts alone, in one launch.
constexpr int64_t kOneBlockSlots = 4 * kThreads;

// Any id outside [0, E) is the sentinel: a bad id can never become an address.
__device__ __forceinline__ int bin_of(int32_t id, int experts) {
  return static_cast<unsigned>(id) < static_cast<unsigned>(experts) ? id : experts;
}

// Calls visit(slot, bin, peers) for the slots [begin, end) in order, one slot a lane; bin is -1 past the end, and peers
// are the lanes of equal bin.
template <typename Visit>
__device__ __forceinline__ void for_each_slot(const int32_t* __restrict__ ids_N, int64_t begin, int64_t end, int experts,
                                              int lane, Visit visit) {
  for (int64_t base = begin; base < end; base += kBatch * kWarp) {
    int bin[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t slot = base + i * kWarp + lane;
      bin[i] = slot < end ? bin_of(ids_N[slot], experts) : -1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      visit(base + i * kWarp + lane, bin[i], __match_any_sync(kFullWarp, bin[i]));
    }
  }
}

__device__ __forceinline__ bool leads(unsigned peers, int lane) { return __ffs(peers) - 1 == lane; }

// Grid: C blocks; block c writes how many slots of its chunk fall into each bin. Reads 4 N bytes, writes 4 C B.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const int32_t* __restrict__ ids_N, int64_t slots, int experts, int64_t slots_per_warp,
                 int32_t* __restrict__ counts_CB) {
  const int bins = experts + 1, lane = threadIdx.x % kWarp;
  int32_t* const counts = reinterpret_cast<int32_t*>(shared_memory);
  for (int b = threadIdx.x; b < bins; b += kThreads) counts[b] = 0;
  __syncthreads();
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * slots_per_warp;
  const int64_t end = min(begin + slots_per_warp, slots);
  for_each_slot(ids_N, begin, end, experts, lane, [&](int64_t, int bin, unsigned peers) {
    if (bin >= 0 && leads(peers, lane)) atomicAdd(&counts[bin], __popc(peers));
  });
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += kThreads) {
    counts_CB[static_cast<int64_t>(blockIdx.x) * bins + b] = counts[b];
  }
}

// Exclusive scans over the experts, by one warp: the first row and the first tile of each. Entry E is the total of
// both.
__device__ __forceinline__ void scan_bins(const int32_t* total, int32_t* first_row, int32_t* first_tile, int experts,
                                          int block_rows, int lane) {
  const int per_lane = (experts + kWarp - 1) / kWarp;
  const int begin = min(lane * per_lane, experts), end = min(begin + per_lane, experts);
  int32_t rows = 0, tiles = 0;
  for (int e = begin; e < end; ++e) {
    rows += total[e];
    tiles += (total[e] + block_rows - 1) / block_rows;
  }
  int32_t rows_before = rows, tiles_before = tiles;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int32_t more_rows = __shfl_up_sync(kFullWarp, rows_before, offset);
    const int32_t more_tiles = __shfl_up_sync(kFullWarp, tiles_before, offset);
    if (lane >= offset) {
      rows_before += more_rows;
      tiles_before += more_tiles;
    }
  }
  rows_before -= rows;
  tiles_before -= tiles;
  for (int e = begin; e < end; ++e) {
    first_row[e] = rows_before;
    first_tile[e] = tiles_before;
    rows_before += total[e];
    tiles_before += (total[e] + block_rows - 1) / block_rows;
  }
  if (lane == kWarp - 1) {
    first_row[experts] = rows_before;
    first_tile[experts] = tiles_before;
  }
}

__device__ __forceinline__ void write_tiles(const int32_t* first_row, const int32_t* first_tile, int experts,
                                            const Permutation& out) {
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; tile < out.tile_bound;
       tile += static_cast<int64_t>(gridDim.x) * kThreads) {
    const bool used = tile < first_tile[experts];
    int low = 0, high = experts;
    while (used && high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_tile[middle] <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    out.tile_expert[tile] = used ? low : -1;
    out.tile_row[tile] = used ? first_row[low] + (static_cast<int32_t>(tile) - first_tile[low]) * out.block_rows : 0;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *out.tile_count = first_tile[experts];
}

// Grid: C blocks. Every block adds up the counts of all chunks (small, in L2), which gives the rows where its own slots
// start in each bin; its warps own neighbouring segments of the chunk and place their slots in order.
// Reads 8 N + 4 C B bytes a block, writes 8 N. Shared memory: 4 (W B + 4 B) bytes.
__global__ void __launch_bounds__(kThreads)
    place_kernel(const int32_t* __restrict__ ids_N, int64_t slots, int experts, int64_t slots_per_warp,
                 const int32_t* __restrict__ counts_CB, Permutation out) {
  const int bins = experts + 1, chunks = gridDim.x, chunk = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t* const warp_counts_WB = reinterpret_cast<int32_t*>(shared_memory);
  int32_t* const total = warp_counts_WB + kWarps * bins;
  int32_t* const before = total + bins;
  int32_t* const first_row = before + bins;
  int32_t* const first_tile = first_row + bins;
  int32_t* const own = warp_counts_WB + warp * bins;

  for (int i = threadIdx.x; i < (kWarps + 2) * bins; i += kThreads) warp_counts_WB[i] = 0;
  __syncthreads();

  const int64_t begin = (static_cast<int64_t>(chunk) * kWarps + warp) * slots_per_warp;
  const int64_t end = min(begin + slots_per_warp, slots);
  for_each_slot(ids_N, begin, end, experts, lane, [&](int64_t, int bin, unsigned peers) {
    if (bin >= 0 && leads(peers, lane)) own[bin] += __popc(peers);
    __syncwarp();
  });
  if (chunks > 1) {
    const int groups = max(1, kThreads / bins);
    for (int i = threadIdx.x; i < groups * bins; i += kThreads) {
      const int bin = i % bins;
      int32_t sum = 0, sum_before = 0;
#pragma unroll 4
      for (int c = i / bins; c < chunks; c += groups) {
        const int32_t count = counts_CB[static_cast<int64_t>(c) * bins + bin];
        sum += count;
        sum_before += c < chunk ? count : 0;
      }
      atomicAdd(&total[bin], sum);
      atomicAdd(&before[bin], sum_before);
    }
  }
  __syncthreads();

  for (int b = threadIdx.x; b < bins; b += kThreads) {
    int32_t running = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = warp_counts_WB[w * bins + b];
      warp_counts_WB[w * bins + b] = running;
      running += count;
    }
    if (chunks == 1) total[b] = running;
  }
  __syncthreads();

  if (warp == 0) scan_bins(total, first_row, first_tile, experts, max(1, out.block_rows), lane);
  __syncthreads();

  if (chunk == 0) {
    for (int b = threadIdx.x; b < bins; b += kThreads) out.offsets_E1[b] = first_row[b];
  }
  if (out.tile_expert != nullptr) write_tiles(first_row, first_tile, experts, out);

  for (int b = lane; b < bins; b += kWarp) own[b] += first_row[b] + before[b];
  __syncwarp();
  for_each_slot(ids_N, begin, end, experts, lane, [&](int64_t slot, int bin, unsigned peers) {
    const int rank = __popc(peers & ((1u << lane) - 1));
    const int32_t row = bin >= 0 ? own[bin] + rank : 0;
    __syncwarp();
    if (bin >= 0 && rank == 0) own[bin] += __popc(peers);
    __syncwarp();
    if (bin >= 0) {
      const bool real = bin < experts;
      out.inverse_N[slot] = real ? row : -1;
      out.order_N[row] = real ? static_cast<int32_t>(slot) : -1;
    }
  });
}

struct Chunks {
  int count;
  int64_t slots_per_warp;
};

Chunks divide(int64_t slots) {
  if (slots <= kOneBlockSlots) return {1, ceil_div(ceil_div(slots, kWarps), kWarp) * kWarp};
  const int64_t per_warp = ceil_div(ceil_div(slots, int64_t{kMaxPermuteChunks} * kWarps), kWarp) * kWarp;
  return {static_cast<int>(ceil_div(slots, per_warp * kWarps)), per_warp};
}

}  // namespace

int permute_chunks(int64_t slots) {
  const int count = divide(slots).count;
  return count == 1 ? 0 : count;
}

int launch_permute(int device, void* stream, const int32_t* ids_N, int64_t slots, int experts, int32_t* counts_CE1,
                   Permutation permutation) {
  if (const int error = use_device(device)) return error;
  const Chunks chunks = divide(slots);
  const int bin_bytes = (experts + 1) * static_cast<int>(sizeof(int32_t));
  if (chunks.count > 1) {
    const int error = launch(count_kernel, dim3(chunks.count), dim3(kThreads), bin_bytes, stream, ids_N, slots, experts,
                             chunks.slots_per_warp, counts_CE1);
    if (error != 0) return error;
  }
  return launch(place_kernel, dim3(chunks.count), dim3(kThreads), (kWarps + 4) * bin_bytes, stream, ids_N, slots,
                experts, chunks.slots_per_warp, counts_CE1, permutation);
}

}  // namespace flex
