// The shape of a block in the kernels that sum over a batch, and sums over a warp's lanes.
#pragma once

#include <cuda_runtime.h>

namespace sparse_kernels::cuda {

constexpr int kThreads = 1024;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kWarps == kWarp, "the lanes of one warp add up the sums of all warps");

__device__ inline int lane_in_warp() { return int(threadIdx.x) % kWarp; }
__device__ inline int warp_in_block() { return int(threadIdx.x) / kWarp; }

// The sum over the lanes of a warp, for each of them.
__device__ inline int sum_over_lanes(int value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

}  // namespace sparse_kernels::cuda
