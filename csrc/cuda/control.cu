#include "block.cuh"
#include "control_sums.cuh"
#include "launch.h"
#include "sparse_kernels/cuda/control.h"

namespace sparse_kernels::cuda {
namespace {

// A block for each state.
__global__ void __launch_bounds__(kThreads, 1)
    control_states(ControlArgs args, const int32_t* overflow, int64_t rows) {
  __shared__ WarpSums warp_sums;
  const int64_t state = blockIdx.x, first = state * rows;
  args.significance += first;
  if (args.labels) args.labels = static_cast<const char*>(args.labels) + first * args.label_bytes;
  if (args.mass) args.mass += first;
  args.values += state * kControlValues;
  args.counters += state * kControlCounters;
  args.setpoint += state;
  if (args.invalid) args.invalid += state;
  control_sum_rows(args, 0, rows, warp_sums);
  __syncthreads();
  if (warp_in_block() != 0) return;
  const ControlSums sums = control_sum_of(warp_sums.get(), kWarps);
  if (lane_in_warp() == 0) control_step(args, sums, overflow ? overflow[state] : 0);
}

}  // namespace

void control(const ControlArgs& args, const int32_t* overflow, int64_t states, int64_t rows,
             const DeviceStream& device_stream) {
  set_device(device_stream);
  if (states > 0)
    launch("control", control_states, states, kThreads, device_stream, args, overflow, rows);
}

}  // namespace sparse_kernels::cuda
