// The kernels of compact.cu: they need the CUDA language and nothing else.
//
// A row's number has 32 bits; what is counted past it (a share's last step, a slot of the padding)
// has 64.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "block.h"
#include "compact.h"
#include "control_sums.cuh"

namespace sparse_kernels::cuda {

// Memory between the blocks of a launch, in compact's storage.
struct Between {
  unsigned* finished;     // blocks, of compact_tiles with a controller
  ControlSums* of_block;  // [blocks]; null: no controller
  int32_t* counts;        // [blocks] flags set in each share
  uint16_t* bits;         // [steps, kWarp] the flags, 16 to a lane
};

// Bit 7 of each byte that is not 0.
__device__ inline uint32_t high_bits(uint32_t four) {
  return (((four & 0x7f7f7f7fu) + 0x7f7f7f7fu) | four) & 0x80808080u;
}

__device__ inline void put(const PackedRows& packed, int slot, int row) {
  if (slot >= packed.capacity) return;
  packed.index[slot] = row;
  packed.weight[slot] = packed.weight_in ? packed.weight_in[row] : 1.0f;
}

__device__ inline int overflow_of(const CompactArgs& args, int total) {
  return total > args.packed.capacity ? total - args.packed.capacity : 0;
}

// Count, overflow and padding, shared among all the threads of the grid.
__device__ inline void finish(const CompactArgs& args, int total) {
  const int overflow = overflow_of(args, total), kept = total - overflow;
  const int thread = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (thread == 0) {
    *args.count = kept;
    *args.overflow = overflow;
  }
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;  // 64 bits: a slot may be near 2^31
  for (int64_t slot = int64_t(kept) + thread; slot < args.packed.capacity; slot += stride) {
    args.packed.index[slot] = 0;
    args.packed.weight[slot] = 0.0f;
  }
}

// Up to kMaxTiled rows: a block for each tile.

constexpr int kFlagsPerLane = 4;
constexpr int kTile = kThreads * kFlagsPerLane;  // flags of a block

// This thread's share of the flags set in [begin, end): 16 bytes at a time between the head and the
// tail that are not aligned.
__device__ inline int count_share(const uint8_t* mask, int begin, int end) {
  const int thread = int(threadIdx.x);
  const int to_aligned = int(-(reinterpret_cast<uintptr_t>(mask) + unsigned(begin)) % 16);
  const int head = begin + to_aligned < end ? begin + to_aligned : end;
  const int words = (end - head) / 16;
  const int tail = head + 16 * words;
  int sum = 0;
  if (begin + thread < head) sum += mask[begin + thread] != 0;
  if (tail + thread < end) sum += mask[tail + thread] != 0;
  const uint4* const wide = reinterpret_cast<const uint4*>(mask + head);
  for (int i = thread; i < words; i += kThreads) {
    const uint4 word = wide[i];
    sum += __popc(high_bits(word.x)) + __popc(high_bits(word.y));
    sum += __popc(high_bits(word.z)) + __popc(high_bits(word.w));
  }
  return sum;
}

// By warp 0: the last block to come adds up what each left, in the blocks' order, and moves the
// controller. Each block's sums are in memory before it counts itself (the fence), so whoever finds
// all the others counted sees them (the other fence), and the threshold has been read by all.
__device__ inline void control_by_last_block(const ControlArgs& control, ControlSums sums,
                                             int overflow, const Between& between) {
  const int lane = lane_of_warp();
  if (gridDim.x > 1) {
    unsigned before = 0;
    if (lane == 0) {
      between.of_block[blockIdx.x] = sums;
      __threadfence();
      before = atomicAdd(between.finished, 1u);
    }
    if (__shfl_sync(kAllLanes, before, 0) + 1 != gridDim.x) return;
    __threadfence();
    sums = control_add_all(between.of_block, int(gridDim.x));
  }
  if (lane == 0) control_move(control, sums, overflow);
}

// A warp ranks its flags by ballots; its first slot is what is set before the tile plus what the
// warps before it have.
__global__ void __launch_bounds__(kThreads, 1)
    compact_tiles(CompactArgs args, ControlArgs control, Between between) {
  __shared__ int in_warp[kWarps], before_tile[kWarps], from_tile[kWarps];
  __shared__ SumsOfWarps of_warp;
  const int lane = lane_of_warp(), warp = warp_of_block();
  const int tile = int(blockIdx.x) * kTile;
  const int first = tile + warp * (kWarp * kFlagsPerLane) + lane;

  uint32_t ballots[kFlagsPerLane];
  int own = 0;
#pragma unroll
  for (int k = 0; k < kFlagsPerLane; ++k) {
    const int row = first + k * kWarp;
    ballots[k] = __ballot_sync(kAllLanes, row < args.rows && args.mask[row] != 0);
    own += __popc(ballots[k]);
  }
  const int before = add_lanes(count_share(args.mask, 0, tile));
  const int from = add_lanes(count_share(args.mask, tile, args.rows));
  if (between.of_block) {
    const int end = tile + kTile < args.rows ? tile + kTile : args.rows;
    control_sum_rows(control, tile, end, of_warp);
  }
  if (lane == 0) {
    in_warp[warp] = own;
    before_tile[warp] = before;
    from_tile[warp] = from;
  }
  __syncthreads();
  const int selected_before = add_lanes(before_tile[lane]);
  const int total = selected_before + add_lanes(from_tile[lane]);
  int slot = selected_before + add_lanes(lane < warp ? in_warp[lane] : 0);
#pragma unroll
  for (int k = 0; k < kFlagsPerLane; ++k) {
    if (ballots[k] >> lane & 1u)
      put(args.packed, slot + __popc(ballots[k] & ((1u << lane) - 1u)), first + k * kWarp);
    slot += __popc(ballots[k]);
  }
  finish(args, total);
  if (between.of_block && warp == 0)
    control_by_last_block(control, control_add_all(of_warp.get(), kWarps), overflow_of(args, total),
                          between);
}

// Above kMaxTiled: a block for each share. Flags are dealt out to the grid's warps in steps of
// kStep, counted from the last multiple of 16 bytes before the mask, so that loads are aligned.

constexpr int kStep = 16 * kWarp;  // flags of a warp's step: 16 bytes of a lane
constexpr int kStepsAhead = 4;     // whose loads are under way at a time

// Flags before the mask in step 0.
__host__ __device__ inline int flags_before(const uint8_t* mask) {
  return int(reinterpret_cast<uintptr_t>(mask) % 16);
}

__host__ __device__ inline int steps_of(int32_t rows, int before) {
  return int((int64_t(rows) + before + kStep - 1) / kStep);
}

// Steps before a part's first, of ``parts`` that differ by one at most.
__device__ inline int first_step(int steps, int part, int parts) {
  return int(int64_t(steps) * part / parts);
}

// Flags [row, row + 16) as bits; those outside the rows are not set.
__device__ inline uint32_t bits_of_16(const uint4& flags) {
  const auto four = [](uint32_t word) { return (high_bits(word) >> 7) * 0x10204080u >> 28; };
  return four(flags.x) | four(flags.y) << 4 | four(flags.z) << 8 | four(flags.w) << 12;
}

__device__ inline uint4 load_16(const CompactArgs& args, int64_t row) {
  if (row >= 0 && row + 16 <= args.rows) return *reinterpret_cast<const uint4*>(args.mask + row);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < 16; ++k)
    if (row + k >= 0 && row + k < args.rows)
      words[k / 4] |= uint32_t(args.mask[row + k] != 0) << 8 * (k % 4);
  return {words[0], words[1], words[2], words[3]};
}

