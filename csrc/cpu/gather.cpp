#include "gather.h"

#include <cstring>

#include "parallel.h"

namespace sparse_kernels {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // bytes a thread must have to be worth waking

int64_t first_out_of_range(const int64_t* index, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    if (index[i] < 0 || index[i] >= rows) return i;
  return -1;
}

// copy(i) for each slot; kBytes is the row's size where it is known, for a call of memcpy for each
// label would cost more than the label.
template <class Copy>
void for_each_slot(int64_t count, int64_t row_bytes, const Copy& copy) {
  parallel_parts(count, parts_for(count * row_bytes, kGrain), 1,
                 [&](int, int64_t begin, int64_t end) {
                   switch (row_bytes) {
                     case 4:
                       for (int64_t i = begin; i < end; ++i) copy(i, 4);
                       break;
                     case 8:
                       for (int64_t i = begin; i < end; ++i) copy(i, 8);
                       break;
                     default:
                       for (int64_t i = begin; i < end; ++i) copy(i, row_bytes);
                   }
                 });
}

}  // namespace

int64_t gather_rows(const void* in, int64_t in_rows, int64_t row_bytes, const int64_t* index,
                    int64_t count, void* out) {
  const int64_t bad = first_out_of_range(index, count, in_rows);
  if (bad >= 0) return bad;
  const char* from = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  for_each_slot(count, row_bytes, [=](int64_t i, int64_t bytes) {
    std::memcpy(to + i * bytes, from + index[i] * bytes, size_t(bytes));
  });
  return -1;
}

int64_t scatter_rows(const void* in, int64_t row_bytes, const int64_t* index, int64_t count,
                     void* out, int64_t out_rows) {
  const int64_t bad = first_out_of_range(index, count, out_rows);
  if (bad >= 0) return bad;
  const char* from = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  for_each_slot(count, row_bytes, [=](int64_t i, int64_t bytes) {
    std::memcpy(to + index[i] * bytes, from + i * bytes, size_t(bytes));
  });
  return -1;
}

}  // namespace sparse_kernels
