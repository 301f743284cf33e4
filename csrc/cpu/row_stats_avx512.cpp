#include "row_stats_functions.h"
#include "row_stats_kernel.h"
#include "vec_avx512.h"

namespace sparse_kernels {
namespace avx512 {

constexpr RowStatsFunctions row_stats_functions = RowStatsOf<F32x16, F64x8>::functions();

}  // namespace avx512
}  // namespace sparse_kernels
