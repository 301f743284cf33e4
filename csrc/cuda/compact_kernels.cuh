// The kernels of compact.cu: they need the CUDA language and nothing else.
#pragma once

#include <cuda_runtime.h>

#include <iterator>

#include "compact.h"

namespace sparse_kernels::cuda {

constexpr int kThreads = 1024;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;  // a lane for each warp's count: one warp adds them up
constexpr int kFlagsPerLane = 4;
constexpr int kTile = kThreads * kFlagsPerLane;  // flags of a block
static_assert(kWarps == kWarp, "the block's counts are summed by the lanes of a warp");

__device__ inline int add_lanes(int value) {
  for (int other = kWarp / 2; other > 0; other /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

__device__ inline int set_bytes(uint32_t four) {
  return __popc((((four & 0x7f7f7f7fu) + 0x7f7f7f7fu) | four) & 0x80808080u);
}

// This thread's share of the flags set in [begin, end): 16 bytes at a time between the head and the
// tail that are not aligned.
__device__ inline int count_share(const uint8_t* mask, int begin, int end) {
  const int thread = int(threadIdx.x);
  const int to_aligned = int(-(reinterpret_cast<uintptr_t>(mask) + unsigned(begin)) % 16);
  const int head = begin + to_aligned < end ? begin + to_aligned : end;
  const int words = (end - head) / 16;
  const int tail = head + 16 * words;
  int sum = 0;
  if (begin + thread < head) sum += mask[begin + thread] != 0;
  if (tail + thread < end) sum += mask[tail + thread] != 0;
  const uint4* const wide = reinterpret_cast<const uint4*>(mask + head);
  for (int i = thread; i < words; i += kThreads) {
    const uint4 word = wide[i];
    sum += set_bytes(word.x) + set_bytes(word.y) + set_bytes(word.z) + set_bytes(word.w);
  }
  return sum;
}

__device__ inline void put(const PackedRows& packed, int slot, int row) {
  if (slot >= packed.capacity) return;
  packed.index[slot] = row;
  packed.weight[slot] = packed.weight_in ? packed.weight_in[row] : 1.0f;
}

// Count, overflow and padding, shared among all the threads of the grid.
__device__ inline void finish(const CompactArgs& args, int total) {
  const int capacity = args.packed.capacity;
  const int kept = total < capacity ? total : capacity;
  const int thread = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (thread == 0) {
    *args.count = kept;
    *args.overflow = total - kept;
  }
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;  // 64 bits: a slot may be near 2^31
  for (int64_t slot = int64_t(kept) + thread; slot < capacity; slot += stride) {
    args.packed.index[slot] = 0;
    args.packed.weight[slot] = 0.0f;
  }
}

// A block for each tile; rows are at most kOneLaunch. A warp ranks its flags by ballots; its first
// slot is what is set before the tile plus what the warps before it have.
__global__ void __launch_bounds__(kThreads, 1) compact_tiles(CompactArgs args) {
  __shared__ int in_warp[kWarps], before_tile[kWarps], from_tile[kWarps];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int tile = int(blockIdx.x) * kTile;
  const int first = tile + warp * (kWarp * kFlagsPerLane) + lane;

  uint32_t ballots[kFlagsPerLane];
  int own = 0;
#pragma unroll
  for (int k = 0; k < kFlagsPerLane; ++k) {
    const int row = first + k * kWarp;
    ballots[k] = __ballot_sync(0xffffffffu, row < args.rows && args.mask[row] != 0);
    own += __popc(ballots[k]);
  }
  const int before = add_lanes(count_share(args.mask, 0, tile));
  const int from = add_lanes(count_share(args.mask, tile, args.rows));
  if (lane == 0) {
    in_warp[warp] = own;
    before_tile[warp] = before;
    from_tile[warp] = from;
  }
  __syncthreads();
  const int selected_before = add_lanes(before_tile[lane]);
  const int total = selected_before + add_lanes(from_tile[lane]);
  int slot = selected_before + add_lanes(lane < warp ? in_warp[lane] : 0);
#pragma unroll
  for (int k = 0; k < kFlagsPerLane; ++k) {
    if (ballots[k] >> lane & 1u)
      put(args.packed, slot + __popc(ballots[k] & ((1u << lane) - 1u)), first + k * kWarp);
    slot += __popc(ballots[k]);
  }
  finish(args, total);
}

// After a select that left its count in ``total``. Not in args.count: that is written here, while
// other blocks read.
__global__ void __launch_bounds__(kThreads) finish_select(CompactArgs args, const int32_t* total) {
  finish(args, *total);
}

// What CUB selects from and into. Iterators of our own: CUB's moved to another namespace between
// CUDA 12 and 13.
struct Rows {  // 0, 1, 2, ...
  using iterator_category = std::random_access_iterator_tag;
  using value_type = int32_t;
  using difference_type = int64_t;
  using pointer = const int32_t*;
  using reference = int32_t;
  int64_t at;
  __host__ __device__ reference operator*() const { return int32_t(at); }
  __host__ __device__ reference operator[](int64_t i) const { return int32_t(at + i); }
  __host__ __device__ Rows operator+(int64_t i) const { return {at + i}; }
};

struct Slot {
  const PackedRows& packed;
  int64_t at;
  __device__ const Slot& operator=(int32_t row) const {
    put(packed, int(at), row);
    return *this;
  }
};

struct Slots {  // takes rows; writes an index and a weight, and drops what is past the capacity
  using iterator_category = std::random_access_iterator_tag;
  using value_type = int32_t;
  using difference_type = int64_t;
  using pointer = void;
  using reference = Slot;
  PackedRows packed;
  int64_t at;
  __host__ __device__ reference operator*() const { return {packed, at}; }
  __host__ __device__ reference operator[](int64_t i) const { return {packed, at + i}; }
  __host__ __device__ Slots operator+(int64_t i) const { return {packed, at + i}; }
};

}  // namespace sparse_kernels::cuda
