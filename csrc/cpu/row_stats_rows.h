// Rows in lanes: every sum is vertical. Included by row_stats_kernel.h.

// The two largest logits, the lowest index of the largest, and the sum, over blocks.
struct Extras {
  alignas(64) Real best[kLanes];
  double sum[kLanes];
  int64_t argmax[kLanes];
  Vec largest, second;

  void start() {
    largest = second = splat(-kInfinity);
    for (int i = 0; i < kLanes; ++i) {
      best[i] = -kInfinity;
      sum[i] = 0.0;
      argmax[i] = 0;
    }
  }

  void add(const RowStatsArgs& args, const Plan& plan, int64_t begin, int columns, Vec shift,
           const Real* x, int stride) {
    alignas(64) Real a[kLanes], b[kLanes];
    const auto at = [&](int j) { return load(x + j * stride); };
    if (plan.wanted[kMargin])
      for (int j = 0; j < columns; ++j) {
        const Vec v = at(j);
        second = max(second, min(largest, v));
        largest = max(largest, v);
      }
    if (args.argmax) {
      Vec top = at(0), index = splat(0);
      for (int j = 1; j < columns; ++j) top = max(top, at(j));
      for (int j = columns - 1; j >= 0; --j) index = select_ge(at(j), top, splat(Real(j)), index);
      store(a, top);
      store(b, index);
      for (int i = 0; i < kLanes; ++i)
        if (a[i] > best[i]) {
          best[i] = a[i];
          argmax[i] = begin + int64_t(b[i]);
        }
    }
    if (plan.smoothed) {
      Vec difference = splat(0);
      for (int j = 0; j < columns; ++j) difference = difference + (at(j) - shift);
      store(a, difference);
      store(b, shift);
      for (int i = 0; i < kLanes; ++i) sum[i] += double(a[i]) + double(b[i]) * columns;
    }
  }

  void finish(const RowStatsArgs& args, Group& group) const {
    store(group.second, second);
    std::memcpy(group.argmax, argmax, sizeof argmax);
    for (int i = 0; i < kLanes; ++i)
      group.mean[i] = Real(sum[i] / double(args.classes) - group.maximum[i]);
  }
};

// kLanes rows, block by block. Rows that are left out are computed too, whatever they hold: each
// lane is by itself, and finish() drops them.
struct LaneSums {
  alignas(64) Real target_x[kLanes];
  int64_t target[kLanes];
  Vec maximum, shift;
  Sums sums;

  // Lanes past the last row repeat it.
  void start(const RowStatsArgs& args, int64_t row, int count, Group& group,
             RowStatsResult& result) {
    maximum = splat(-kInfinity);
    shift = splat(0);
    sums = Sums();
    for (int i = 0; i < kLanes; ++i) {
      const int64_t r = row + (i < count ? i : count - 1);
      target[i] = target_of(args, r);
      group.ignored[i] = is_left_out(args, r, target[i], result);
      if (group.ignored[i]) target[i] = 0;
      target_x[i] = 0;
    }
  }

  // Classes [begin, begin + columns): that of column j in lane i is x[j * stride + i], and is
  // changed where it is the target, which stays out of the sums.
  template <bool kSquares>
  void add(const RowStatsArgs& args, const Plan& plan, int64_t begin, int columns, Real* x,
           int stride, Extras* extras) {
    const Exponential exponential = plan.exponential;
    const Vec zero = splat(0);
    for (int j = 0; j < columns; ++j) maximum = max(maximum, load(x + j * stride));
    // Nothing yet but -inf: any finite shift will do.
    const Vec next = select_ge(splat(-kLargest), maximum, zero, maximum);
    if (begin > 0) {
      const Vec delta = exponential.clamp(min(zero, shift - next));
      const Vec f = exponential(delta);
      sums = Sums{f * sums.rest, f * fma(delta, sums.rest, sums.rest_d), f * f * sums.rest_sq};
    }
    shift = next;
    if (extras) extras->add(args, plan, begin, columns, shift, x, stride);
    for (int i = 0; i < kLanes; ++i) {
      const int64_t y = target[i] - begin;
      if (uint64_t(y) >= uint64_t(columns)) continue;
      Real* at = x + y * stride + i;
      target_x[i] = *at;
      *at = -kInfinity;
    }
    const auto d = [&](int j) { return load(x + j * stride) - shift; };
    sums = sums + sum_of<kSquares>(columns, exponential, d, [](int) {});
  }

