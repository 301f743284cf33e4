#include <cmath>
#include <cstring>
#include <limits>

#include "philox.h"
#include "row_stats.h"
#include "vec_avx512.h"

// clang-format off: each part by itself
namespace sparse_kernels {
namespace avx512 {
namespace f32 {
#include "vec_math_f32.h"
#include "row_stats_kernel.h"
}  // namespace f32
namespace f64 {
#include "vec_math_f64.h"
#include "row_stats_kernel.h"
}  // namespace f64
#include "row_stats_dispatch.h"
}  // namespace avx512
}  // namespace sparse_kernels
