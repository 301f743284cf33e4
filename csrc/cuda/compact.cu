#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "compact_output.cuh"
#include "compact_tiles.cuh"
#include "launch.h"

// After the tiles: in the other order nvcc 13 unrolls these kernels' controller sums differently.
#include "compact_shares.cuh"
#include "sparse_kernels/cuda/compact.h"

namespace sparse_kernels::cuda {
namespace {

constexpr int64_t kAligned = 256;

int64_t aligned(int64_t bytes) { return (bytes + kAligned - 1) / kAligned * kAligned; }

// Above kMaxTiled a block for each multiprocessor, or fewer where there are fewer steps.
int blocks_for(int32_t rows, const DeviceStream& device_stream) {
  if (rows <= kMaxTiled)
    return rows ? (rows + kTile - 1) / kTile : 1;  // at least one, for the padding
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                               device_stream.device),
        "cudaDeviceGetAttribute");
  return std::min(multiprocessors, steps_of(rows, 0));
}

// Divides the storage into its parts and returns the number of bytes that they take.
int64_t lay_out(int32_t rows, int blocks, bool with_control, void* storage, Scratch& scratch) {
  uintptr_t address = reinterpret_cast<uintptr_t>(storage);
  const auto take = [&](auto*& part, int64_t count) {
    using Part = std::remove_pointer_t<std::remove_reference_t<decltype(part)>>;
    part = reinterpret_cast<Part*>(address);
    address += uintptr_t(aligned(count * int64_t(sizeof(Part))));
  };
  if (with_control) {
    take(scratch.blocks_finished, 1);
    take(scratch.block_sums, blocks);
  }
  if (rows > kMaxTiled) {
    take(scratch.block_counts, blocks);
    take(scratch.warp_counts, int64_t(blocks) * kWarps);
    take(scratch.flag_bits, int64_t(steps_of(rows, 15)) * kWarp);
  }
  return int64_t(address - reinterpret_cast<uintptr_t>(storage));
}

}  // namespace

int64_t compact_storage_bytes(int32_t rows, bool with_control, const DeviceStream& device_stream) {
  Scratch scratch{};
  return lay_out(rows, blocks_for(rows, device_stream), with_control, nullptr, scratch);
}

void compact(const CompactArgs& args, const ControlArgs* control, void* storage,
             int64_t storage_bytes, const DeviceStream& device_stream) {
  set_device(device_stream);
  const int blocks = blocks_for(args.rows, device_stream);
  Scratch scratch{};
  if (lay_out(args.rows, blocks, control != nullptr, storage, scratch) > storage_bytes)
    throw std::invalid_argument("compact: the storage is smaller than compact_storage_bytes");
  const ControlArgs controlled = control ? *control : ControlArgs{};
  if (args.rows <= kMaxTiled) {
    launch("compact", compact_tiles, blocks, kThreads, device_stream, args, controlled, scratch);
    return;
  }
  launch("count_shares", count_shares, blocks, kThreads, device_stream, args, controlled, scratch);
  launch("pack_shares", pack_shares, blocks, kThreads, device_stream, args, controlled, scratch);
}

}  // namespace sparse_kernels::cuda
