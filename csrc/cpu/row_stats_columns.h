// Columns in lanes: one row at a time, kBlock classes at a time. Included by row_stats_kernel.h.

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

template <class T>
inline void cap_block(const T* x, int columns, float softcap, float* capped) {
  const int vectors = columns / kLanes;
  for (int i = 0; i < vectors; ++i) store(capped + i * kLanes, cap(load(x + i * kLanes), softcap));
  for (int j = vectors * kLanes; j < columns; ++j) {
    alignas(64) float one[kLanes];
    store(one, cap(splat(to_float(x[j])), softcap));
    capped[j] = one[0];
  }
}

struct TwoLargest {
  float largest = -kInfinity, second = -kInfinity;

  void add(float x) {
    if (x > largest) {
      second = largest;
      largest = x;
    } else if (x > second) {
      second = x;
    }
  }
};

template <class T>
inline TwoLargest two_largest(const T* x, int columns) {
  Vec largest = splat(-kInfinity), second = largest;
  const auto add = [&](Vec v) {
    second = max(second, min(largest, v));
    largest = max(largest, v);
  };
  const int vectors = columns / kLanes;
  for (int i = 0; i < vectors; ++i) add(load(x + i * kLanes));
  if (columns % kLanes) add(load_partial(x + vectors * kLanes, columns % kLanes));
  alignas(64) float a[kLanes], b[kLanes];
  store(a, largest);
  store(b, second);
  TwoLargest found;
  for (int i = 0; i < kLanes; ++i) {
    found.add(a[i]);
    found.add(b[i]);
  }
  return found;
}

// Sum of x - shift.
template <class T>
inline float sum_differences(const T* x, int columns, float shift) {
  Vec sum = splat(0.0f);
  const int vectors = columns / kLanes;
  for (int i = 0; i < vectors; ++i) sum = sum + (load(x + i * kLanes) - splat(shift));
  float total = reduce_add(sum);
  for (int j = vectors * kLanes; j < columns; ++j) total += to_float(x[j]) - shift;
  return total;
}

// One row, block by block, into one lane of the group.
struct RowSums {
  float maximum = -kInfinity;
  double rest = 0.0, rest_t = 0.0, rest_sq = 0.0;  // of a few blocks: double costs nothing here
  double sum = 0.0;
  TwoLargest top;
  int64_t argmax = 0;
  float target_x = 0.0f;

  // ``target`` is relative to the block.
  template <bool kSquares, class T>
  void add(const RowStatsArgs& args, const Plan& plan, const T* x, int64_t begin, int columns,
           int64_t target) {
    const bool has_target = target >= 0 && target < columns;
    if (has_target) target_x = to_float(x[target]);
    const float block_maximum = max_block(x, columns);
    if (plan.extras) add_extras(args, plan, x, begin, columns, block_maximum);
    if (block_maximum > maximum) {
      if (rest != 0.0) {
        const double delta = (double(block_maximum) - maximum) * plan.power_scale;
        const double f = std::exp2(-delta);
        rest_t = f > 0.0 ? f * (rest_t - delta * rest) : 0.0 * rest;  // 0 * rest: NaN stays
        rest *= f;
        rest_sq *= f * f;
      }
      maximum = block_maximum;
    }
    if (maximum == -kInfinity) {  // nothing yet but -inf, where t would be NaN, or a lost NaN
      if (has_nan(x, columns)) rest = kNaN;
      return;
    }
    const BlockSums block = sum_block<T, kSquares>(x, columns, has_target ? int(target) : -1,
                                                   maximum, plan.power_scale);
    rest += block.rest;
    rest_t += block.rest_t;
    rest_sq += block.rest_sq;
  }

  template <class T>
  void add_extras(const RowStatsArgs& args, const Plan& plan, const T* x, int64_t begin,
                  int columns, float block_maximum) {
    if (plan.wanted[kMargin]) {
      const TwoLargest found = two_largest(x, columns);
      top.add(found.largest);
      top.add(found.second);
    }
    if (args.argmax && block_maximum > maximum) {
      int j = 0;
      while (j < columns - 1 && to_float(x[j]) != block_maximum) ++j;
      argmax = begin + j;
    }
    if (plan.smoothed) {
      const bool masked = block_maximum == -kInfinity;
      sum += masked ? -double(kInfinity)
                    : sum_differences(x, columns, block_maximum) + double(block_maximum) * columns;
    }
  }

  void finish(const RowStatsArgs& args, const Plan& plan, int lane, Group& group) const {
    group.maximum[lane] = maximum;
    group.rest[lane] = maximum == -kInfinity ? kNaN : float(rest);  // all -inf: no distribution
    group.rest_t[lane] = float(rest_t);
    group.rest_sq[lane] = float(rest_sq);
    group.target_t[lane] = (target_x - maximum) * plan.power_scale;
    group.second[lane] = top.second;
    group.mean[lane] = float(sum / double(args.classes) - maximum);
    group.argmax[lane] = argmax;
    group.ignored[lane] = false;
  }
};

template <class T, bool kSquares>
inline void sum_row(const RowStatsArgs& args, const Plan& plan, const T* logits, int64_t target,
                    int lane, Group& group) {
  RowSums sums;
  for (int64_t begin = 0; begin < args.classes; begin += kBlock) {
    const T* x = logits + begin;
    const int columns = int(args.classes - begin < kBlock ? args.classes - begin : kBlock);
    if (args.softcap != 0.0f) {
      alignas(64) float capped[kBlock];
      cap_block(x, columns, args.softcap, capped);
      sums.add<kSquares>(args, plan, capped, begin, columns, target - begin);
    } else {
      sums.add<kSquares>(args, plan, x, begin, columns, target - begin);
    }
  }
  sums.finish(args, plan, lane, group);
}
