// The kernel of gather.cu: it needs the CUDA language and nothing else.
//
// A row is cut into chunks of kChunk bytes, and a group of 1 to 32 lanes moves a chunk: 32 for rows
// of 512 bytes and more, down to one for a label, so that lanes have work whatever the row's size.
// Each lane has kInFlight loads under way before its first store: 128 bytes of 16 each.
// The accesses are of the widest size at which source and destination agree: 16 bytes where their
// addresses are equal modulo 16, and at worst that of an element. What lies before the
// first and after the last whole word goes byte by byte.
#pragma once

#include <cuda_runtime.h>

#include "gather.h"

namespace sparse_kernels::cuda {

constexpr int kMoveThreads = 256;
constexpr int kInFlight = 8;
constexpr int64_t kChunk = 32 * 16 * kInFlight;

struct Table {
  RowsToMove tensors[kTensors];
  int64_t chunks[kTensors];       // of a row
  int32_t lanes[kTensors];        // of a chunk: a power of two
  int32_t first_block[kTensors];  // ascending
  int32_t count;
  const int64_t* index;  // [slots]
  int64_t slots;
  int64_t rows;         // what an index must be below
  const int32_t* kept;  // scatter: slots that are not padding
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

__device__ inline void move_bytes(const char* from, char* to, int bytes, int lane, int lanes) {
  const uintptr_t apart = reinterpret_cast<uintptr_t>(from) - reinterpret_cast<uintptr_t>(to);
  const int width = apart % 16 == 0  ? 16
                    : apart % 8 == 0 ? 8
                    : apart % 4 == 0 ? 4
                                     : 1 + (apart % 2 == 0);
  const int to_aligned = int(-reinterpret_cast<uintptr_t>(to) % unsigned(width));
  const int head = to_aligned < bytes ? to_aligned : bytes;
  const int body = (bytes - head) / width * width;
  for (int i = lane; i < head; i += lanes) to[i] = from[i];
  for (int i = head + body + lane; i < bytes; i += lanes) to[i] = from[i];
  from += head;
  to += head;
  if (width == 16)
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
__global__ void __launch_bounds__(kMoveThreads) move_rows(const __grid_constant__ Table table) {
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
