// Columns in lanes: a row's classes, kBlock at a time. Included by row_stats_kernel.h.

inline int vectors_of(int columns) { return (columns + kLanes - 1) / kLanes; }

// -inf in the first half: min() with kLanes of these drops the lanes before the second.
struct TailMask {
  Real value[2 * kLanes] = {};
  constexpr TailMask() {
    for (int i = 0; i < 2 * kLanes; ++i) value[i] = i < kLanes ? -kInfinity : kInfinity;
  }
};
// Constant: what ran when the library is loaded would run on processors without these instructions.
constexpr TailMask kTailMask;

// A block copied to where it can be changed, capped where there is a softcap, in whole vectors. The
// last one ends with the last column and begins with -inf (padded at its end, it would be stored in
// two parts, and reading it would wait for both). There must be kLanes columns. Returns the largest
// in the copy, as max_block does.
template <class T>
inline Real copy_block(const T* x, int columns, Real softcap, Real* copy) {
  const auto capped = [&](int i) {
    const Vec v = load(x + i);
    return softcap != 0 ? cap(v, softcap) : v;
  };
  const int tail = columns % kLanes, whole = columns - tail;
  Vec largest = splat(-kInfinity), other = largest;
  const auto put = [&](int i, Vec v, Vec& m) {
    store(copy + i, v);
    m = max(m, v);
  };
  int i = 0;
  for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    put(i, capped(i), largest);
    put(i + kLanes, capped(i + kLanes), other);
  }
  if (i < whole) put(i, capped(i), largest);
  if (tail) put(whole, min(load(kTailMask.value + tail), capped(columns - kLanes)), other);
  return reduce_max(max(largest, other));
}

// Where in the copy a column is, and which column is there.
inline int place_in_copy(int column, int columns) {
  const int tail = columns % kLanes;
  return tail && column >= columns - tail ? column + kLanes - tail : column;
}
inline int column_in_copy(int place, int columns) {
  const int tail = columns % kLanes;
  return tail && place >= columns - tail ? place - (kLanes - tail) : place;
}

inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

struct BlockSums {
  double rest, rest_d, rest_sq;
};

// The target is -inf here, so that the loop has no exception to find: where a row is short,
// branches that go astray would cost as much as its sums.
template <class T, bool kSquares>
inline BlockSums sum_block(const T* x, int vectors, Real maximum, const Exponential& in_memory) {
  const Exponential exponential = in_memory;
  const Vec m = splat(maximum);
  // The next block, while this one keeps the arithmetic busy: otherwise its first read, for the
  // maximum, would wait for memory. A prefetch past the end of memory does nothing.
  const auto ahead = [&](int i) {
    for (int j = 0; j < 4 * kLanes; j += 64 / int(sizeof(T))) prefetch(x + i * kLanes + kBlock + j);
  };
  const auto d = [&](int i) { return load(x + i * kLanes) - m; };
  const Sums sums = sum_of<kSquares>(vectors, exponential, d, ahead);
  return {reduce_add(sums.rest), reduce_add(sums.rest_d), kSquares ? reduce_add(sums.rest_sq) : 0};
}

