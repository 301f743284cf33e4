// Where a call runs. Free of CUDA's headers, as everything is that bindings.cpp includes.
#pragma once

#include <cstdint>

namespace sparse_kernels::cuda {

// The caller makes ``device`` its own current device before the call and restores it after: the
// call leaves it current. Work is only enqueued on ``stream`` (a cudaStream_t of that device): no
// call waits or allocates, so each can be captured in a CUDA graph. Every pointer is to memory of
// that device. Errors at launch are thrown as std::runtime_error.
struct Place {
  int device;
  void* stream;
};

}  // namespace sparse_kernels::cuda
