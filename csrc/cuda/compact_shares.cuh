// Compaction of more than kMaxTiled rows, in two launches: in each, a block for each share of the
// flags. The warps of the grid divide the flags among themselves in steps of kStep flags; step 0
// begins at the last multiple of 16 bytes before the mask, so that loads are aligned. Both launches
// must have the same number of blocks: the second reads what the first wrote for each.
//
// The launch is the barrier between counting and packing. A barrier within one launch would need
// all blocks on the device at once: beside a resident kernel, such as a collective's, they would
// wait for its processors, for ever where it waits for this stream. A look-back with a ticket would
// not, but its blocks spin, and the controller's sums need all shares in a fixed order anyway.
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

constexpr int kStep = 16 * kWarp;  // flags: 16 bytes for each lane
constexpr int kStepsInFlight = 4;  // steps whose loads a lane issues before it counts the first

// Bytes before the mask in step 0.
__host__ __device__ inline int flags_before(const uint8_t* mask) {
  return int(reinterpret_cast<uintptr_t>(mask) % 16);
}

__host__ __device__ inline int steps_of(int32_t rows, int before) {
  return int((int64_t(rows) + before + kStep - 1) / kStep);
}

// The first step of a part, where `parts` parts differ by one step at most.
__device__ inline int first_step(int steps, int part, int parts) {
  return int(int64_t(steps) * part / parts);
}

// 16 flags as bits.
__device__ inline uint32_t bits_of_16(const uint4& flags) {
  const auto four = [](uint32_t word) { return (high_bits(word) >> 7) * 0x10204080u >> 28; };
  return four(flags.x) | four(flags.y) << 4 | four(flags.z) << 8 | four(flags.w) << 12;
}

// Flags [row, row + 16); those outside the rows are 0.
__device__ inline uint4 load_16(const CompactArgs& args, int64_t row) {
  if (row >= 0 && row + 16 <= args.rows) return *reinterpret_cast<const uint4*>(args.mask + row);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < 16; ++k)
    if (row + k >= 0 && row + k < args.rows)
      words[k / 4] |= uint32_t(args.mask[row + k] != 0) << 8 * (k % 4);
  return {words[0], words[1], words[2], words[3]};
}

// Stores the flags of steps [begin, end) as bits and returns their number, for each lane.
__device__ inline int count_steps(const CompactArgs& args, int begin, int end,
                                  uint16_t* flag_bits) {
  const int lane = lane_in_warp();
  const int64_t origin = lane * 16 - flags_before(args.mask);
  int sum = 0;
  for (int step = begin; step < end; step += kStepsInFlight) {
    uint4 flags[kStepsInFlight];
#pragma unroll
    for (int k = 0; k < kStepsInFlight; ++k)
      if (step + k < end) flags[k] = load_16(args, int64_t(step + k) * kStep + origin);
#pragma unroll
    for (int k = 0; k < kStepsInFlight; ++k) {
      if (step + k >= end) break;
      const uint32_t lane_bits = bits_of_16(flags[k]);
      flag_bits[int64_t(step + k) * kWarp + lane] = uint16_t(lane_bits);
      sum += __popc(lane_bits);
    }
  }
  return sum_over_lanes(sum);
}

// Packs the rows of steps [begin, end) from `slot` on. `staged` is the warp's own: the rows that a
// step keeps are first put there in order, so that the lanes write to adjacent slots.
__device__ inline void pack_steps(const CompactArgs& args, int begin, int end,
                                  const uint16_t* flag_bits, int slot, uint16_t* staged) {
  const int lane = lane_in_warp();
  uint32_t next = begin < end ? flag_bits[int64_t(begin) * kWarp + lane] : 0;
  for (int step = begin; step < end && slot < args.packed.capacity; ++step) {
    uint32_t lane_bits = next;
    if (step + 1 < end) next = flag_bits[int64_t(step + 1) * kWarp + lane];
    int rank = __popc(lane_bits);
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int others = __shfl_up_sync(kAllLanes, rank, distance);
      if (lane >= distance) rank += others;
    }
    const int kept = __shfl_sync(kAllLanes, rank, kWarp - 1);
    rank -= __popc(lane_bits);
    for (; lane_bits; lane_bits &= lane_bits - 1)
      staged[rank++] = uint16_t(lane * 16 + __ffs(int(lane_bits)) - 1);
    __syncwarp();
    const int64_t origin = int64_t(step) * kStep - flags_before(args.mask);
    for (int i = lane; i < kept; i += kWarp)
      write_slot(args.packed, slot + i, int(origin + staged[i]));
    __syncwarp();
    slot += kept;
  }
}

