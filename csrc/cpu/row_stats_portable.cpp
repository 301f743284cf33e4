#include "row_stats_functions.h"
#include "row_stats_kernel.h"
#include "vec_portable.h"

namespace sparse_kernels {
namespace portable {

constexpr RowStatsFunctions row_stats_functions =
    RowStatsOf<Lanes8<float>, Lanes8<double>>::functions();

}  // namespace portable
}  // namespace sparse_kernels
