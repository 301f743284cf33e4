// Copies and zeros that, when there are more bytes than caches hold, go past them: a streaming
// store does not first read the line that it overwrites, and throws nothing else out.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(SPARSE_KERNELS_X86)
#include <emmintrin.h>
#endif

namespace sparse_kernels {

// Bytes that a call writes from which on the stores are streamed: less may still lie in the cache
// when it is next read.
constexpr int64_t kStreamed = 16 << 20;

#if defined(SPARSE_KERNELS_X86)

constexpr int64_t kLine = 64;
constexpr int64_t kStreamedRow = 512;  // bytes below which head and tail would cost too much

// store(at) for each whole line, aligned, in [to, to + bytes); plain(at, size) for what is around.
template <class Store, class Plain>
inline void by_lines(char* to, int64_t bytes, const Store& store, const Plain& plain) {
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  plain(0, head);
  int64_t at = head;
  for (; at + kLine <= bytes; at += kLine) store(at);
  plain(at, bytes - at);
}

inline void copy_bytes(char* to, const char* from, int64_t bytes, bool streaming) {
  if (!streaming || bytes < kStreamedRow) {
    std::memcpy(to, from, size_t(bytes));
    return;
  }
  by_lines(
      to, bytes,
      [=](int64_t at) {
        __m128i part[4];
        for (int i = 0; i < 4; ++i)
          part[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at) + i);
        for (int i = 0; i < 4; ++i)
          _mm_stream_si128(reinterpret_cast<__m128i*>(to + at) + i, part[i]);
      },
      [=](int64_t at, int64_t size) { std::memcpy(to + at, from + at, size_t(size)); });
}

inline void zero_bytes(char* to, int64_t bytes, bool streaming) {
  if (!streaming || bytes < kStreamedRow) {
    std::memset(to, 0, size_t(bytes));
    return;
  }
  by_lines(
      to, bytes,
      [=](int64_t at) {
        for (int i = 0; i < 4; ++i)
          _mm_stream_si128(reinterpret_cast<__m128i*>(to + at) + i, _mm_setzero_si128());
      },
      [=](int64_t at, int64_t size) { std::memset(to + at, 0, size_t(size)); });
}

// Streaming stores are weakly ordered: to be called before another thread may read.
inline void finish_streaming() { _mm_sfence(); }

#else

inline void copy_bytes(char* to, const char* from, int64_t bytes, bool) {
  std::memcpy(to, from, size_t(bytes));
}
inline void zero_bytes(char* to, int64_t bytes, bool) { std::memset(to, 0, size_t(bytes)); }
inline void finish_streaming() {}

#endif

}  // namespace sparse_kernels
