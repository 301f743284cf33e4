// From a mask on the device to packed indices, ascending; count and overflow stay on the device.
// One launch, and in it, where that is asked for, the controller's sums and its law.
//
// Up to kMaxTiled flags a block takes a tile, and counts all the flags (64 KB at most, from L2)
// instead of waiting for the blocks before it. Above, a cooperative grid of a block for each
// processor: each counts its share and leaves it as bits, all wait for all, each packs its share.
// (Not CUB's select: that is two launches, a third pads, and none can carry the controller's sums.
// benchmarks/gpu_cases.py times it beside this one.)
//
// Bytes, for R flags, K kept, C slots: R read, 12 C written, 4 K read where there are weights;
// above kMaxTiled R/8 written and read again, which stay in L2. At 4.3 TB/s (an H200's copy, read
// and write) 16M flags with 10% kept and C = K take at least 8.6 us. The controller reads
// control.h's bytes besides.
#pragma once

#include <cstdint>

#include "control.h"
#include "place.h"

namespace sparse_kernels::cuda {

constexpr int32_t kMaxTiled = 65536;

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

// Temporary storage that ``compact`` wants for so many rows on this device, without or with a
// controller; 0 without one up to kMaxTiled.
int64_t compact_storage_bytes(int32_t rows, bool with_control, const Place& place);

// ``storage`` is aligned to 256 bytes. With ``control`` (of one state) its first four bytes are 0
// when the kernel begins: the blocks that have finished are counted there.
void compact(const CompactArgs& args, const ControlArgs* control, void* storage,
             int64_t storage_bytes, const Place& place);

}  // namespace sparse_kernels::cuda
