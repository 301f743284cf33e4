// What cub::DeviceSelect::Flagged is documented to do, in a loop: with it the iterators that it is
// given and the kernel after it run on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace cub {

struct DeviceSelect {
  template <class In, class Flags, class Out, class Count>
  static cudaError_t Flagged(void* storage, size_t& bytes, In in, Flags flags, Out out, Count count,
                             int64_t items, cudaStream_t) {
    if (!storage) {
      bytes = 1000;
      return cudaSuccess;
    }
    std::memset(storage, 0xa5, bytes);
    int32_t selected = 0;
    for (int64_t i = 0; i < items; ++i)
      if (flags[i]) (out + selected++)[0] = in[i];
    *count = selected;
    return cudaSuccess;
  }
};

}  // namespace cub
