// The controller on the device: control_law.h's law after one pass over the significance. In a
// gate's step that pass and the law are part of the compaction (compact.h); alone, a launch of a
// block for each state.
//
// Sums are taken in one order whatever block comes first: in float over the 512 rows that a warp
// takes at a time (in double where rows have masses), then in double, by warp, by block.
//
// Bytes: 4 a row, the labels' 1, 4 or 8 and the mass's 4 where they are given.
#pragma once

#include <cstdint>

#include "../control_law.h"
#include "place.h"

namespace sparse_kernels::cuda {

struct ControlArgs {
  const float* significance;  // [states, rows]
  const void* labels;         // [states, rows] of label_bytes each, or null: every row counts
  int label_bytes;            // 1, 4 or 8
  int64_t ignore_index;       // a row with this label does not count
  const float* mass;          // [states, rows], or null: 1 each
  float* values;              // [states, kControlValues], moved in place; null: only NaN is counted
  int64_t* counters;          // [states, kControlCounters], moved in place
  const float* setpoint;      // [states]
  int32_t* invalid;           // [states], rows of NaN; or null
  ControlSettings settings;
};

// ``overflow``: [states], or null: none.
void control(const ControlArgs& args, const int32_t* overflow, int64_t states, int64_t rows,
             const Place& place);

}  // namespace sparse_kernels::cuda
