#include <cmath>
#include <cstring>
#include <limits>

#include "philox.h"
#include "row_stats.h"
#include "vec_avx2.h"

namespace sparse_kernels {
namespace avx2 {
#include "row_stats_kernel.h"
}  // namespace avx2
}  // namespace sparse_kernels
