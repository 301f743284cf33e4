// The entry points of one instruction set: the kernel for the logits' type. Included by
// row_stats_<isa>.cpp.

RowStatsResult row_stats(const RowStatsArgs& args, int64_t begin, int64_t end,
                         const PartSums* parts) {
  switch (args.dtype) {
    case DType::kFloat64:
      return f64::run<double>(args, begin, end, parts);
    case DType::kBFloat16:
      return f32::run<BFloat16>(args, begin, end, parts);
    case DType::kFloat16:
      return f32::run<Float16>(args, begin, end, parts);
    default:
      return f32::run<float>(args, begin, end, parts);
  }
}

void sum_parts(const RowStatsArgs& args, int64_t begin, int64_t end, PartSums* parts) {
  switch (args.dtype) {
    case DType::kFloat64:
      return f64::run_parts<double>(args, begin, end, parts);
    case DType::kBFloat16:
      return f32::run_parts<BFloat16>(args, begin, end, parts);
    case DType::kFloat16:
      return f32::run_parts<Float16>(args, begin, end, parts);
    default:
      return f32::run_parts<float>(args, begin, end, parts);
  }
}

void row_stats_backward(const RowStatsBackwardArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat64:
      return f64::run_backward<double>(args, begin, end);
    case DType::kBFloat16:
      return f32::run_backward<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return f32::run_backward<Float16>(args, begin, end);
    default:
      return f32::run_backward<float>(args, begin, end);
  }
}
