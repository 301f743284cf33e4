// Gather and scatter of rows by index on the device. Rows are moved as bytes, whatever their type.
// One launch moves the rows of up to kTensors tensors; their descriptors are the kernel's
// parameter.
//
// Bytes: each row moved is read once and written once, and its 8-byte index is read. At 4.3 TB/s
// (an H200's copy, read and write) 10% of 65,536 rows of 4 KB, 27 MB each way, take at least
// 12.5 us.
#pragma once

#include <cstdint>

#include "sparse_kernels/cuda/device_stream.h"

namespace sparse_kernels::cuda {

constexpr int kTensors = 32;

struct RowsToMove {
  const void* in;
  void* out;          // rows of row_bytes, packed
  int64_t in_stride;  // bytes from a row of `in` to the next; any value, including 0
  int64_t row_bytes;  // bytes of a row, which are contiguous in both
};

// out[slot] = in[index[slot]] for every slot. A row whose index is outside [0, rows) is zeros:
// nothing outside `in` is read.
void gather_rows(const RowsToMove* tensors, int count, const int64_t* index, int64_t slots,
                 int64_t rows, const DeviceStream& device_stream);

// The transpose: out[index[slot]] = in[slot] for the slots before *kept, an integer on the device;
// the other rows of out do not change. Slots whose index is outside [0, rows) are skipped. Indices
// must be unique, since there are no atomics; of two slots with the same index either may win.
void scatter_rows(const RowsToMove* tensors, int count, const int64_t* index, int64_t slots,
                  const int32_t* kept, int64_t rows, const DeviceStream& device_stream);

}  // namespace sparse_kernels::cuda
