// cub::DeviceSelect::Flagged called bare, as a peer for the compaction: the indices of the flags that are set.
#include <cstdint>
#include <cub/device/device_select.cuh>
#include <thrust/iterator/counting_iterator.h>

// With temporary == nullptr only *temporary_bytes is written. Returns the cudaError_t.
extern "C" int cub_select(const uint8_t* flags, int64_t* index, int32_t* count, int64_t rows, void* temporary,
                          size_t* temporary_bytes, cudaStream_t stream) {
  return cub::DeviceSelect::Flagged(temporary, *temporary_bytes, thrust::counting_iterator<int64_t>(0), flags,
                                    index, count, rows, stream);
}
