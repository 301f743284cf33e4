// Gather and scatter of rows by index. Rows are moved as bytes, whatever their type. One call moves
// the rows of many tensors and divides their bytes evenly among the threads.
// Bytes: each row is read once and written once.
#pragma once

#include <cstdint>
#include <vector>

namespace sparse_kernels {

// A tensor whose rows move: row i of the input begins at in + i * in_stride; out's rows are packed.
struct RowMove {
  const char* in;
  int64_t in_stride;  // bytes
  char* out;
  int64_t row_bytes;
};

// out[i] = in[index[i]] for `slots` slots of each tensor; the inputs have `rows` rows. Returns -1,
// or the first slot whose index is out of range; nothing is written then.
int64_t gather_rows(const std::vector<RowMove>& moves, const int64_t* index, int64_t slots,
                    int64_t rows);

// The transpose: out[index[i]] = in[i]; all other rows of out, which has `rows`, become zeros. Of
// equal indices the last wins. Returns what gather_rows returns.
int64_t scatter_rows(const std::vector<RowMove>& moves, const int64_t* index, int64_t slots,
                     int64_t rows);

}  // namespace sparse_kernels
