// The threshold controller: one pass over a batch's significance, then one step of control_law.h.
// Bytes per row: 4, plus 1, 4 or 8 for its label and 4 for its mass where these are given.
#pragma once

#include <cstdint>

#include "sparse_kernels/control_law.h"

namespace sparse_kernels {

struct ControlArgs {
  float* values;              // [states, kControlValues], updated in place
  int64_t* counters;          // [states, kControlCounters], updated in place
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
