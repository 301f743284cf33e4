#include "sparse_kernels/cpu/control.h"

#include <vector>

#include "sparse_kernels/cpu/parallel.h"

namespace sparse_kernels {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // least number of rows worth waking a thread for
constexpr int64_t kBlock = 256;  // rows summed in float, in vectors, before the sum goes to double

struct AllRows {
  bool operator()(int64_t) const { return true; }
};
template <class Label>
struct NotIgnored {
  const Label* labels;
  Label ignored;
  bool operator()(int64_t row) const { return labels[row] != ignored; }
};

// kBlock rows with a plain threshold and mass 1 each.
template <class Counts>
void add_block(ControlSums& sums, const float* significance, float threshold, int64_t begin,
               const Counts& counts) {
  float counted[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) counted[i] = counts(begin + i) ? 1.0f : 0.0f;
  float valid = 0, selected = 0, present = 0, finite = 0, total = 0, excess = 0, deficit = 0;
  float low = INFINITY, high = -INFINITY;
#ifdef _OPENMP
#pragma omp simd reduction(+ : valid, selected, present, finite, total, excess, deficit) \
    reduction(min : low) reduction(max : high)
#endif
  for (int64_t i = 0; i < kBlock; ++i) {
    const float s = significance[begin + i], above = s - threshold;
    const float valid_row = s == s ? counted[i] : 0.0f;
    const float finite_row = fabsf(s) < INFINITY ? counted[i] : 0.0f;
    present += counted[i];
    valid += valid_row;
    selected += above > 0.0f ? valid_row : 0.0f;
    finite += finite_row;
    total += finite_row > 0.0f ? s : 0.0f;
    const float over = above > 0.0f ? above : 0.0f, under = above < 0.0f ? -above : 0.0f;
    excess += finite_row > 0.0f ? over : 0.0f;
    deficit += finite_row > 0.0f ? under : 0.0f;
    const float low_here = finite_row > 0.0f ? s : INFINITY,
                high_here = finite_row > 0.0f ? s : -INFINITY;
    low = low_here < low ? low_here : low;
    high = high_here > high ? high_here : high;
  }
  ControlSums part;
  part.mass = part.mass_sq = valid;
  part.kept = part.selected = selected;
  part.rejected = valid - selected;
  part.finite = finite;
  part.total = total;
  part.excess = excess;
  part.deficit = deficit;
  part.low = low;
  part.high = high;
  part.invalid = int64_t(present - valid);
  control_merge(sums, part);
}

template <class Counts>
ControlSums sum_rows(const float* significance, const float* mass, float threshold,
                     const ControlSettings& settings, int64_t begin, int64_t end,
                     const Counts& counts) {
  ControlSums sums;
  int64_t i = begin;
  if (!mass && settings.gate_temperature == 0.0f)
    for (; i + kBlock <= end; i += kBlock) add_block(sums, significance, threshold, i, counts);
  for (; i < end; ++i)
    if (counts(i))
      control_add_row(sums, significance[i], mass ? mass[i] : 1.0f, threshold, settings);
  return sums;
}

template <class Counts>
ControlSums sum_rows(const ControlArgs& args, int64_t state, const Counts& counts) {
  const float* significance = args.significance + state * args.rows;
  const float* mass = args.mass ? args.mass + state * args.rows : nullptr;
  const float threshold = args.values[state * kControlValues + kThreshold];
  const auto range = [&](int64_t begin, int64_t end) {
    return sum_rows(significance, mass, threshold, args.settings, begin, end, counts);
  };
  const int parts = parts_for(args.rows, kGrain);
  if (parts == 1) return range(0, args.rows);
  std::vector<ControlSums> sums(parts);
  parallel_parts(args.rows, parts, kBlock,
                 [&](int part, int64_t begin, int64_t end) { sums[part] = range(begin, end); });
  for (int part = 1; part < parts; ++part) control_merge(sums[0], sums[part]);
  return sums[0];
}

template <class Label>
ControlSums sum_labelled(const ControlArgs& args, int64_t state) {
  const Label* labels = static_cast<const Label*>(args.labels) + state * args.rows;
  // No label equals an ignore_index that the labels' type cannot hold.
  if (int64_t(Label(args.ignore_index)) != args.ignore_index)
    return sum_rows(args, state, AllRows());
  return sum_rows(args, state, NotIgnored<Label>{labels, Label(args.ignore_index)});
}

ControlSums sum_state(const ControlArgs& args, int64_t state) {
  if (!args.labels) return sum_rows(args, state, AllRows());
  if (args.label_bytes == 1) return sum_labelled<uint8_t>(args, state);
  if (args.label_bytes == 4) return sum_labelled<int32_t>(args, state);
  return sum_labelled<int64_t>(args, state);
}

}  // namespace

void control(const ControlArgs& args) {
  for (int64_t state = 0; state < args.states; ++state)
    control_advance(args.values + state * kControlValues, args.counters + state * kControlCounters,
                    sum_state(args, state), args.setpoint[state],
                    args.overflow ? args.overflow[state] : 0);
}

}  // namespace sparse_kernels
