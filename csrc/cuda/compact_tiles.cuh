// Compaction of up to kMaxTiled rows: a block for each tile of kTile flags.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "compact_output.cuh"
#include "control_sums.cuh"
#include "sparse_kernels/control_law.h"
#include "sparse_kernels/cuda/compact.h"
#include "sparse_kernels/cuda/control.h"

namespace sparse_kernels::cuda {

constexpr int kFlagsPerLane = 4;
constexpr int kTile = kThreads * kFlagsPerLane;  // flags per block

// This thread's part of the number of flags set in [begin, end): 16 bytes at a time between the
// unaligned head and tail.
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

// To be called by warp 0 of each block. The block that finishes last adds up the sums of all, in
// the blocks' order, and takes the controller's step. No block waits for another. Hazard: the first
// fence puts a block's sums into memory before the block is counted as finished; the second, with
// the barrier that carries it from the lane that counted to those that read, lets the last block
// see them: a shuffle orders nothing but its own value. All blocks have read the threshold by then.
__device__ inline void control_by_last_block(const ControlArgs& control, ControlSums sums,
                                             int overflow, const Scratch& scratch) {
  const int lane = lane_in_warp();
  if (gridDim.x > 1) {
    unsigned finished_before = 0;
    if (lane == 0) {
      scratch.block_sums[blockIdx.x] = sums;
      __threadfence();
      finished_before = atomicAdd(scratch.blocks_finished, 1u);
    }
    if (__shfl_sync(kAllLanes, finished_before, 0) + 1 != gridDim.x) return;
    __threadfence();
    __syncwarp();
    sums = control_sum_of(scratch.block_sums, int(gridDim.x));
  }
  if (lane == 0) control_step(control, sums, overflow);
}

// Each warp ranks its flags by ballots. Its first slot is the number of flags set before the tile
// plus those of the warps before it.
__global__ void __launch_bounds__(kThreads, 1)
    compact_tiles(CompactArgs args, ControlArgs control, Scratch scratch) {
  __shared__ int warp_counts[kWarps], counts_before[kWarps], counts_from[kWarps];
  __shared__ WarpSums warp_sums;
  const int lane = lane_in_warp(), warp = warp_in_block();
  const int tile = int(blockIdx.x) * kTile;
  const int first = tile + warp * (kWarp * kFlagsPerLane) + lane;

  uint32_t ballots[kFlagsPerLane];
  int own_count = 0;
#pragma unroll
  for (int k = 0; k < kFlagsPerLane; ++k) {
    const int row = first + k * kWarp;
    ballots[k] = __ballot_sync(kAllLanes, row < args.rows && args.mask[row] != 0);
    own_count += __popc(ballots[k]);
  }
  const int before = sum_over_lanes(count_share(args.mask, 0, tile));
  const int from_on = sum_over_lanes(count_share(args.mask, tile, args.rows));
  if (scratch.block_sums) {
    const int end = tile + kTile < args.rows ? tile + kTile : args.rows;
    control_sum_rows(control, tile, end, warp_sums);
  }
  if (lane == 0) {
    warp_counts[warp] = own_count;
    counts_before[warp] = before;
    counts_from[warp] = from_on;
  }
  __syncthreads();
  const int selected_before = sum_over_lanes(counts_before[lane]);
  const int total = selected_before + sum_over_lanes(counts_from[lane]);
  int slot = selected_before + sum_over_lanes(lane < warp ? warp_counts[lane] : 0);
#pragma unroll
  for (int k = 0; k < kFlagsPerLane; ++k) {
    if (ballots[k] >> lane & 1u)
      write_slot(args.packed, slot + __popc(ballots[k] & ((1u << lane) - 1u)), first + k * kWarp);
    slot += __popc(ballots[k]);
  }
  write_totals(args, total);
  if (scratch.block_sums && warp == 0)
    control_by_last_block(control, control_sum_of(warp_sums.get(), kWarps),
                          overflow_of(args, total), scratch);
}

}  // namespace sparse_kernels::cuda
