#include <algorithm>
#include <cub/device/device_select.cuh>

#include "compact.h"
#include "compact_kernels.cuh"
#include "launch.h"

namespace sparse_kernels::cuda {
namespace {

constexpr int64_t kTotalBytes = 256;  // the select's count, before CUB's storage and as aligned
constexpr int64_t kFinishBlocks = 1024;

cudaError_t select(const CompactArgs& args, void* storage, size_t& bytes, int32_t* total,
                   const Place& place) {
  return cub::DeviceSelect::Flagged(storage, bytes, Rows{0}, args.mask, Slots{args.packed, 0},
                                    total, args.rows, static_cast<cudaStream_t>(place.stream));
}

}  // namespace

int64_t compact_storage_bytes(int32_t rows, const Place& place) {
  if (rows <= kOneLaunch) return 0;
  enter(place);
  CompactArgs args{};
  args.rows = rows;
  size_t bytes = 0;
  check(select(args, nullptr, bytes, nullptr, place), "DeviceSelect's storage");
  return kTotalBytes + int64_t(bytes);
}

void compact(const CompactArgs& args, void* storage, int64_t storage_bytes, const Place& place) {
  enter(place);
  if (args.rows <= kOneLaunch) {
    const int tiles = args.rows ? (args.rows + kTile - 1) / kTile : 1;  // one to pad
    launch("compact", compact_tiles, tiles, kThreads, place, args);
    return;
  }
  if (storage_bytes <= kTotalBytes) throw std::invalid_argument("compact: too little storage");
  int32_t* const total = static_cast<int32_t*>(storage);
  size_t bytes = size_t(storage_bytes - kTotalBytes);
  check(select(args, static_cast<char*>(storage) + kTotalBytes, bytes, total, place),
        "DeviceSelect");
  const int64_t blocks = (int64_t(args.packed.capacity) + kThreads - 1) / kThreads;
  launch("compact's padding", finish_select, std::clamp<int64_t>(blocks, 1, kFinishBlocks),
         kThreads, place, args, static_cast<const int32_t*>(total));
}

}  // namespace sparse_kernels::cuda
