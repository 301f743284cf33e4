#include "row_stats_functions.h"
#include "row_stats_kernel.h"
#include "vec_avx2.h"

namespace sparse_kernels {
namespace avx2 {

constexpr RowStatsFunctions row_stats_functions = RowStatsOf<F32x8, F64x4>::functions();

}  // namespace avx2
}  // namespace sparse_kernels
