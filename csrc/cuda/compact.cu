#include <algorithm>

#include "compact.h"
#include "compact_kernels.cuh"
#include "launch.h"

namespace sparse_kernels::cuda {
namespace {

constexpr int64_t kAligned = 256;

int64_t aligned(int64_t bytes) { return (bytes + kAligned - 1) / kAligned * kAligned; }

// A block for each processor fits whatever else its kernel uses (__launch_bounds__); fewer where
// there are not so many steps.
int blocks_for(int32_t rows, const Place& place) {
  if (rows <= kMaxTiled) return rows ? (rows + kTile - 1) / kTile : 1;  // one to pad
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, place.device),
        "cudaDeviceGetAttribute");
  return std::min(processors, steps_of(rows, 0));
}

// The parts of the storage and, from null, its size.
int64_t lay_out(int32_t rows, int blocks, bool with_control, void* storage, Between& between) {
  uintptr_t at = reinterpret_cast<uintptr_t>(storage);
  const auto take = [&](auto*& part, int64_t count) {
    using Part = std::remove_pointer_t<std::remove_reference_t<decltype(part)>>;
    part = reinterpret_cast<Part*>(at);
    at += uintptr_t(aligned(count * int64_t(sizeof(Part))));
  };
  if (with_control) {
    take(between.finished, 1);
    take(between.of_block, blocks);
  }
  if (rows > kMaxTiled) {
    take(between.counts, blocks);
    take(between.bits, int64_t(steps_of(rows, 15)) * kWarp);
  }
  return int64_t(at - reinterpret_cast<uintptr_t>(storage));
}

}  // namespace

int64_t compact_storage_bytes(int32_t rows, bool with_control, const Place& place) {
  Between between{};
  return lay_out(rows, blocks_for(rows, place), with_control, nullptr, between);
}

void compact(const CompactArgs& args, const ControlArgs* control, void* storage,
             int64_t storage_bytes, const Place& place) {
  enter(place);
  const int blocks = blocks_for(args.rows, place);
  Between between{};
  if (lay_out(args.rows, blocks, control != nullptr, storage, between) > storage_bytes)
    throw std::invalid_argument("compact: too little storage");
  const bool tiled = args.rows <= kMaxTiled;
  launch("compact", tiled ? compact_tiles : compact_shares, blocks, kThreads, place, !tiled, args,
         control ? *control : ControlArgs{}, between);
}

}  // namespace sparse_kernels::cuda
