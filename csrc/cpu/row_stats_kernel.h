// The body of row_stats for one instruction set: included by row_stats_<isa>.cpp after its vec_*.h,
// inside that instruction set's namespace. row_stats.h derives what is computed here.
//
// Two ways through the logits:
//   rows in lanes     few classes: a group of kLanes rows is transposed into L1, then every sum is
//                     vertical. No reduction across lanes, no tails.
//   columns in lanes  many classes: blocks of kBlock columns, each read for its maximum, then again
//                     from L1 for its sums.
// Both fill a Group, and finish() turns a Group into outputs, also with rows in lanes.

constexpr int kLanes = Vec::kLanes;
constexpr int kBlock = 1024;  // 4 KB of float32: stays in L1 between the two reads
// Up to here rows in lanes wins: the transpose costs a scalar move an element, but a row in the
// other form costs four reductions whatever its length.
constexpr int kTransposeClasses = 64;
// Clamped here, 2^t is still a normal number; a sum that is only such terms is flushed to 0.
constexpr float kLowestPower = -126.0f;
constexpr float kFlushBelow = 1e-30f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// 2^t for t <= 0. Relative error below 2e-7; exactly 1 at 0; 2^-126 from there down; NaN stays NaN
// (max returns its second argument then). Minimax on [-1/2, 1/2] with the constant held at 1.
inline Vec exp2_clamped(Vec t) {
  return scale_by_power(t, [](Vec f) {
    Vec p = fma(splat(0x1.5bba14p-10f), f, splat(0x1.3cea88p-7f));
    p = fma(p, f, splat(0x1.c6b752p-5f));
    p = fma(p, f, splat(0x1.ebf9bcp-3f));
    p = fma(p, f, splat(0x1.62e42ap-1f));
    return fma(p, f, splat(1.0f));
  });
}
inline Vec clamp_power(Vec t) { return max(splat(kLowestPower), t); }

// log(x) for x >= 1/2, below 1 ulp (fdlibm's logf); NaN for NaN and inf.
inline Vec log(Vec x) {
  Vec m, k;
  split_exponent(x, m, k);
  const Vec f = m - splat(1.0f);
  const Vec s = f / (m + splat(1.0f));
  const Vec z = s * s, w = z * z;
  const Vec odd = z * fma(w, splat(0.28498786688f), splat(0.66666662693f));
  const Vec even = w * fma(w, splat(0.24279078841f), splat(0.40000972152f));
  const Vec half = splat(0.5f) * f * f;
  const Vec low = fma(k, splat(9.0580006145e-6f), s * (half + odd + even)) - half + f;
  return fma(k, splat(6.9313812256e-1f), low) + (x - x);
}
// log(1 + x) for x >= 0, without losing a small x.
inline Vec log1p(Vec x) {
  const Vec u = splat(1.0f) + x;
  return log(u) + (x - (u - splat(1.0f))) / u;
}

// What one pass leaves of kLanes rows.
struct Group {
  float maximum[kLanes];  // of the raw logits
  float rest[kLanes];
  float rest_t[kLanes];
  float rest_sq[kLanes];
  float target_t[kLanes];
  bool ignored[kLanes];

  void ignore(int lane) {  // any finite values: finish() writes 0
    maximum[lane] = rest[lane] = rest_t[lane] = rest_sq[lane] = target_t[lane] = 0.0f;
    ignored[lane] = true;
  }
};

struct Plan {
  bool wanted[kStatistics];  // as an output or in the significance
  bool squares;
  float power_scale;  // c = log2(e) / temperature

  explicit Plan(const RowStatsArgs& args) : power_scale(kLog2E * args.inverse_temperature) {
    for (int k = 0; k < kStatistics; ++k)
      wanted[k] = args.outputs[k] || (args.mask && args.weights[k] != 0.0f);
    squares = wanted[kGradNorm] || wanted[kSumSquares];
  }
};

inline int64_t target_of(const RowStatsArgs& args, int64_t row) {
  return args.targets_are_int32 ? static_cast<const int32_t*>(args.targets)[row]
                                : static_cast<const int64_t*>(args.targets)[row];
}