  void finish(Group& group) const {
    store(group.maximum, maximum);
    alignas(64) Real rest[kLanes], rest_sq[kLanes];
    store(rest, sums.rest);
    store(rest_sq, sums.rest_sq);
    for (int i = 0; i < kLanes; ++i) {
      group.rest[i] = rest[i];
      group.rest_sq[i] = rest_sq[i];
    }
    store(group.rest_d, sums.rest_d);
    store(group.target_d, load(target_x) - maximum);  // NaN where every logit is -inf
  }
};

// Up to kLanes rows. kPlain: one block, of contiguous classes, without softcap and extras; most
// calls, so that they pay for none of these.
template <class T, bool kPlain, bool kSquares>
inline void transpose_rows(const RowStatsArgs& args, const Plan& plan, int64_t row, int count,
                           RowStatsResult& result) {
  const int64_t class_stride = kPlain ? 1 : args.class_stride;
  alignas(64) Real x[kTransposeClasses * kLanes];
  const T* logits[kLanes];
  for (int i = 0; i < kLanes; ++i)
    logits[i] =
        static_cast<const T*>(args.logits) + args.layout.offset(row + (i < count ? i : count - 1));
  Group group;
  LaneSums sums;
  sums.start(args, row, count, group, result);
  Extras extras;
  if (!kPlain) extras.start();
  for (int64_t begin = 0; begin < args.classes; begin += kTransposeClasses) {
    const int64_t left = args.classes - begin;
    const int columns = int(left < kTransposeClasses ? left : kTransposeClasses);
    for (int i = 0; i < kLanes; ++i) {
      const T* p = logits[i] + begin * class_stride;
      for (int j = 0; j < columns; ++j, p += class_stride) x[j * kLanes + i] = widen(*p);
    }
    if (!kPlain && args.softcap != 0.0) copy_block(x, columns * kLanes, Real(args.softcap), x);
    sums.add<kSquares>(args, plan, begin, columns, x, kLanes,
                       !kPlain && plan.extras ? &extras : nullptr);
    if (kPlain) break;
  }
  sums.finish(group);
  if (!kPlain && plan.extras) extras.finish(args, group);
  finish(args, plan, group, row, count, result);
}

// A tile of logits is 16 KB, half of L1.
constexpr int kTileGroups = 16;
constexpr int kTileSize = 16 * 1024 / sizeof(Real);

// How many groups of kLanes rows from ``row`` lie in one run of memory, up to kTileGroups.
inline int adjacent_groups(const RowLayout& layout, int64_t row, int64_t end) {
  const int inner = layout.dimensions - 1;
  if (layout.stride[inner] != 1) return 0;
  const int64_t left = inner > 0 ? layout.size[inner] - row % layout.size[inner] : end - row;
  const int64_t groups = (left < end - row ? left : end - row) / kLanes;
  return int(groups < kTileGroups ? groups : kTileGroups);
}

// groups x kLanes rows that are adjacent in memory. A tile is copied from the classes' planes
// first: planes are often a power of two apart, and would fight for the same few lines of the
// cache.
template <class T, bool kSquares>
inline void sum_tile(const RowStatsArgs& args, const Plan& plan, int64_t row, int groups,
                     RowStatsResult& result) {
  alignas(64) Real x[kTileSize];
  Group group[kTileGroups];
  LaneSums sums[kTileGroups];
  Extras extras[kTileGroups];
  const int width = groups * kLanes;
  const T* logits = static_cast<const T*>(args.logits) + args.layout.offset(row);
  for (int g = 0; g < groups; ++g) {
    sums[g].start(args, row + g * kLanes, kLanes, group[g], result);
    if (plan.extras) extras[g].start();
  }
  const int64_t most = kTileSize / width;
  for (int64_t begin = 0; begin < args.classes; begin += most) {
    const int columns = int(args.classes - begin < most ? args.classes - begin : most);
    for (int j = 0; j < columns; ++j) {
      const T* plane = logits + (begin + j) * args.class_stride;
      for (int i = 0; i < width; i += kLanes) store(x + j * width + i, load(plane + i));
    }
    if (args.softcap != 0.0) copy_block(x, columns * width, Real(args.softcap), x);
    for (int g = 0; g < groups; ++g)
      sums[g].add<kSquares>(args, plan, begin, columns, x + g * kLanes, width,
                            plan.extras ? &extras[g] : nullptr);
  }
  for (int g = 0; g < groups; ++g) {
    sums[g].finish(group[g]);
    if (plan.extras) extras[g].finish(args, group[g]);
    finish(args, plan, group[g], row + g * kLanes, kLanes, result);
  }
}
