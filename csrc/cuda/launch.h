// Launches a kernel; errors become exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "sparse_kernels/cuda/device_stream.h"

namespace sparse_kernels::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// The CUDA runtime is linked statically and has a current device of its own, so each call sets it.
// It is the caller's current device already (device_stream.h), so there is nothing to restore.
inline void set_device(const DeviceStream& device_stream) {
  check(cudaSetDevice(device_stream.device), "cudaSetDevice");
}

// Blocks may run in any order, one after the other: none waits for another.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            const DeviceStream& device_stream, Parameters... arguments) {
  if (blocks > INT32_MAX) throw std::invalid_argument(std::string(name) + ": too many blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = static_cast<cudaStream_t>(device_stream.stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace sparse_kernels::cuda
