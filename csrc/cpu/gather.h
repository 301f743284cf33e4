// Rows by index: bytes are bytes, whatever their type. Bytes moved: each row read and written once.
#pragma once

#include <cstdint>

namespace sparse_kernels {

// out[i] = in[index[i]], rows of row_bytes, in has in_rows. Returns the first slot whose index is
// out of range, in which case nothing is written, or -1.
int64_t gather_rows(const void* in, int64_t in_rows, int64_t row_bytes, const int64_t* index,
                    int64_t count, void* out);

// The transpose: out[index[i]] = in[i]; the other rows of out stay as they are. Returns as above.
int64_t scatter_rows(const void* in, int64_t row_bytes, const int64_t* index, int64_t count,
                     void* out, int64_t out_rows);

}  // namespace sparse_kernels
