#include "row_stats_functions.h"
#include "row_stats_kernel.h"
#include "vec_neon.h"

namespace sparse_kernels {
namespace neon {

constexpr RowStatsFunctions row_stats_functions = RowStatsOf<F32x8, F64x4>::functions();

}  // namespace neon
}  // namespace sparse_kernels