// Whether the row is ignored; so is one with a bad target, which is noted. ignore_index may be a
// class.
inline bool is_left_out(const RowStatsArgs& args, int64_t row, int64_t y, RowStatsResult& result) {
  if (y == args.ignore_index) return true;
  if (y >= 0 && y < args.classes) return false;
  if (result.bad_target_row < 0) result.bad_target_row = row;  // rows come in ascending order
  return true;
}

// Turns rows [row, row + count) of the group into outputs and decisions.
inline void finish(const RowStatsArgs& args, const Plan& plan, const Group& group, int64_t row,
                   int count, RowStatsResult& result) {
  const Vec zero = splat(0.0f), one = splat(1.0f), ln2 = splat(kLn2);
  const Vec raw_rest = load(group.rest), flush = splat(kFlushBelow);
  const Vec rest = select_ge(flush, raw_rest, zero, raw_rest);
  const Vec rest_t = select_ge(flush, raw_rest, zero, load(group.rest_t));
  const Vec rest_sq = select_ge(flush, raw_rest, zero, load(group.rest_sq));
  const Vec target_t = load(group.target_t);
  const Vec target_clamped = clamp_power(target_t);
  const Vec target_e = exp2_clamped(target_clamped);
  const Vec total = rest + target_e;
  const Vec inverse = one / total;
  // Where the target is the largest, e_y = 1 and this is log(S) too, without losing a small rest.
  const Vec log_ratio = log1p(rest / target_e);
  const Vec log_total = select_ge(target_t, zero, log_ratio, log(total));

  float value[kStatistics][kLanes];
  const auto& wanted = plan.wanted;
  if (wanted[kLoss])
    store(value[kLoss], select_ge(target_e, rest, log_ratio, log_total - target_t * ln2));
  if (wanted[kEntropy])
    store(value[kEntropy], log_total - ln2 * (fma(target_e, target_clamped, rest_t) * inverse));
  if (wanted[kGradNorm]) store(value[kGradNorm], sqrt(fma(rest, rest, rest_sq)) * inverse);
  if (wanted[kSumSquares])
    store(value[kSumSquares], fma(target_e, target_e, rest_sq) * inverse * inverse);
  if (wanted[kMaxProb]) store(value[kMaxProb], inverse);
  if (wanted[kLogSumExp])
    store(value[kLogSumExp], fma(load(group.maximum), splat(args.inverse_temperature), log_total));

  bool any_ignored = false;
  for (int i = 0; i < count; ++i) any_ignored |= group.ignored[i];
  if (any_ignored)
    for (int k = 0; k < kStatistics; ++k)
      for (int i = 0; wanted[k] && i < count; ++i)
        if (group.ignored[i]) value[k][i] = 0.0f;

  for (int k = 0; k < kStatistics; ++k)
    if (args.outputs[k]) std::memcpy(args.outputs[k] + row, value[k], sizeof(float) * count);
  if (!args.mask) return;

  Vec sum = zero;
  for (int k = 0; k < kStatistics; ++k)
    if (args.weights[k] != 0.0f) sum = fma(splat(args.weights[k]), load(value[k]), sum);
  float significance[kLanes];
  store(significance, sum);
  for (int i = 0; i < count; ++i) {
    if (args.offset && !group.ignored[i]) significance[i] += args.offset[row + i];
    const float s = significance[i];
    result.invalid += s != s;
    bool keep = s > args.threshold;  // false for NaN
    if (args.weight) {
      // In double, so that the probability agrees with the reference's to the last bit or nearly.
      double p = 1.0 / (1.0 + std::exp(-(double(s) - args.threshold) / args.gate_temperature));
      p = p < args.p_min ? args.p_min : p;
      keep = philox_uniform(args.seed, args.step, uint64_t(row + i)) < p;  // false for NaN
      args.weight[row + i] = keep && !group.ignored[i] ? float(1.0 / p) : 0.0f;
    }
    args.mask[row + i] = keep && !group.ignored[i];
  }
  std::memcpy(args.significance + row, significance, sizeof(float) * count);
}

