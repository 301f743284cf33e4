// Two host queries of the runtime, which need no device.
#include "launch.h"
#include "sparse_kernels/cuda/versions.h"

namespace sparse_kernels::cuda {

Versions versions() {
  Versions found{};
  check(cudaRuntimeGetVersion(&found.runtime), "cudaRuntimeGetVersion");
  check(cudaDriverGetVersion(&found.driver), "cudaDriverGetVersion");
  return found;
}

}  // namespace sparse_kernels::cuda
