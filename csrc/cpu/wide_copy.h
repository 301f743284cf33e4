// memcpy and memset for rows. Outputs that are larger than the caches are written with streaming
// stores: such a store does not first read the line that it overwrites and evicts nothing from the
// cache. With AVX-512 the rows of other outputs are copied by lines that are fetched ahead.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(SPARSE_KERNELS_X86)
#include <immintrin.h>

#include "sparse_kernels/cpu/instruction_set.h"
#endif

namespace sparse_kernels {

// Stores are streamed where a call writes at least this number of bytes. Less may still be in the
// cache when it is next read.
constexpr int64_t kStreamed = 16 << 20;
constexpr int64_t kStreamAlignment = 64;  // of addresses that vectors are streamed to

#if defined(SPARSE_KERNELS_X86)

constexpr int64_t kLine = 64;
constexpr int64_t kStreamedRow = 512;  // bytes; in shorter rows head and tail would cost too much

// Calls store(offset) for each aligned line in [to, to + bytes), and plain(offset, size) for the
// bytes before the first and after the last.
template <class Store, class Plain>
inline void by_lines(char* to, int64_t bytes, const Store& store, const Plain& plain) {
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  plain(0, head);
  int64_t offset = head;
  for (; offset + kLine <= bytes; offset += kLine) store(offset);
  plain(offset, bytes - offset);
}

constexpr int64_t kWideRow = 1024;  // bytes; shorter rows are left to memcpy
constexpr int64_t kWriteAhead = 4096;

// memcpy whose lines are already on their way into the cache when they are written.
__attribute__((target("avx512f"))) static inline void copy_lines(char* to, const char* from,
                                                                 int64_t bytes) {
  int64_t i = 0;
  for (; i + 2 * kLine <= bytes; i += 2 * kLine) {
    __builtin_prefetch(to + i + kWriteAhead, 1);
    __builtin_prefetch(to + i + kLine + kWriteAhead, 1);
    const __m512i first = _mm512_loadu_si512(from + i);
    const __m512i second = _mm512_loadu_si512(from + i + kLine);
    _mm512_storeu_si512(to + i, first);
    _mm512_storeu_si512(to + i + kLine, second);
  }
  std::memcpy(to + i, from + i, size_t(bytes - i));
}

static inline void copy_bytes(char* to, const char* from, int64_t bytes, bool streaming) {
  if (!streaming && bytes >= kWideRow && instruction_set() == InstructionSet::kAvx512)
    return copy_lines(to, from, bytes);
  if (!streaming || bytes < kStreamedRow) {
    std::memcpy(to, from, size_t(bytes));
    return;
  }
  by_lines(
      to, bytes,
      [=](int64_t offset) {
        __m128i part[4];
        for (int i = 0; i < 4; ++i)
          part[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + offset) + i);
        for (int i = 0; i < 4; ++i)
          _mm_stream_si128(reinterpret_cast<__m128i*>(to + offset) + i, part[i]);
      },
      [=](int64_t offset, int64_t size) { std::memcpy(to + offset, from + offset, size_t(size)); });
}

static inline void zero_bytes(char* to, int64_t bytes, bool streaming) {
  if (!streaming || bytes < kStreamedRow) {
    std::memset(to, 0, size_t(bytes));
    return;
  }
  by_lines(
      to, bytes,
      [=](int64_t offset) {
        for (int i = 0; i < 4; ++i)
          _mm_stream_si128(reinterpret_cast<__m128i*>(to + offset) + i, _mm_setzero_si128());
      },
      [=](int64_t offset, int64_t size) { std::memset(to + offset, 0, size_t(size)); });
}

// Hazard: streaming stores are weakly ordered. To be called before another thread may read them.
static inline void finish_streaming() { _mm_sfence(); }

#else

static inline void copy_bytes(char* to, const char* from, int64_t bytes, bool) {
  std::memcpy(to, from, size_t(bytes));
}
static inline void zero_bytes(char* to, int64_t bytes, bool) { std::memset(to, 0, size_t(bytes)); }
static inline void finish_streaming() {}

#endif

}  // namespace sparse_kernels