// Rows in lanes: [row, row + count) of up to kLanes rows and kTransposeClasses classes.
template <class T>
inline void gather_group_transposed(const RowStatsArgs& args, const Plan& plan, int64_t row,
                                    int count, Group& group, RowStatsResult& result) {
  alignas(64) float x[kTransposeClasses][kLanes];
  alignas(64) float target_x[kLanes];
  const int classes = int(args.classes);
  for (int i = 0; i < kLanes; ++i) {
    // Lanes past the last row repeat it: finite work whose result is dropped.
    const int64_t r = row + (i < count ? i : count - 1);
    const T* logits = static_cast<const T*>(args.logits) + r * args.row_stride;
    const int64_t y = target_of(args, r);
    group.ignored[i] = false;
    if (is_left_out(args, r, y, result)) {
      for (int j = 0; j < classes; ++j) x[j][i] = 0.0f;
      target_x[i] = 0.0f;
      group.ignored[i] = true;
      continue;
    }
    for (int j = 0; j < classes; ++j) x[j][i] = to_float(logits[j]);
    target_x[i] = x[y][i];
    x[y][i] = -kInfinity;  // the target stays out of the sums
  }

  const Vec target = load(target_x);
  Vec maximum = target;
  for (int j = 0; j < classes; ++j) maximum = max(maximum, load(x[j]));
  const Vec scale = splat(plan.power_scale);
  Vec rest = splat(0.0f), rest_t = rest, rest_sq = rest;
  for (int j = 0; j < classes; ++j) {
    const Vec t = clamp_power((load(x[j]) - maximum) * scale);
    const Vec e = exp2_clamped(t);
    rest = rest + e;
    rest_t = fma(e, t, rest_t);
    rest_sq = fma(e, e, rest_sq);
  }
  store(group.maximum, maximum);
  store(group.rest, rest);
  store(group.rest_t, rest_t);
  store(group.rest_sq, rest_sq);
  store(group.target_t, (target - maximum) * scale);
}

// Up to kLanes elements, the lanes behind them -inf.
template <class T>
inline Vec load_partial(const T* p, int count, int replaced = -1) {
  alignas(64) float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = i < count && i != replaced ? to_float(p[i]) : -kInfinity;
  return load(x);
}

inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

struct BlockSums {
  float rest, rest_t, rest_sq;
};

// Sums over a block; ``target`` is the target's column in it, or -1.
template <class T, bool kSquares>
inline BlockSums sum_block(const T* x, int columns, int target, float maximum, float power_scale) {
  constexpr int kUnroll = Vec::kUnroll;
  const Vec m = splat(maximum), scale = splat(power_scale);
  Vec rest[kUnroll], rest_t[kUnroll], rest_sq[kUnroll];
  for (int u = 0; u < kUnroll; ++u) rest[u] = rest_t[u] = rest_sq[u] = splat(0.0f);
  const auto add = [&](Vec v, int u) {
    const Vec t = clamp_power((v - m) * scale);
    const Vec e = exp2_clamped(t);
    rest[u] = rest[u] + e;
    rest_t[u] = fma(e, t, rest_t[u]);
    if (kSquares) rest_sq[u] = fma(e, e, rest_sq[u]);
  };
  const auto add_vectors = [&](int begin, int end) {
    int i = begin;
    for (; i + kUnroll <= end; i += kUnroll)
      for (int u = 0; u < kUnroll; ++u) {
        // The next block, while this one keeps the arithmetic busy: otherwise its first read, for
        // the maximum, would wait for memory. A prefetch past the end of memory does nothing.
        prefetch(x + (i + u) * kLanes + kBlock);
        add(load(x + (i + u) * kLanes), u);
      }
    for (; i < end; ++i) add(load(x + i * kLanes), 0);
  };
  const int vectors = columns / kLanes, tail = columns % kLanes;
  // The vector that holds the target is left out of the loop and added with -inf in its place.
  const int hole = target < 0 ? vectors : target / kLanes;
  add_vectors(0, hole < vectors ? hole : vectors);
  add_vectors(hole + 1, vectors);
  if (hole < vectors) add(load_partial(x + hole * kLanes, kLanes, target % kLanes), 0);
  if (tail)
    add(load_partial(x + vectors * kLanes, tail,
                     hole == vectors && target >= 0 ? target % kLanes : -1),
        0);
  for (int u = 1; u < kUnroll; ++u) {
    rest[0] = rest[0] + rest[u];
    rest_t[0] = rest_t[0] + rest_t[u];
    rest_sq[0] = rest_sq[0] + rest_sq[u];
  }
  return {reduce_add(rest[0]), reduce_add(rest_t[0]), kSquares ? reduce_add(rest_sq[0]) : 0.0f};
}

