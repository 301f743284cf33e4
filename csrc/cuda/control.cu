#include "control.h"
#include "control_sums.cuh"
#include "launch.h"

namespace sparse_kernels::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 1)
    control_states(ControlArgs args, const int32_t* overflow, int64_t rows) {
  __shared__ SumsOfWarps of_warp;
  const int64_t state = blockIdx.x, first = state * rows;
  args.significance += first;
  if (args.labels) args.labels = static_cast<const char*>(args.labels) + first * args.label_bytes;
  if (args.mass) args.mass += first;
  args.values += state * kControlValues;
  args.counters += state * kControlCounters;
  args.setpoint += state;
  if (args.invalid) args.invalid += state;
  control_sum_rows(args, 0, rows, of_warp);
  __syncthreads();
  if (warp_of_block() != 0) return;
  const ControlSums sums = control_add_all(of_warp.get(), kWarps);
  if (lane_of_warp() == 0) control_move(args, sums, overflow ? overflow[state] : 0);
}

}  // namespace

void control(const ControlArgs& args, const int32_t* overflow, int64_t states, int64_t rows,
             const Place& place) {
  enter(place);
  if (states > 0)
    launch("control", control_states, states, kThreads, place, false, args, overflow, rows);
}

}  // namespace sparse_kernels::cuda
