#include <cmath>
#include <cstring>
#include <limits>

#include "philox.h"
#include "row_stats.h"
#include "vec_portable.h"

namespace sparse_kernels {
namespace portable {
#include "row_stats_kernel.h"
}  // namespace portable
}  // namespace sparse_kernels
