// From a mask on the device to packed indices, ascending; count and overflow stay on the device.
//
// Up to kOneLaunch flags: one launch and no temporary storage. Each block counts all the flags
// (64 KB at most, from L2) instead of waiting for the blocks before it.
// Above: CUB's single-pass select (two kernels of its own), then a kernel that pads the tail.
//
// Bytes, for R flags, K kept, C slots: R read, 12 C written, 4 K read where there are weights. At
// 4.3 TB/s (an H200's copy, read and write) 16M flags with 10% kept and C = K take at least 8.6 us.
#pragma once

#include <cstdint>

#include "place.h"

namespace sparse_kernels::cuda {

constexpr int32_t kOneLaunch = 65536;

struct PackedRows {
  const float* weight_in;  // [rows], or null: 1 for each row
  int64_t* index;          // [capacity]; 0 on padding
  float* weight;           // [capacity]; 0 on padding
  int32_t capacity;
};

struct CompactArgs {
  const uint8_t* mask;  // [rows], a flag is a byte, set where it is not 0; any alignment
  int32_t rows;
  PackedRows packed;
  int32_t* count;     // rows kept
  int32_t* overflow;  // rows set that did not fit
};

// Temporary storage that ``compact`` wants for so many rows on this device; 0 up to kOneLaunch.
int64_t compact_storage_bytes(int32_t rows, const Place& place);

// ``storage`` is aligned to 256 bytes.
void compact(const CompactArgs& args, void* storage, int64_t storage_bytes, const Place& place);

}  // namespace sparse_kernels::cuda
