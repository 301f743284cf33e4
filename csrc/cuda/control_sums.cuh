// The controller's sums and its law, computed by a block of kThreads threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "sparse_kernels/control_law.h"
#include "sparse_kernels/cuda/control.h"

namespace sparse_kernels::cuda {

constexpr int kRowsPerSum = 16;  // rows that a thread sums in float before its warp's sum in double
constexpr int kRowsInFlight = 4;  // rows whose loads a thread issues before it adds the first

// The sum over the lanes of a warp, for each of them.
template <class Real>
__device__ inline void control_sum_over_lanes(ControlSumsOf<Real>& sums) {
#pragma unroll 1
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    ControlSumsOf<Real> others;
    others.mass = __shfl_xor_sync(kAllLanes, sums.mass, offset);
    others.mass_sq = __shfl_xor_sync(kAllLanes, sums.mass_sq, offset);
    others.kept = __shfl_xor_sync(kAllLanes, sums.kept, offset);
    others.selected = __shfl_xor_sync(kAllLanes, sums.selected, offset);
    others.rejected = __shfl_xor_sync(kAllLanes, sums.rejected, offset);
    others.finite = __shfl_xor_sync(kAllLanes, sums.finite, offset);
    others.total = __shfl_xor_sync(kAllLanes, sums.total, offset);
    others.excess = __shfl_xor_sync(kAllLanes, sums.excess, offset);
    others.deficit = __shfl_xor_sync(kAllLanes, sums.deficit, offset);
    others.low = __shfl_xor_sync(kAllLanes, sums.low, offset);
    others.high = __shfl_xor_sync(kAllLanes, sums.high, offset);
    others.invalid = __shfl_xor_sync(kAllLanes, sums.invalid, offset);
    control_merge(sums, others);
  }
}

__device__ inline bool row_counts(const ControlArgs& args, int64_t row) {
  if (!args.labels) return true;
  const int64_t label = args.label_bytes == 8   ? static_cast<const int64_t*>(args.labels)[row]
                        : args.label_bytes == 4 ? static_cast<const int32_t*>(args.labels)[row]
                                                : static_cast<const uint8_t*>(args.labels)[row];
  return label != args.ignore_index;
}

// The sums of a block's warps in shared memory, as bytes: ControlSums has a constructor, which a
// variable in shared memory may not have.
struct alignas(ControlSums) WarpSums {
  char bytes[kWarps * sizeof(ControlSums)];
  __device__ ControlSums* get() { return reinterpret_cast<ControlSums*>(bytes); }
};

// Sums over rows [begin, end), divided among the threads of the block. Lane 0 of each warp keeps
// the warp's sum in shared memory, because a sum in double takes a third of the registers.
template <class Real>
__device__ inline void control_sum_rows(const ControlArgs& args, int64_t begin, int64_t end,
                                        ControlSums& warp_sum) {
  const float threshold = args.values ? args.values[kThreshold] : 0.0f;
  for (int64_t part = begin; part < end; part += kRowsPerSum * kThreads) {
    ControlSumsOf<Real> sums;
    const int64_t left = end - part;
    const int rows = left < kRowsPerSum * kThreads ? int(left) : kRowsPerSum * kThreads;
#pragma unroll 1
    for (int first = 0; first < rows; first += kRowsInFlight * kThreads) {
      float significance[kRowsInFlight], mass[kRowsInFlight];
      bool counts[kRowsInFlight];
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        const int row = first + k * kThreads + int(threadIdx.x);
        const bool inside = row < rows;
        counts[k] = inside && row_counts(args, part + row);
        significance[k] = inside ? args.significance[part + row] : 0.0f;
        mass[k] = inside && args.mass ? args.mass[part + row] : 1.0f;
      }
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k)
        if (counts[k]) control_add_row(sums, significance[k], mass[k], threshold, args.settings);
    }
    control_sum_over_lanes(sums);
    if (lane_in_warp() == 0) control_merge(warp_sum, sums);
  }
}

__device__ inline void control_sum_rows(const ControlArgs& args, int64_t begin, int64_t end,
                                        WarpSums& warp_sums) {
  ControlSums& warp_sum = warp_sums.get()[warp_in_block()];
  if (lane_in_warp() == 0) warp_sum = ControlSums();
  if (args.mass)
    control_sum_rows<double>(args, begin, end, warp_sum);
  else
    control_sum_rows<float>(args, begin, end, warp_sum);
}

// The sum of `count` sums in memory, those of warps or of blocks; for each lane of the warp.
__device__ inline ControlSums control_sum_of(const ControlSums* parts, int count) {
  ControlSums sums;
#pragma unroll 1
  for (int i = lane_in_warp(); i < count; i += kWarp) control_merge(sums, parts[i]);
  control_sum_over_lanes(sums);
  return sums;
}

// One step of the law; to be called by one thread.
__device__ inline void control_step(const ControlArgs& args, const ControlSums& sums,
                                    int64_t overflow) {
  if (args.invalid) *args.invalid = int32_t(sums.invalid);
  if (args.values) control_advance(args.values, args.counters, sums, *args.setpoint, overflow);
}

}  // namespace sparse_kernels::cuda
