// The kernel that moves rows by index, for gather and scatter.
//
// A row is divided into chunks of kChunk bytes, and a group of 1 to 32 lanes moves a chunk: 32 for
// rows of 512 bytes or more, down to one for a label, so that all lanes have work whatever the
// row's size. Each lane issues kInFlight loads before its first store: 128 bytes, 16 at a time.
// Rows that are not short are moved 16 bytes at a time whatever their alignment. Where source and
// destination differ modulo 16, a lane reads the two words that its word spans (the second is in
// L1, read by the neighbouring lane too) and shifts. Rows of less than kShifted bytes would be
// mostly edges; their words have the largest size to which source and destination are equally
// aligned, at worst a byte. The bytes before the first and after the last whole word are moved one
// by one. Nothing outside a row is read or written.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "sparse_kernels/cuda/gather.h"

namespace sparse_kernels::cuda {

constexpr int kMoveThreads = 256;
constexpr int kInFlight = 8;
constexpr int64_t kChunk = 32 * 16 * kInFlight;
constexpr int kShiftedInFlight = 4;  // each takes two loads
constexpr int kShifted = 512;        // bytes of a warp: no lane has more than one byte of an edge

// The rows to move in one launch.
struct MoveTable {
  RowsToMove tensors[kTensors];
  int64_t chunks[kTensors];       // chunks per row
  int32_t lanes[kTensors];        // lanes per chunk: a power of two
  int32_t first_block[kTensors];  // ascending
  int32_t count;
  const int64_t* index;  // [slots]
  int64_t slots;
  int64_t rows;         // the bound of the indices
  const int32_t* kept;  // scatter: number of slots that are not padding
};

template <class Word>
__device__ inline void move_words(const char* from, char* to, int bytes, int lane, int lanes) {
  const Word* const in = reinterpret_cast<const Word*>(from);
  Word* const out = reinterpret_cast<Word*>(to);
  const int words = bytes / int(sizeof(Word));
  for (int first = lane; first < words; first += lanes * kInFlight) {
    Word word[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (first + k * lanes < words) word[k] = in[first + k * lanes];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (first + k * lanes < words) out[first + k * lanes] = word[k];
  }
}

// The 16 bytes that begin `by` bytes after the start of `low`, for by in [0, 16).
__device__ inline uint4 shifted(const uint4& low, const uint4& high, int by) {
  uint32_t word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int k = 0; k < 6; ++k) word[k] = by & 8 ? word[k + 2] : word[k];
#pragma unroll
  for (int k = 0; k < 5; ++k) word[k] = by & 4 ? word[k + 1] : word[k];
  const int bits = by % 4 * 8;
  return {__funnelshift_r(word[0], word[1], bits), __funnelshift_r(word[1], word[2], bits),
          __funnelshift_r(word[2], word[3], bits), __funnelshift_r(word[3], word[4], bits)};
}

// `to` is a multiple of 16, and `from` is `by` bytes past one.
__device__ inline void move_shifted(const char* from, char* to, int words, int by, int lane,
                                    int lanes) {
  const uint4* const in = reinterpret_cast<const uint4*>(from - by);
  uint4* const out = reinterpret_cast<uint4*>(to);
  for (int first = lane; first < words; first += lanes * kShiftedInFlight) {
    uint4 low[kShiftedInFlight], high[kShiftedInFlight];
#pragma unroll
    for (int k = 0; k < kShiftedInFlight; ++k) {
      const int i = first + k * lanes;
      if (i < words) low[k] = in[i], high[k] = in[i + 1];
    }
#pragma unroll
    for (int k = 0; k < kShiftedInFlight; ++k)
      if (first + k * lanes < words) out[first + k * lanes] = shifted(low[k], high[k], by);
  }
}

__device__ inline void move_bytes(const char* from, char* to, int bytes, int lane, int lanes) {
  const uintptr_t source = reinterpret_cast<uintptr_t>(from);
  const uintptr_t target = reinterpret_cast<uintptr_t>(to);
  const uintptr_t difference = source - target;
  const bool shift = difference % 16 != 0 && bytes >= kShifted;
  const int width = shift || difference % 16 == 0 ? 16
                    : difference % 8 == 0         ? 8
                    : difference % 4 == 0         ? 4
                                                  : 1 + (difference % 2 == 0);
  int head = int(-target % unsigned(width)), spare = 0;
  const int by = int((source + unsigned(head)) % 16);
  if (shift) {  // the first word read begins within the row, and the last ends within it
    if (head < by) head += 16;
    spare = 16 - by;
  }
  head = head < bytes ? head : bytes;
  const int body = (bytes - head - spare) / width * width;
  for (int i = lane; i < head; i += lanes) to[i] = from[i];
  for (int i = head + body + lane; i < bytes; i += lanes) to[i] = from[i];
  from += head;
  to += head;
  if (shift)
    move_shifted(from, to, body / 16, by, lane, lanes);
  else if (width == 16)
    move_words<uint4>(from, to, body, lane, lanes);
  else if (width == 8)
    move_words<uint2>(from, to, body, lane, lanes);
  else if (width == 4)
    move_words<uint32_t>(from, to, body, lane, lanes);
  else if (width == 2)
    move_words<uint16_t>(from, to, body, lane, lanes);
  else
    move_words<uint8_t>(from, to, body, lane, lanes);
}

template <bool kScatter>
__global__ void __launch_bounds__(kMoveThreads) move_rows(const __grid_constant__ MoveTable table) {
  int t = 0;
  while (t + 1 < table.count && int(blockIdx.x) >= table.first_block[t + 1]) ++t;
  const int lanes = table.lanes[t];
  const int64_t chunks = table.chunks[t];
  const int64_t block = int64_t(blockIdx.x) - table.first_block[t];
  const int64_t chunk = block * (kMoveThreads / lanes) + int(threadIdx.x) / lanes;
  const int64_t slot = chunks == 1 ? chunk : chunk / chunks;
  if (slot >= table.slots || (kScatter && slot >= *table.kept)) return;

  const int64_t row = table.index[slot];
  const bool inside = row >= 0 && row < table.rows;
  if (kScatter && !inside) return;
  const RowsToMove& tensor = table.tensors[t];
  const int64_t begin = (chunk - slot * chunks) * kChunk;
  const int64_t left = tensor.row_bytes - begin;
  const int bytes = int(left < kChunk ? left : kChunk);
  const int lane = int(threadIdx.x) % lanes;
  char* const to =
      static_cast<char*>(tensor.out) + (kScatter ? row : slot) * tensor.row_bytes + begin;
  if (!inside) {
    for (int i = lane; i < bytes; i += lanes) to[i] = 0;
    return;
  }
  const char* const from =
      static_cast<const char*>(tensor.in) + (kScatter ? slot : row) * tensor.in_stride + begin;
  move_bytes(from, to, bytes, lane, lanes);
}

}  // namespace sparse_kernels::cuda
