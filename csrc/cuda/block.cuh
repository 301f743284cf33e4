// What the kernels of a whole batch share: a block's shape, and sums over its warps' lanes.
#pragma once

#include <cuda_runtime.h>

namespace sparse_kernels::cuda {

constexpr int kThreads = 1024;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;  // a lane for each warp's sum: one warp adds them up
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kWarps == kWarp, "the block's sums are summed by the lanes of a warp");

__device__ inline int lane_of_warp() { return int(threadIdx.x) % kWarp; }
__device__ inline int warp_of_block() { return int(threadIdx.x) / kWarp; }

__device__ inline int add_lanes(int value) {
  for (int other = kWarp / 2; other > 0; other /= 2)
    value += __shfl_xor_sync(kAllLanes, value, other);
  return value;
}

}  // namespace sparse_kernels::cuda
