// Rows in lanes: up to kLanes rows, kTransposeClasses classes at a time. Included by
// row_stats_kernel.h.

// The logits of kLanes rows.
template <class T, bool kPlain>
struct Lanes {
  const T* logits[kLanes];
  int64_t target[kLanes];
  bool adjacent;  // each lane's logits lie beside the last lane's

  // Lanes past the last row repeat it: finite work whose result is dropped.
  Lanes(const RowStatsArgs& args, int64_t row, int count, Group& group, RowStatsResult& result) {
    adjacent = !kPlain && count == kLanes;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t r = row + (i < count ? i : count - 1);
      logits[i] = static_cast<const T*>(args.logits) + args.layout.offset(r);
      if (!kPlain) adjacent &= logits[i] == logits[0] + i;
      target[i] = target_of(args, r);
      group.ignored[i] = is_left_out(args, r, target[i], result);
      if (group.ignored[i]) target[i] = 0;
    }
  }

  // Classes [begin, begin + columns); zeros for an ignored row, which may hold anything.
  void read(const Group& group, int64_t class_stride, int64_t begin, int columns,
            float (*x)[kLanes]) const {
    if (!kPlain && adjacent) {
      const T* p = logits[0] + begin * class_stride;
      for (int j = 0; j < columns; ++j) store(x[j], load(p + j * class_stride));
    }
    for (int i = 0; i < kLanes; ++i) {
      const T* p = logits[i] + begin * class_stride;
      if (group.ignored[i])
        for (int j = 0; j < columns; ++j) x[j][i] = 0.0f;
      else if (kPlain || !adjacent)
        for (int j = 0; j < columns; ++j, p += class_stride) x[j][i] = to_float(*p);
    }
  }
};

// The two largest logits, the lowest index of the largest, and the sum, over blocks.
struct Extras {
  alignas(64) float best[kLanes];
  double sum[kLanes];
  int64_t argmax[kLanes];
  Vec largest = splat(-kInfinity), second = splat(-kInfinity);

  Extras() {
    for (int i = 0; i < kLanes; ++i) {
      best[i] = -kInfinity;
      sum[i] = 0.0;
      argmax[i] = 0;
    }
  }

  void add(const RowStatsArgs& args, const Plan& plan, int64_t begin, int columns, Vec shift,
           const float (*x)[kLanes]) {
    alignas(64) float a[kLanes], b[kLanes];
    if (plan.wanted[kMargin])
      for (int j = 0; j < columns; ++j) {
        const Vec v = load(x[j]);
        second = max(second, min(largest, v));
        largest = max(largest, v);
      }
    if (args.argmax) {
      Vec top = load(x[0]), index = splat(0.0f);
      for (int j = 1; j < columns; ++j) top = max(top, load(x[j]));
      for (int j = columns - 1; j >= 0; --j)
        index = select_ge(load(x[j]), top, splat(float(j)), index);
      store(a, top);
      store(b, index);
      for (int i = 0; i < kLanes; ++i)
        if (a[i] > best[i]) {
          best[i] = a[i];
          argmax[i] = begin + int64_t(b[i]);
        }
    }
    if (plan.smoothed) {
      Vec difference = splat(0.0f);
      for (int j = 0; j < columns; ++j) difference = difference + (load(x[j]) - shift);
      store(a, difference);
      store(b, shift);
      for (int i = 0; i < kLanes; ++i) sum[i] += double(a[i]) + double(b[i]) * columns;
    }
  }

  void finish(const RowStatsArgs& args, Group& group) const {
    store(group.second, second);
    std::memcpy(group.argmax, argmax, sizeof argmax);
    for (int i = 0; i < kLanes; ++i)
      group.mean[i] = float(sum[i] / double(args.classes) - group.maximum[i]);
  }
};

// kPlain: one block, of contiguous classes, without softcap and extras; most calls, so that they
// pay for none of these.
template <class T, bool kPlain>
inline void gather_group(const RowStatsArgs& args, const Plan& plan, int64_t row, int count,
                         Group& group, RowStatsResult& result) {
  const int64_t class_stride = kPlain ? 1 : args.class_stride;
  const float softcap = kPlain ? 0.0f : args.softcap;
  const bool with_extras = !kPlain && plan.extras;
  alignas(64) float x[kTransposeClasses][kLanes];
  alignas(64) float target_x[kLanes];
  const Lanes<T, kPlain> lanes(args, row, count, group, result);
  for (int i = 0; i < kLanes; ++i)
    target_x[i] =
        group.ignored[i] ? 0.0f : to_float(lanes.logits[i][lanes.target[i] * class_stride]);
  if (softcap != 0.0f) store(target_x, cap(load(target_x), softcap));
  Extras extras;

  const Vec target = load(target_x), zero = splat(0.0f), scale = splat(plan.power_scale);
  Vec maximum = target, shift = zero, rest = zero, rest_t = zero, rest_sq = zero;
  for (int64_t begin = 0; begin < args.classes && !(kPlain && begin > 0);
       begin += kTransposeClasses) {
    const int64_t left = args.classes - begin;
    const int columns = int(left < kTransposeClasses ? left : kTransposeClasses);
    lanes.read(group, class_stride, begin, columns, x);
    if (softcap != 0.0f)
      for (int j = 0; j < columns; ++j) store(x[j], cap(load(x[j]), softcap));
    const auto set_targets = [&](const auto& value) {
      for (int i = 0; i < kLanes; ++i) {
        const int64_t y = lanes.target[i] - begin;
        if (!group.ignored[i] && y >= 0 && y < columns) x[y][i] = value(i);
      }
    };
    set_targets([](int) { return -kInfinity; });  // the target stays out of the sums

    for (int j = 0; j < columns; ++j) maximum = max(maximum, load(x[j]));
    // Nothing yet but -inf: any finite shift will do.
    const Vec next = select_ge(splat(-kLargest), maximum, zero, maximum);
    if (!kPlain && begin > 0) {
      const Vec t = clamp_power(min(zero, (shift - next) * scale));
      const Vec f = exp2_clamped(t);
      rest_t = f * fma(t, rest, rest_t);
      rest = f * rest;
      rest_sq = f * f * rest_sq;
    }
    shift = next;
    Vec block = zero, block_t = zero, block_sq = zero;
    for (int j = 0; j < columns; ++j) {
      const Vec t = clamp_power((load(x[j]) - shift) * scale);
      const Vec e = exp2_clamped(t);
      block = block + e;
      block_t = fma(e, t, block_t);
      block_sq = fma(e, e, block_sq);
    }
    rest = rest + block;
    rest_t = rest_t + block_t;
    rest_sq = rest_sq + block_sq;
    if (with_extras) {
      set_targets([&](int i) { return target_x[i]; });
      extras.add(args, plan, begin, columns, shift, x);
    }
  }
  store(group.maximum, maximum);
  store(group.rest, rest);
  store(group.rest_t, rest_t);
  store(group.rest_sq, rest_sq);
  store(group.target_t, (target - maximum) * scale);  // NaN where every logit is -inf
  if (with_extras) extras.finish(args, group);
}