// The largest of a block. NaN may be lost here: the sums, which meet every element, keep it.
template <class T>
inline float max_block(const T* x, int columns) {
  constexpr int kUnroll = 4;
  const int vectors = columns / kLanes;
  Vec m[kUnroll];
  for (int u = 0; u < kUnroll; ++u) m[u] = splat(-kInfinity);
  int i = 0;
  for (; i + kUnroll <= vectors; i += kUnroll)
    for (int u = 0; u < kUnroll; ++u) m[u] = max(m[u], load(x + (i + u) * kLanes));
  for (; i < vectors; ++i) m[0] = max(m[0], load(x + i * kLanes));
  if (columns % kLanes) m[1] = max(m[1], load_partial(x + vectors * kLanes, columns % kLanes));
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <class T>
inline bool has_nan(const T* x, int columns) {
  bool found = false;
  for (int j = 0; j < columns; ++j) found |= to_float(x[j]) != to_float(x[j]);
  return found;
}

// Columns in lanes: one row into one lane of the group.
template <class T, bool kSquares>
inline void sum_row(const T* logits, int64_t classes, int64_t target, float power_scale, int lane,
                    Group& group) {
  float maximum = -kInfinity;
  double rest = 0.0, rest_t = 0.0, rest_sq = 0.0;  // of a few blocks: double costs nothing here
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const T* x = logits + begin;
    const int columns = int(classes - begin < kBlock ? classes - begin : kBlock);
    const float block_maximum = max_block(x, columns);
    if (block_maximum > maximum) {
      if (rest != 0.0) {
        const double delta = (double(block_maximum) - maximum) * power_scale;
        const double f = std::exp2(-delta);
        rest_t = f > 0.0 ? f * (rest_t - delta * rest) : 0.0 * rest;  // 0 * rest: NaN stays
        rest *= f;
        rest_sq *= f * f;
      }
      maximum = block_maximum;
    }
    if (maximum == -kInfinity) {  // nothing yet but -inf, where t would be NaN, or a lost NaN
      if (has_nan(x, columns)) rest = kNaN;
      continue;
    }
    const int64_t y = target - begin;
    const BlockSums block = sum_block<T, kSquares>(x, columns, y >= 0 && y < columns ? int(y) : -1,
                                                   maximum, power_scale);
    rest += block.rest;
    rest_t += block.rest_t;
    rest_sq += block.rest_sq;
  }
  if (maximum == -kInfinity) rest = kNaN;  // every logit is -inf: no distribution
  group.maximum[lane] = maximum;
  group.rest[lane] = float(rest);
  group.rest_t[lane] = float(rest_t);
  group.rest_sq[lane] = float(rest_sq);
  group.target_t[lane] = (to_float(logits[target]) - maximum) * power_scale;
  group.ignored[lane] = false;
}

template <class T>
RowStatsResult run(const RowStatsArgs& args, int64_t begin, int64_t end) {
  const Plan plan(args);
  RowStatsResult result;
  for (int64_t row = begin; row < end; row += kLanes) {
    const int count = int(end - row < kLanes ? end - row : kLanes);
    Group group;
    if (args.classes <= kTransposeClasses) {
      gather_group_transposed<T>(args, plan, row, count, group, result);
    } else {
      for (int i = 0; i < kLanes; ++i) {
        const int64_t y = i < count ? target_of(args, row + i) : args.ignore_index;
        if (is_left_out(args, row + i, y, result)) {
          group.ignore(i);
          continue;
        }
        const T* logits = static_cast<const T*>(args.logits) + (row + i) * args.row_stride;
        if (plan.squares)
          sum_row<T, true>(logits, args.classes, y, plan.power_scale, i, group);
        else
          sum_row<T, false>(logits, args.classes, y, plan.power_scale, i, group);
      }
    }
    finish(args, plan, group, row, count, result);
  }
  return result;
}

RowStatsResult row_stats(const RowStatsArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return run<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return run<Float16>(args, begin, end);
    default:
      return run<float>(args, begin, end);
  }
}
