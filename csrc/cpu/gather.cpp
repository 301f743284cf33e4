#include "gather.h"

#include <cstring>

#include "parallel.h"

namespace sparse_kernels {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // bytes a thread must have to be worth waking

template <int64_t kBytes>
void gather_fixed(const char* in, const int64_t* index, int64_t begin, int64_t end, char* out) {
  for (int64_t i = begin; i < end; ++i)
    std::memcpy(out + i * kBytes, in + index[i] * kBytes, kBytes);
}

}  // namespace

int64_t gather_rows(const void* in, int64_t in_rows, int64_t row_bytes, const int64_t* index,
                    int64_t count, void* out) {
  for (int64_t i = 0; i < count; ++i)
    if (index[i] < 0 || index[i] >= in_rows) return i;
  const char* from = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  parallel_parts(
      count, parts_for(count * row_bytes, kGrain), 1, [&](int, int64_t begin, int64_t end) {
        switch (row_bytes) {  // a call of memcpy for each label would cost more than it
          case 1:
            return gather_fixed<1>(from, index, begin, end, to);
          case 4:
            return gather_fixed<4>(from, index, begin, end, to);
          case 8:
            return gather_fixed<8>(from, index, begin, end, to);
        }
        for (int64_t i = begin; i < end; ++i)
          std::memcpy(to + i * row_bytes, from + index[i] * row_bytes, size_t(row_bytes));
      });
  return -1;
}

}  // namespace sparse_kernels
