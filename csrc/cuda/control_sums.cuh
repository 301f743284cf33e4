// The controller's sums and its law, as a block of kThreads takes them.
#pragma once

#include <cuda_runtime.h>

#include "block.h"
#include "control.h"

namespace sparse_kernels::cuda {

constexpr int kRowsOfThread = 16;  // between additions in double
constexpr int kRowsAhead = 4;      // whose loads are under way at a time

template <class Real>
__device__ inline void control_add_lanes(ControlSumsOf<Real>& sums) {
#pragma unroll 1
  for (int other = kWarp / 2; other > 0; other /= 2) {
    ControlSumsOf<Real> theirs;
    theirs.mass = __shfl_xor_sync(kAllLanes, sums.mass, other);
    theirs.mass_sq = __shfl_xor_sync(kAllLanes, sums.mass_sq, other);
    theirs.kept = __shfl_xor_sync(kAllLanes, sums.kept, other);
    theirs.selected = __shfl_xor_sync(kAllLanes, sums.selected, other);
    theirs.rejected = __shfl_xor_sync(kAllLanes, sums.rejected, other);
    theirs.finite = __shfl_xor_sync(kAllLanes, sums.finite, other);
    theirs.total = __shfl_xor_sync(kAllLanes, sums.total, other);
    theirs.excess = __shfl_xor_sync(kAllLanes, sums.excess, other);
    theirs.deficit = __shfl_xor_sync(kAllLanes, sums.deficit, other);
    theirs.low = __shfl_xor_sync(kAllLanes, sums.low, other);
    theirs.high = __shfl_xor_sync(kAllLanes, sums.high, other);
    theirs.invalid = __shfl_xor_sync(kAllLanes, sums.invalid, other);
    control_merge(sums, theirs);
  }
}

__device__ inline bool row_counts(const ControlArgs& args, int64_t row) {
  if (!args.labels) return true;
  const int64_t label = args.label_bytes == 8   ? static_cast<const int64_t*>(args.labels)[row]
                        : args.label_bytes == 4 ? static_cast<const int32_t*>(args.labels)[row]
                                                : static_cast<const uint8_t*>(args.labels)[row];
  return label != args.ignore_index;
}

// ControlSums has a constructor, which shared memory may not have.
struct alignas(ControlSums) SumsOfWarps {
  char bytes[kWarps * sizeof(ControlSums)];
  __device__ ControlSums* get() { return reinterpret_cast<ControlSums*>(bytes); }
};

// Rows [begin, end), dealt out to the threads of the block. Each warp's lane 0 keeps its sum in
// shared memory: a sum in double takes a third of the registers.
template <class Real>
__device__ inline void control_sum_rows(const ControlArgs& args, int64_t begin, int64_t end,
                                        ControlSums& of_warp) {
  const float threshold = args.values ? args.values[kThreshold] : 0.0f;
  for (int64_t part = begin; part < end; part += kRowsOfThread * kThreads) {
    ControlSumsOf<Real> sums;
    const int64_t left = end - part;
    const int rows = left < kRowsOfThread * kThreads ? int(left) : kRowsOfThread * kThreads;
#pragma unroll 1
    for (int first = 0; first < rows; first += kRowsAhead * kThreads) {
      float significance[kRowsAhead], mass[kRowsAhead];
      bool counts[kRowsAhead];
#pragma unroll
      for (int k = 0; k < kRowsAhead; ++k) {
        const int at = first + k * kThreads + int(threadIdx.x);
        const bool inside = at < rows;
        counts[k] = inside && row_counts(args, part + at);
        significance[k] = inside ? args.significance[part + at] : 0.0f;
        mass[k] = inside && args.mass ? args.mass[part + at] : 1.0f;
      }
#pragma unroll
      for (int k = 0; k < kRowsAhead; ++k)
        if (counts[k]) control_add_row(sums, significance[k], mass[k], threshold, args.settings);
    }
    control_add_lanes(sums);
    if (lane_of_warp() == 0) control_merge(of_warp, sums);
  }
}

__device__ inline void control_sum_rows(const ControlArgs& args, int64_t begin, int64_t end,
                                        SumsOfWarps& of_warps) {
  ControlSums& of_warp = of_warps.get()[warp_of_block()];
  if (lane_of_warp() == 0) of_warp = ControlSums();
  if (args.mass)
    control_sum_rows<double>(args, begin, end, of_warp);
  else
    control_sum_rows<float>(args, begin, end, of_warp);
}

// The sum of ``count`` sums in memory, each a warp's or a block's; for every lane of the warp.
__device__ inline ControlSums control_add_all(const ControlSums* each, int count) {
  ControlSums sums;
#pragma unroll 1
  for (int i = lane_of_warp(); i < count; i += kWarp) control_merge(sums, each[i]);
  control_add_lanes(sums);
  return sums;
}

// By one thread.
__device__ inline void control_move(const ControlArgs& args, const ControlSums& sums,
                                    int64_t overflow) {
  if (args.invalid) *args.invalid = int32_t(sums.invalid);
  if (args.values) control_advance(args.values, args.counters, sums, *args.setpoint, overflow);
}

}  // namespace sparse_kernels::cuda
