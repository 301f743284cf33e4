// What the compaction kernels share: their scratch memory and how they write rows, totals and
// padding.
//
// Hazard: a row's number has 32 bits, but numbers beyond the last row (of a share's last step, of a
// slot of padding) need 64.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "sparse_kernels/control_law.h"
#include "sparse_kernels/cuda/compact.h"

namespace sparse_kernels::cuda {

// Memory that the blocks of a compaction share, in compact's storage.
struct Scratch {
  unsigned* blocks_finished;  // their number; of compact_tiles with a controller
  ControlSums* block_sums;    // [blocks]; null: no controller
  int32_t* block_counts;      // [blocks], flags set in each share
  int32_t* warp_counts;       // [blocks, kWarps], flags set in each warp's part of it
  uint16_t* flag_bits;        // [steps, kWarp], 16 flags for each lane
};

// Bit 7 of each byte is set where the byte is not 0; all other bits are 0.
__device__ inline uint32_t high_bits(uint32_t four) {
  return (((four & 0x7f7f7f7fu) + 0x7f7f7f7fu) | four) & 0x80808080u;
}

__device__ inline void write_slot(const PackedRows& packed, int slot, int row) {
  if (slot >= packed.capacity) return;
  packed.index[slot] = row;
  packed.weight[slot] = packed.weight_in ? packed.weight_in[row] : 1.0f;
}

__device__ inline int overflow_of(const CompactArgs& args, int total) {
  return total > args.packed.capacity ? total - args.packed.capacity : 0;
}

// Writes count, overflow and padding; all threads of the grid take part.
__device__ inline void write_totals(const CompactArgs& args, int total) {
  const int overflow = overflow_of(args, total), kept = total - overflow;
  const int thread = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (thread == 0) {
    *args.count = kept;
    *args.overflow = overflow;
  }
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;  // 64 bits: a slot may be near 2^31
  for (int64_t slot = int64_t(kept) + thread; slot < args.packed.capacity; slot += stride) {
    args.packed.index[slot] = 0;
    args.packed.weight[slot] = 0.0f;
  }
}

}  // namespace sparse_kernels::cuda
