// Rows by index on the device: bytes are bytes, whatever their type. Up to kTensors tensors go in
// one launch, their descriptors passed by value as the kernel's parameter.
//
// Bytes: each row moved is read once and written once, and its 8-byte index read. At 4.3 TB/s (an
// H200's copy, read and write) 10% of 65,536 rows of 4 KB, 27 MB each way, take at least 12.5 us.
#pragma once

#include <cstdint>

#include "place.h"

namespace sparse_kernels::cuda {

constexpr int kTensors = 32;

struct RowsToMove {
  const void* in;
  void* out;          // rows of row_bytes, packed
  int64_t in_stride;  // bytes from a row of ``in`` to the next; any, 0 too
  int64_t row_bytes;  // bytes of a row, which are contiguous in both
};

// out[slot] = in[index[slot]] for every slot. An index outside [0, rows) gives a row of zeros:
// nothing outside ``in`` is read.
void gather_rows(const RowsToMove* tensors, int count, const int64_t* index, int64_t slots,
                 int64_t rows, const Place& place);

// The transpose: out[index[slot]] = in[slot] for the slots before *kept, a device integer; the
// other rows of out stay as they are. An index outside [0, rows) is skipped. Indices are
// unique, so there are no atomics; of two slots with one index, either may be what is left.
void scatter_rows(const RowsToMove* tensors, int count, const int64_t* index, int64_t slots,
                  const int32_t* kept, int64_t rows, const Place& place);

}  // namespace sparse_kernels::cuda
