// What every launch needs: where it goes, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "place.h"

namespace sparse_kernels::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// This library's runtime is linked statically and has its own notion of the current device, so the
// device is set for each call. It is the caller's current device already (place.h), so there is
// nothing to put back, and nothing is asked of a runtime that may not know what PyTorch's did.
inline void enter(const Place& place) { check(cudaSetDevice(place.device), "cudaSetDevice"); }

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            const Place& place, Parameters... arguments) {
  if (blocks > INT32_MAX) throw std::invalid_argument(std::string(name) + ": too many blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = static_cast<cudaStream_t>(place.stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace sparse_kernels::cuda
