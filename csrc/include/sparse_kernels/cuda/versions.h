// Versions that decide if a kernel can be launched at all. No device is touched.
#pragma once

namespace sparse_kernels::cuda {

// As CUDA numbers them: 12040 for 12.4.
struct Versions {
  int runtime;  // linked into this module
  int driver;   // the newest that the installed driver supports; 0 without a driver
};

Versions versions();

}  // namespace sparse_kernels::cuda
