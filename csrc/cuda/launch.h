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

// ``cooperative``: the blocks may wait for one another; more than fit on the device at once are an
// error.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            const Place& place, bool cooperative, Parameters... arguments) {
  if (blocks > INT32_MAX) throw std::invalid_argument(std::string(name) + ": too many blocks");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = static_cast<cudaStream_t>(place.stream);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace sparse_kernels::cuda
