// Compaction on the device: from a mask to the packed indices of its set rows, in ascending order.
// Count and overflow stay on the device. One launch up to kMaxTiled rows and two above, which can
// include a step of the threshold controller.
//
// Up to kMaxTiled flags each block packs a tile; to find its first slot it counts all flags itself
// (at most 64 KB, from L2) instead of waiting for the blocks before it. Above, one launch counts
// the flags of a share for each multiprocessor and stores them as bits, and one packs the shares;
// compact_shares.cuh says why there are two. No block ever waits for another, so the kernels end
// whatever else is on the device. (CUB's select would be two launches, with a third to pad, and
// none of them can include the controller's sums. benchmarks/gpu_cases.py times it as well.)
//
// Bytes, for R flags, K rows kept, C slots: R read, 12 C written, 4 K read where there are weights;
// above kMaxTiled R/8 written and read again, within L2. At 4.3 TB/s (an H200's copy, read and
// write) 16M flags with 10% kept and C = K take at least 8.6 us. The controller adds the bytes that
// control.h states.
#pragma once

#include <cstdint>

#include "sparse_kernels/cuda/control.h"
#include "sparse_kernels/cuda/device_stream.h"

namespace sparse_kernels::cuda {

constexpr int32_t kMaxTiled = 65536;

struct PackedRows {
  const float* weight_in;  // [rows], or null: 1 for each row
  int64_t* index;          // [capacity]; 0 on padding
  float* weight;           // [capacity]; 0 on padding
  int32_t capacity;
};

struct CompactArgs {
  const uint8_t* mask;  // [rows]; a flag is a byte, set where it is not 0; any alignment
  int32_t rows;
  PackedRows packed;
  int32_t* count;     // number of rows kept
  int32_t* overflow;  // number of set rows that did not fit
};

// The bytes of temporary storage that compact needs for `rows` rows on this device, with or without
// a controller; 0 without a controller up to kMaxTiled rows.
int64_t compact_storage_bytes(int32_t rows, bool with_control, const DeviceStream& device_stream);

// `storage` is aligned to 256 bytes. With `control`, which has one state, the first four bytes of
// storage must be 0 when the kernel begins: it counts the blocks that have finished there.
void compact(const CompactArgs& args, const ControlArgs* control, void* storage,
             int64_t storage_bytes, const DeviceStream& device_stream);

}  // namespace sparse_kernels::cuda
