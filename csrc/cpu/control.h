// Moves a gate's threshold by one batch: control_law.h's law after one pass over the significance.
// Bytes: 4 a row, the labels' 1, 4 or 8 and the mass's 4 where they are given.
#pragma once

#include <cstdint>

#include "../control_law.h"

namespace sparse_kernels {

struct ControlArgs {
  float* values;              // [states, kControlValues], moved in place
  int64_t* counters;          // [states, kControlCounters], moved in place
  const float* significance;  // [states, rows]
  const void* labels;         // [states, rows] of label_bytes each, or null: every row counts
  int label_bytes;            // 1, 4 or 8
  int64_t ignore_index;       // a row with this label does not count
  const float* mass;          // [states, rows], or null: 1 each
  const float* setpoint;      // [states]
  const int32_t* overflow;    // [states], or null: none
  int64_t states;
  int64_t rows;
  ControlSettings settings;
};

void control(const ControlArgs& args);

}  // namespace sparse_kernels
