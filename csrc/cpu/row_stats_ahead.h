// What is fetched from memory ahead of its use, while the arithmetic on a tile takes its time. To
// prefetch past the end of memory is harmless.
#pragma once

#include <cstdint>

#include "row_stats_blocks.h"
#include "sparse_kernels/cpu/row_stats.h"

namespace sparse_kernels {

// Prefetches the block of planes that follows, plane by plane, two lines at a time; past the outer
// caches where the plan says so. Vec names the instruction set alone.
template <class Vec>
class PlanesAhead {
 public:
  // operator() is called `calls` times. Nothing follows where `planes` is null.
  template <class T>
  PlanesAhead(const T* planes, int64_t class_stride, int columns, int width, int calls,
              bool past_caches)
      : past_caches_(past_caches) {
    if (!planes || calls == 0) return;
    const int in_line = int(reinterpret_cast<uintptr_t>(planes) % 64);
    bytes_ = (width * int(sizeof(T)) + in_line + 127) / 128 * 128;
    stride_ = class_stride * int64_t(sizeof(T));
    at_ = reinterpret_cast<const char*>(planes);
    end_ = at_ + bytes_;
    left_ = columns * (bytes_ / 128);
    at_once_ = (left_ + calls - 1) / calls;
  }

  __attribute__((always_inline)) void operator()() {
    const int count = left_ < at_once_ ? left_ : at_once_;
    left_ -= count;
    for (int i = 0; i < count; ++i) {
      past_caches_ ? prefetch_past_caches(at_) : prefetch(at_);
      past_caches_ ? prefetch_past_caches(at_ + 64) : prefetch(at_ + 64);
      at_ += 128;
      if (at_ != end_) continue;
      at_ += stride_ - bytes_;
      end_ += stride_;
    }
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t stride_ = 0;
  int bytes_ = 0, left_ = 0, at_once_ = 0;
  bool past_caches_;
};

// Prefetches what a call reads and writes of each row besides its logits: targets and outputs.
// Stores are done in order, so one to a line that is not in a cache holds up all that follow.
template <class Vec>
class RowsAhead {
 public:
  explicit RowsAhead(const RowStatsArgs& args) {
    using Real = typename Vec::Real;
    add(args.targets, args.targets_are_int32 ? sizeof(int32_t) : sizeof(int64_t));
    for (const void* output : args.outputs) add(output, sizeof(Real));
    add(args.argmax, sizeof(int64_t));
    add(args.saved_maximum, sizeof(Real));
    add(args.saved_total, sizeof(Real));
    if (!args.mask) return;
    add(args.mask, sizeof(uint8_t));
    add(args.significance, sizeof(Real));
    add(args.weight, sizeof(float));
    add(args.offset, sizeof(Real));
  }

  // Rows [row, row + count): few at a time, since what is under way has little room.
  __attribute__((always_inline)) void operator()(int64_t row, int count) const {
    for (int k = 0; k < arrays_; ++k) {
      const char* first = first_[k] + row * bytes_[k];
      for (int i = 0; i < count * bytes_[k]; i += 64) prefetch(first + i);
    }
  }

 private:
  void add(const void* first, size_t bytes_of_a_row) {
    if (!first) return;
    first_[arrays_] = static_cast<const char*>(first);
    bytes_[arrays_++] = int(bytes_of_a_row);
  }

  static constexpr int kMost = kStatistics + 8;
  const char* first_[kMost];
  int bytes_[kMost];
  int arrays_ = 0;
};

}  // namespace sparse_kernels
