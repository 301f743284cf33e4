// The threshold controller on the device: one pass over a batch's significance, then one step of
// control_law.h. A gate's step does both within the compaction (compact.h); a call by itself is one
// launch with a block for each state.
//
// The order of the sums is fixed: in float over the 512 rows that a warp takes at a time (in double
// where rows have masses), then in double over a block's warps, then over the blocks.
//
// Bytes per row: 4, plus 1, 4 or 8 for its label and 4 for its mass where these are given.
#pragma once

#include <cstdint>

#include "sparse_kernels/control_law.h"
#include "sparse_kernels/cuda/device_stream.h"

namespace sparse_kernels::cuda {

struct ControlArgs {
  const float* significance;  // [states, rows]
  const void* labels;         // [states, rows] of label_bytes each, or null: every row counts
  int label_bytes;            // 1, 4 or 8
  int64_t ignore_index;       // a row with this label does not count
  const float* mass;          // [states, rows], or null: 1 each
  float* values;          // [states, kControlValues], updated in place; null: only NaN is counted
  int64_t* counters;      // [states, kControlCounters], updated in place
  const float* setpoint;  // [states]
  int32_t* invalid;       // [states], number of rows whose significance is NaN; or null
  ControlSettings settings;
};

// `overflow`: [states], or null: none.
void control(const ControlArgs& args, const int32_t* overflow, int64_t states, int64_t rows,
             const DeviceStream& device_stream);

}  // namespace sparse_kernels::cuda