// The flags set in steps [begin, end), for lane 0, with their bits written.
__device__ inline int count_steps(const CompactArgs& args, int begin, int end, uint16_t* bits) {
  const int lane = lane_of_warp();
  const int64_t origin = lane * 16 - flags_before(args.mask);
  int sum = 0;
  for (int step = begin; step < end; step += kStepsAhead) {
    uint4 flags[kStepsAhead];
#pragma unroll
    for (int k = 0; k < kStepsAhead; ++k)
      if (step + k < end) flags[k] = load_16(args, int64_t(step + k) * kStep + origin);
#pragma unroll
    for (int k = 0; k < kStepsAhead; ++k) {
      if (step + k >= end) break;
      const uint32_t found = bits_of_16(flags[k]);
      bits[int64_t(step + k) * kWarp + lane] = uint16_t(found);
      sum += __popc(found);
    }
  }
  return add_lanes(sum);
}

// Packs the rows of steps [begin, end) from ``slot`` on. ``staged`` is the warp's: what a step
// keeps lies there in order first, so that the lanes write next to each other.
__device__ inline void pack_steps(const CompactArgs& args, int begin, int end, const uint16_t* bits,
                                  int slot, uint16_t* staged) {
  const int lane = lane_of_warp();
  uint32_t next = begin < end ? bits[int64_t(begin) * kWarp + lane] : 0;
  for (int step = begin; step < end && slot < args.packed.capacity; ++step) {
    uint32_t found = next;
    if (step + 1 < end) next = bits[int64_t(step + 1) * kWarp + lane];
    int rank = __popc(found);
    for (int back = 1; back < kWarp; back *= 2) {
      const int others = __shfl_up_sync(kAllLanes, rank, back);
      if (lane >= back) rank += others;
    }
    const int kept = __shfl_sync(kAllLanes, rank, kWarp - 1);
    rank -= __popc(found);
    for (; found; found &= found - 1) staged[rank++] = uint16_t(lane * 16 + __ffs(int(found)) - 1);
    __syncwarp();
    const int64_t origin = int64_t(step) * kStep - flags_before(args.mask);
    for (int i = lane; i < kept; i += kWarp) put(args.packed, slot + i, int(origin + staged[i]));
    __syncwarp();
    slot += kept;
  }
}