// The largest of a block. NaN may be lost here: the sums, which meet every element, keep it.
template <class T>
inline Real max_block(const T* x, int vectors) {
  constexpr int kUnroll = 4;
  Vec m[kUnroll];
  for (int u = 0; u < kUnroll; ++u) m[u] = splat(-kInfinity);
  int i = 0;
  for (; i + kUnroll <= vectors; i += kUnroll)
    for (int u = 0; u < kUnroll; ++u) m[u] = max(m[u], load(x + (i + u) * kLanes));
  for (; i < vectors; ++i) m[0] = max(m[0], load(x + i * kLanes));
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <class T>
inline bool has_nan(const T* x, int vectors) {
  bool found = false;
  for (int j = 0; j < vectors * kLanes; ++j) found |= widen(x[j]) != widen(x[j]);
  return found;
}

struct TwoLargest {
  Real largest = -kInfinity, second = -kInfinity;

  void add(Real x) {
    if (x > largest) {
      second = largest;
      largest = x;
    } else if (x > second) {
      second = x;
    }
  }
};

template <class T>
inline TwoLargest two_largest(const T* x, int vectors) {
  Vec largest = splat(-kInfinity), second = largest;
  const auto add = [&](Vec v) {
    second = max(second, min(largest, v));
    largest = max(largest, v);
  };
  for (int i = 0; i < vectors; ++i) add(load(x + i * kLanes));
  alignas(64) Real a[kLanes], b[kLanes];
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
inline double sum_differences(const T* x, int columns, Real shift) {
  Vec sum = splat(0);
  const int vectors = columns / kLanes;
  for (int i = 0; i < vectors; ++i) sum = sum + (load(x + i * kLanes) - splat(shift));
  double total = reduce_add(sum);
  for (int j = vectors * kLanes; j < columns; ++j)
    total += widen(x[place_in_copy(j, columns)]) - shift;
  return total;
}

// Part of a row, block by block, and parts put together.
struct RowSums : PartSums {
  // Of nothing yet. In double, which costs nothing for a few blocks.
  RowSums() : PartSums{-kInfinity, 0, 0, 0, -kInfinity, -kInfinity, 0, 0} {}
  explicit RowSums(const PartSums& part) : PartSums(part) {}

  void raise(double to, double inverse_temperature) {
    if (!(to > maximum)) return;
    if (rest != 0.0) {
      const double delta = to - maximum;
      const double f = std::exp(-delta * inverse_temperature);
      rest_d = f > 0.0 ? f * (rest_d - delta * rest) : 0.0 * rest;  // 0 * rest: NaN stays
      rest *= f;
      rest_sq *= f * f;
    }
    maximum = to;
  }

  void add_top(double x) {
    second = x > largest ? largest : x > second ? x : second;
    largest = x > largest ? x : largest;
  }

  // Columns that are whole vectors, or a copy; ``target`` is in the copy, or null.
  template <bool kSquares, class T>
  void add_block(const RowStatsArgs& args, const Plan& plan, const T* x, int64_t begin, int columns,
                 Real* target) {
    const int vectors = vectors_of(columns);
    const Real block_maximum = max_block(x, vectors);
    if (plan.extras) add_extras(args, plan, x, begin, columns, block_maximum);
    raise(block_maximum, args.inverse_temperature);
    if (maximum == -kInfinity) {  // nothing yet but -inf, where d would be NaN, or a lost NaN
      if (has_nan(x, vectors)) rest = kNaN;
      return;
    }
    if (target) *target = -kInfinity;  // stays out of the sums
    const BlockSums block = sum_block<T, kSquares>(x, vectors, Real(maximum), plan.exponential);
    rest += block.rest;
    rest_d += block.rest_d;
    rest_sq += block.rest_sq;
  }

  template <class T>
  void add_extras(const RowStatsArgs& args, const Plan& plan, const T* x, int64_t begin,
                  int columns, Real block_maximum) {
    if (plan.wanted[kMargin]) {
      const TwoLargest found = two_largest(x, vectors_of(columns));
      add_top(found.largest);
      add_top(found.second);
    }
    if (args.argmax && block_maximum > maximum) {
      int j = 0;
      while (widen(x[j]) != block_maximum) ++j;
      argmax = begin + column_in_copy(j, columns);
    }
    if (plan.smoothed) {
      const bool masked = block_maximum == -kInfinity;
      sum += masked ? -double(kInfinity)
                    : sum_differences(x, columns, block_maximum) + double(block_maximum) * columns;
    }
  }

  // A part behind this one.
  void merge(RowSums part, double inverse_temperature) {
    if (part.maximum > maximum) argmax = part.argmax;
    raise(part.maximum, inverse_temperature);
    part.raise(maximum, inverse_temperature);
    rest += part.rest;
    rest_d += part.rest_d;
    rest_sq += part.rest_sq;
    add_top(part.largest);
    add_top(part.second);
    sum += part.sum;
  }
};

// One part of a row; ``target`` and ``logits`` are the row's.
template <class T, bool kSquares>
inline RowSums sum_part(const RowStatsArgs& args, const Plan& plan, const T* logits, int64_t target,
                        int64_t part) {
  const int64_t first = part * kPartClasses;
  const int64_t end = part + 1 == parts_of_row(args.classes) ? args.classes : first + kPartClasses;
  RowSums sums;
  for (int64_t begin = first; begin < end;) {
    const T* x = logits + begin;
    // The last block takes what would be less than a vector.
    const int columns = int(end - begin < kBlock + kLanes ? end - begin : kBlock);
    const bool has_target = target >= begin && target < begin + columns;
    if (has_target || args.softcap != 0.0 || columns % kLanes) {
      alignas(64) Real copy[kBlock + kLanes];
      copy_block(x, columns, Real(args.softcap), copy);
      sums.add_block<kSquares>(
          args, plan, copy, begin, columns,
          has_target ? copy + place_in_copy(int(target - begin), columns) : nullptr);
    } else {
      sums.add_block<kSquares>(args, plan, x, begin, columns, nullptr);
    }
    begin += columns;
  }
  return sums;
}

// Rows of one block, several at a time, so that no row waits for another's reductions.
template <class T, bool kSquares>
inline void sum_short_rows(const RowStatsArgs& args, const Plan& plan, const T* const* logits,
                           const int64_t* target, int count, Group& group) {
  constexpr int kCopies = kLanes * (kBlock / 4 + kLanes);  // 8 KB of float32: stays in L1
  alignas(64) Real copies[kCopies];
  const int columns = int(args.classes), vectors = vectors_of(columns), width = vectors * kLanes;
  const int step = kCopies / width < kLanes ? kCopies / width : kLanes;
  for (int first = 0; first < count; first += step) {
    const int last = first + step < count ? first + step : count;
    for (int i = first; i < last; ++i) {
      if (group.ignored[i]) continue;
      Real* copy = copies + (i - first) * width;
      group.maximum[i] = copy_block(logits[i], columns, Real(args.softcap), copy);
      Real& target_x = copy[place_in_copy(int(target[i]), columns)];
      group.target_d[i] = target_x - group.maximum[i];
      target_x = -kInfinity;
    }
    for (int i = first; i < last; ++i) {
      if (group.ignored[i]) continue;
      const BlockSums sums = sum_block<Real, kSquares>(copies + (i - first) * width, vectors,
                                                       group.maximum[i], plan.exponential);
      group.rest[i] = group.maximum[i] == -kInfinity ? kNaN : sums.rest;
      group.rest_d[i] = Real(sums.rest_d);
      group.rest_sq[i] = sums.rest_sq;
    }
  }
}

// Rows of several blocks, or with extras; from their parts' sums where these are there.
template <class T, bool kSquares>
inline void sum_long_rows(const RowStatsArgs& args, const Plan& plan, const T* const* logits,
                          const int64_t* target, int64_t row, int count, const PartSums* parts,
                          Group& group) {
  const int64_t each = parts_of_row(args.classes);
  for (int i = 0; i < count; ++i) {
    if (group.ignored[i]) continue;
    RowSums sums;
    for (int64_t part = 0; part < each; ++part) {
      const RowSums more = parts ? RowSums(parts[(row + i) * each + part])
                                 : sum_part<T, kSquares>(args, plan, logits[i], target[i], part);
      if (part == 0)
        sums = more;
      else
        sums.merge(more, args.inverse_temperature);
    }
    const bool masked = sums.maximum == -kInfinity;  // every logit: no distribution
    group.maximum[i] = Real(sums.maximum);
    group.rest[i] = masked ? kNaN : sums.rest;
    group.rest_d[i] = Real(sums.rest_d);
    group.rest_sq[i] = sums.rest_sq;
    group.second[i] = Real(sums.second);
    group.mean[i] = Real(sums.sum / double(args.classes) - sums.maximum);
    group.argmax[i] = sums.argmax;
    group.target_d[i] = widen(logits[i][target[i]]);
  }
  Vec target_x = load(group.target_d);
  if (args.softcap != 0.0) target_x = cap(target_x, Real(args.softcap));
  store(group.target_d, target_x - load(group.maximum));
}

// Rows [row, row + count), up to kLanes of them.
template <class T, bool kSquares>
inline void sum_rows(const RowStatsArgs& args, const Plan& plan, int64_t row, int count,
                     const PartSums* parts, RowStatsResult& result) {
  Group group;
  const T* logits[kLanes];
  int64_t target[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    target[i] = i < count ? target_of(args, row + i) : args.ignore_index;
    group.ignored[i] = false;
    if (is_left_out(args, row + i, target[i], result)) {
      group.ignore(i);
      continue;
    }
    logits[i] = static_cast<const T*>(args.logits) + args.layout.offset(row + i);
  }
  if (args.classes <= kBlock && !plan.extras)
    sum_short_rows<T, kSquares>(args, plan, logits, target, count, group);
  else
    sum_long_rows<T, kSquares>(args, plan, logits, target, row, count, parts, group);
  finish(args, plan, group, row, count, result);
}

template <class T>
void run_parts(const RowStatsArgs& args, int64_t begin, int64_t end, PartSums* parts) {
  const Plan plan(args);
  const int64_t each = parts_of_row(args.classes);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / each, target = target_of(args, row);
    if (target == args.ignore_index) continue;  // its parts are not looked at
    const T* logits = static_cast<const T*>(args.logits) + args.layout.offset(row);
    parts[i] = plan.squares ? sum_part<T, true>(args, plan, logits, target, i % each)
                            : sum_part<T, false>(args, plan, logits, target, i % each);
  }
}
