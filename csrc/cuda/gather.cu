#include <algorithm>

#include "gather.h"
#include "gather_kernels.cuh"
#include "launch.h"

namespace sparse_kernels::cuda {
namespace {

int lanes_for(int64_t row_bytes) {
  int lanes = 1;
  while (lanes < 32 && lanes * 16 < row_bytes) lanes *= 2;
  return lanes;
}

template <bool kScatter>
void move(const RowsToMove* tensors, int count, const int64_t* index, int64_t slots,
          const int32_t* kept, int64_t rows, const Place& place) {
  enter(place);
  for (int at = 0; at < count;) {
    Table table{};
    table.index = index;
    table.slots = slots;
    table.rows = rows;
    table.kept = kept;
    int64_t blocks = 0;
    for (; at < count && table.count < kTensors; ++at) {
      const RowsToMove& tensor = tensors[at];
      if (tensor.row_bytes <= 0) continue;
      const int t = table.count++;
      table.tensors[t] = tensor;
      table.lanes[t] = lanes_for(tensor.row_bytes);
      table.chunks[t] = (tensor.row_bytes + kChunk - 1) / kChunk;
      table.first_block[t] = int32_t(blocks);
      const int64_t groups = kMoveThreads / table.lanes[t];
      blocks += (slots * table.chunks[t] + groups - 1) / groups;
      if (blocks > INT32_MAX) throw std::invalid_argument("more rows than a grid has blocks for");
    }
    if (blocks > 0)
      launch("move_rows", move_rows<kScatter>, blocks, kMoveThreads, place, false, table);
  }
}

}  // namespace

void gather_rows(const RowsToMove* tensors, int count, const int64_t* index, int64_t slots,
                 int64_t rows, const Place& place) {
  move<false>(tensors, count, index, slots, nullptr, rows, place);
}

void scatter_rows(const RowsToMove* tensors, int count, const int64_t* index, int64_t slots,
                  const int32_t* kept, int64_t rows, const Place& place) {
  move<true>(tensors, count, index, slots, kept, rows, place);
}

}  // namespace sparse_kernels::cuda
