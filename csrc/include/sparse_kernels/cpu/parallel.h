// Loops divided among OpenMP's threads. torch.set_num_threads sets the size of the same pool, since
// PyTorch and this library both use the libgomp that is loaded first.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparse_kernels {

inline int max_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// The number of parts that `work` units are divided into: at most one a thread, and none of less
// than `grain` units, which would cost more to start than it saves.
inline int parts_for(int64_t work, int64_t grain) {
  const int64_t parts = work / grain;
  const int threads = max_threads();
  return parts < 1 ? 1 : parts < threads ? int(parts) : threads;
}

// Calls body(part, begin, end) for `parts` ranges that together cover [0, size). The length of each
// but the last is a multiple of `align`.
template <class Body>
void parallel_parts(int64_t size, int parts, int64_t align, const Body& body) {
  const int64_t units = (size + align - 1) / align;
  const auto bound = [&](int64_t part) {
    const int64_t aligned = units * part / parts * align;
    return aligned < size ? aligned : size;
  };
  if (parts == 1) return body(0, int64_t(0), size);
#ifdef _OPENMP
#pragma omp parallel for num_threads(parts) schedule(static, 1)
#endif
  for (int part = 0; part < parts; ++part) body(part, bound(part), bound(part + 1));
}

}  // namespace sparse_kernels