// A cooperative launch: the blocks are all on the device at once, so they may wait for one another.
__global__ void __launch_bounds__(kThreads, 1)
    compact_shares(CompactArgs args, ControlArgs control, Between between) {
  __shared__ int in_warp[kWarps], before_share[kWarps], in_all[kWarps];
  __shared__ uint16_t staged[kWarps][kStep];
  __shared__ SumsOfWarps of_warp;
  const int lane = lane_of_warp(), warp = warp_of_block();
  const int block = int(blockIdx.x), blocks = int(gridDim.x);
  const int before_row = flags_before(args.mask), steps = steps_of(args.rows, before_row);

  if (between.of_block) {  // first, for the sake of registers: nothing else is kept yet
    const int64_t from = int64_t(first_step(steps, block, blocks)) * kStep - before_row;
    const int64_t to = int64_t(first_step(steps, block + 1, blocks)) * kStep - before_row;
    control_sum_rows(control, from > 0 ? from : 0, to < args.rows ? to : args.rows, of_warp);
  }
  const int begin = first_step(steps, block * kWarps + warp, blocks * kWarps);
  const int end = first_step(steps, block * kWarps + warp + 1, blocks * kWarps);
  const int own = count_steps(args, begin, end, between.bits);
  if (lane == 0) in_warp[warp] = own;
  __syncthreads();
  if (warp == 0) {
    const int of_block = add_lanes(in_warp[lane]);
    if (lane == 0) between.counts[block] = of_block;
    if (between.of_block) {
      const ControlSums sums = control_add_all(of_warp.get(), kWarps);
      if (lane == 0) between.of_block[block] = sums;
    }
  }
  cooperative_groups::this_grid().sync();

  int before = 0, all = 0;
  for (int i = int(threadIdx.x); i < blocks; i += kThreads) {
    const int count = between.counts[i];
    before += i < block ? count : 0;
    all += count;
  }
  before = add_lanes(before);
  all = add_lanes(all);
  if (lane == 0) {
    before_share[warp] = before;
    in_all[warp] = all;
  }
  __syncthreads();
  const int slot = add_lanes(before_share[lane] + (lane < warp ? in_warp[lane] : 0));
  const int total = add_lanes(in_all[lane]);
  pack_steps(args, begin, end, between.bits, slot, staged[warp]);
  finish(args, total);
  if (between.of_block && block == 0 && warp == 0) {
    const ControlSums sums = control_add_all(between.of_block, blocks);
    if (lane == 0) control_move(control, sums, overflow_of(args, total));
  }
}

}  // namespace sparse_kernels::cuda
