// Rows by index: bytes are bytes, whatever their type. Many tensors in one call, their bytes shared
// out evenly over the threads. Bytes moved: each row read and written once.
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

// out[i] = in[index[i]] for ``slots`` slots of each tensor; the inputs have ``rows`` rows. Returns
// the first slot whose index is out of range, in which case nothing is written, or -1.
int64_t gather_rows(const std::vector<RowMove>& moves, const int64_t* index, int64_t slots,
                    int64_t rows);

// The transpose: out[index[i]] = in[i], and zeros in the other of out's ``rows`` rows. The last of
// equal indices wins. Returns as above.
int64_t scatter_rows(const std::vector<RowMove>& moves, const int64_t* index, int64_t slots,
                     int64_t rows);

}  // namespace sparse_kernels
