#include <cstdint>
#include <stdexcept>

#include "gather_kernels.cuh"
#include "launch.h"
#include "sparse_kernels/cuda/gather.h"

namespace sparse_kernels::cuda {
namespace {

// The least power of two of lanes, up to a warp's 32, that move a row at 16 bytes each.
int lanes_for(int64_t row_bytes) {
  int lanes = 1;
  while (lanes < 32 && lanes * 16 < row_bytes) lanes *= 2;
  return lanes;
}

template <bool kScatter>
void move(const RowsToMove* tensors, int count, const int64_t* index, int64_t slots,
          const int32_t* kept, int64_t rows, const DeviceStream& device_stream) {
  set_device(device_stream);
  for (int next = 0; next < count;) {
    MoveTable table{};
    table.index = index;
    table.slots = slots;
    table.rows = rows;
    table.kept = kept;
    int64_t blocks = 0;
    for (; next < count && table.count < kTensors; ++next) {
      const RowsToMove& tensor = tensors[next];
      if (tensor.row_bytes <= 0) continue;
      const int t = table.count++;
      table.tensors[t] = tensor;
      table.lanes[t] = lanes_for(tensor.row_bytes);
      table.chunks[t] = (tensor.row_bytes + kChunk - 1) / kChunk;
      table.first_block[t] = int32_t(blocks);
      const int64_t groups = kMoveThreads / table.lanes[t];
      blocks += (slots * table.chunks[t] + groups - 1) / groups;
      if (blocks > INT32_MAX)
        throw std::invalid_argument("too many rows for the blocks of one grid");
    }
    if (blocks > 0)
      launch("move_rows", move_rows<kScatter>, blocks, kMoveThreads, device_stream, table);
  }
}

}  // namespace

void gather_rows(const RowsToMove* tensors, int count, const int64_t* index, int64_t slots,
                 int64_t rows, const DeviceStream& device_stream) {
  move<false>(tensors, count, index, slots, nullptr, rows, device_stream);
}

void scatter_rows(const RowsToMove* tensors, int count, const int64_t* index, int64_t slots,
                  const int32_t* kept, int64_t rows, const DeviceStream& device_stream) {
  move<true>(tensors, count, index, slots, kept, rows, device_stream);
}

}  // namespace sparse_kernels::cuda