// Writes each share's flags as bits, their number, and its part of the controller's sums.
__global__ void __launch_bounds__(kThreads, 1)
    count_shares(CompactArgs args, ControlArgs control, Scratch scratch) {
  __shared__ int warp_counts[kWarps];
  __shared__ WarpSums warp_sums;
  const int lane = lane_in_warp(), warp = warp_in_block();
  const int block = int(blockIdx.x), blocks = int(gridDim.x);

  // First, because no other values occupy registers yet; `steps` is computed anew after it.
  if (scratch.block_sums) {
    const int before_mask = flags_before(args.mask), steps = steps_of(args.rows, before_mask);
    const int64_t from = int64_t(first_step(steps, block, blocks)) * kStep - before_mask;
    const int64_t to = int64_t(first_step(steps, block + 1, blocks)) * kStep - before_mask;
    control_sum_rows(control, from > 0 ? from : 0, to < args.rows ? to : args.rows, warp_sums);
  }
  const int steps = steps_of(args.rows, flags_before(args.mask));
  const int begin = first_step(steps, block * kWarps + warp, blocks * kWarps);
  const int end = first_step(steps, block * kWarps + warp + 1, blocks * kWarps);
  const int own_count = count_steps(args, begin, end, scratch.flag_bits);
  if (lane == 0) {
    warp_counts[warp] = own_count;
    scratch.warp_counts[block * kWarps + warp] = own_count;
  }
  __syncthreads();
  if (warp != 0) return;
  const int block_count = sum_over_lanes(warp_counts[lane]);
  if (lane == 0) scratch.block_counts[block] = block_count;
  if (scratch.block_sums) {
    const ControlSums sums = control_sum_of(warp_sums.get(), kWarps);
    if (lane == 0) scratch.block_sums[block] = sums;
  }
}

// Packs each share behind those before it. The first block takes the controller's step.
__global__ void __launch_bounds__(kThreads, 1)
    pack_shares(CompactArgs args, ControlArgs control, Scratch scratch) {
  __shared__ int counts_before[kWarps], counts_all[kWarps];
  __shared__ uint16_t staged[kWarps][kStep];
  const int lane = lane_in_warp(), warp = warp_in_block();
  const int block = int(blockIdx.x), blocks = int(gridDim.x);
  const int steps = steps_of(args.rows, flags_before(args.mask));

  int before = 0, all = 0;
  for (int i = int(threadIdx.x); i < blocks; i += kThreads) {
    const int count = scratch.block_counts[i];
    before += i < block ? count : 0;
    all += count;
  }
  before = sum_over_lanes(before);
  all = sum_over_lanes(all);
  if (lane == 0) {
    counts_before[warp] = before;
    counts_all[warp] = all;
  }
  __syncthreads();
  const int in_block = lane < warp ? scratch.warp_counts[block * kWarps + lane] : 0;
  const int slot = sum_over_lanes(counts_before[lane] + in_block);
  const int total = sum_over_lanes(counts_all[lane]);
  const int begin = first_step(steps, block * kWarps + warp, blocks * kWarps);
  const int end = first_step(steps, block * kWarps + warp + 1, blocks * kWarps);
  pack_steps(args, begin, end, scratch.flag_bits, slot, staged[warp]);
  write_totals(args, total);
  if (scratch.block_sums && block == 0 && warp == 0) {
    const ControlSums sums = control_sum_of(scratch.block_sums, blocks);
    if (lane == 0) control_step(control, sums, overflow_of(args, total));
  }
}

}  // namespace sparse_kernels::cuda
