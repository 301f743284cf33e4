#include <cmath>
#include <cstring>
#include <limits>

#include "philox.h"
#include "row_stats.h"
#include "vec_avx512.h"

namespace sparse_kernels {
namespace avx512 {
#include "row_stats_kernel.h"
}  // namespace avx512
}  // namespace sparse_kernels
