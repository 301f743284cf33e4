// Where a call runs. Like all headers that bindings include, it needs none of CUDA's.
#pragma once

#include <cstdint>

namespace sparse_kernels::cuda {

// The caller makes `device` its own current device before the call and restores the previous one
// after it; the call leaves `device` current. Work is only enqueued on `stream`, a cudaStream_t of
// that device: no call waits or allocates, so each can be captured in a CUDA graph. All pointers
// are to memory of that device. Launch errors are thrown as std::runtime_error.
struct DeviceStream {
  int device;
  void* stream;
};

}  // namespace sparse_kernels::cuda
