// Calls the CPU kernels with shapes, strides, flags, indices and numbers made of random bytes.
// Memory has exactly the size that a kernel may use, so that the address sanitizer sees any access
// outside; moved rows are compared with those of simple loops.
//
// LLVMFuzzerTestOneInput is libFuzzer's entry point: clang++ -fsanitize=fuzzer,address,undefined.
// FUZZ_STANDALONE adds a main that needs no libFuzzer: fuzz_kernels [seconds] [seed].
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "random_input.h"
#include "sparse_kernels/cpu/compact.h"
#include "sparse_kernels/cpu/control.h"
#include "sparse_kernels/cpu/gather.h"
#include "sparse_kernels/cpu/instruction_set.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "sparse_kernels/cpu/sum_tree.h"

namespace sk = sparse_kernels;

namespace {

void fuzz_compact(Bytes& bytes) {
  const int64_t rows = bytes.below(300) ? bytes.size(5000) : 256 * 1024 + bytes.size(5000);
  const int64_t density = bytes.below(11);
  std::vector<uint8_t> mask(static_cast<size_t>(rows));
  for (uint8_t& flag : mask) flag = bytes.below(10) < density ? uint8_t(1 + bytes.below(255)) : 0;
  const bool weighted = bytes.coin();
  const std::vector<float> weights(static_cast<size_t>(weighted ? rows : 0), 2.0f);
  std::vector<int64_t> expected;
  for (int64_t i = 0; i < rows; ++i)
    if (mask[size_t(i)]) expected.push_back(i);
  const int64_t set = int64_t(expected.size());

  std::vector<int64_t> counts;
  int64_t capacity = bytes.size(6000);
  if (bytes.coin()) {
    counts = sk::count_flags(mask.data(), rows);
    int64_t total = 0;
    for (int64_t count : counts) total += count;
    require(total == set, "count_flags");
    if (bytes.coin()) capacity = total;
  }
  std::vector<int64_t> index(static_cast<size_t>(capacity), -1);
  std::vector<float> weight(static_cast<size_t>(capacity), -1.0f);
  const int64_t total = sk::compact(mask.data(), weighted ? weights.data() : nullptr, rows, counts,
                                    capacity, index.data(), weight.data());
  require(total == set, "compact's count");
  for (int64_t i = 0; i < capacity; ++i) {
    require(index[size_t(i)] == (i < set ? expected[size_t(i)] : 0), "compact's index");
    require(weight[size_t(i)] == (i < set ? weighted ? 2.0f : 1.0f : 0.0f), "compact's weight");
  }
}

void fuzz_move(Bytes& bytes, bool scatter) {
  const bool long_rows = bytes.below(30) == 0;  // cut between threads
  const int64_t rows = 1 + bytes.size(long_rows ? 5 : 300);
  const int64_t slots = bytes.size(long_rows ? 5 : 300);
  std::vector<int64_t> index(static_cast<size_t>(slots));
  for (int64_t& row : index) row = bytes.below(rows);
  if (bytes.coin()) {
    std::sort(index.begin(), index.end());
    if (bytes.coin()) index.erase(std::unique(index.begin(), index.end()), index.end());
  }
  const int64_t count = int64_t(index.size());
  const bool bad = count > 0 && bytes.below(8) == 0;
  if (bad) {
    const int64_t wild[] = {-1, rows, INT64_MAX, INT64_MIN, int64_t(bytes.number() | 1ull << 62)};
    index[size_t(bytes.below(count))] = wild[bytes.below(5)];
  }

  struct Tensor {
    int64_t row_bytes, stride;
    Block in, out;
  };
  std::vector<Tensor> tensors;
  std::vector<sk::RowMove> moves;
  const int64_t in_rows = scatter ? count : rows;
  const int64_t out_rows = scatter ? rows : count;
  for (int64_t i = bytes.below(4); i >= 0; --i) {
    const int64_t row_bytes = long_rows ? 60'000 + bytes.below(10'000) : bytes.size(700);
    const int64_t stride = bytes.below(4) ? row_bytes
                           : bytes.coin() ? 0
                                          : row_bytes + bytes.size(70);
    const int64_t span = in_rows ? (in_rows - 1) * stride + row_bytes : 0;
    tensors.push_back({row_bytes, stride, Block(span, bytes.below(64)),
                       Block(out_rows * row_bytes, bytes.below(64))});
    for (int64_t at = 0; at < span; ++at) tensors.back().in.begin()[at] = char(at * 31 + i);
    std::fill_n(tensors.back().out.begin(), out_rows * row_bytes, char(0x55));
  }
  for (Tensor& tensor : tensors)
    moves.push_back({tensor.in.begin(), tensor.stride, tensor.out.begin(), tensor.row_bytes});
  const int64_t bad_slot =
      (scatter ? sk::scatter_rows : sk::gather_rows)(moves, index.data(), count, rows);

  require((bad_slot >= 0) == bad, "a bad index");
  for (const sk::RowMove& move : moves) {
    std::vector<char> expected(static_cast<size_t>(out_rows * move.row_bytes), bad ? 0x55 : 0);
    for (int64_t i = 0; i < count && !bad; ++i) {
      const int64_t from = scatter ? i : index[size_t(i)];
      const int64_t to = scatter ? index[size_t(i)] : i;
      if (move.row_bytes)
        std::memcpy(expected.data() + to * move.row_bytes, move.in + from * move.in_stride,
                    size_t(move.row_bytes));
    }
    require(expected.empty() || !std::memcmp(expected.data(), move.out, expected.size()),
            "the rows moved");
  }
}

// Random arguments of the row statistics and the memory that they point to.
struct RowStatsCase {
  sk::RowStatsArgs args{};
  int64_t item, real, elements;  // bytes of a logit and of a result; logits from first to last
  bool bad_targets, overlaps = false;
  char* logits;
  std::vector<Block> inputs;
  std::vector<std::vector<char>> outputs;
  std::vector<int64_t> argmax;
  std::vector<float> weight;
  std::vector<uint8_t> mask;

  explicit RowStatsCase(Bytes& bytes) {
    inputs.reserve(3);
    choose_layout(bytes);
    choose_logits(bytes);
    choose_targets(bytes);
    choose_settings(bytes);
    choose_outputs(bytes);
    choose_gate(bytes);
    args.outputs[sk::kEntropy] = output();
    args.saved_maximum = output();
    args.saved_total = output();
  }
  RowStatsCase(const RowStatsCase&) = delete;

  void* output() { return outputs.emplace_back(size_t(args.rows * real), char(0x55)).data(); }

 private:
  char* input(int64_t bytes, int64_t offset) {
    inputs.emplace_back(bytes, offset);
    return inputs.back().begin();
  }

  // Strides of the dimensions, the classes among them, in any order and with gaps, or of 0.
  void choose_layout(Bytes& bytes) {
    args.dtype = sk::DType(bytes.below(4));
    real = args.dtype == sk::DType::kFloat64 ? 8 : 4;
    item = args.dtype == sk::DType::kFloat32 ? 4 : args.dtype == sk::DType::kFloat64 ? 8 : 2;
    sk::RowLayout& layout = args.layout;
    layout.dimensions = 1 + int(bytes.below(sk::RowLayout::kDimensions));
    args.rows = 1;
    for (int d = 0; d < layout.dimensions; ++d)
      args.rows *= layout.size[d] = layout.dimensions == 1 ? bytes.size(100) : bytes.size(9);
    args.classes = 1 + bytes.size(bytes.below(20) ? 200 : 5000);
    std::vector<int> order;
    for (int d = -1; d < layout.dimensions; ++d) order.push_back(d);
    for (size_t i = order.size() - 1; i > 0; --i)
      std::swap(order[i], order[size_t(bytes.below(int64_t(i) + 1))]);
    if (bytes.coin()) std::swap(*std::find(order.begin(), order.end(), -1), order[0]);
    int64_t stride = 1;
    for (int d : order) {
      const bool repeated = bytes.below(16) == 0;
      overlaps |= repeated;
      (d < 0 ? args.class_stride : layout.stride[d]) = repeated ? 0 : stride;
      stride = stride * (d < 0 ? args.classes : std::max<int64_t>(layout.size[d], 1)) +
               (bytes.below(4) ? 0 : bytes.below(3));
    }
    elements = args.rows ? 1 + (args.classes - 1) * args.class_stride : 0;
    for (int d = 0; d < layout.dimensions && args.rows; ++d)
      elements += (layout.size[d] - 1) * layout.stride[d];
  }

  void choose_logits(Bytes& bytes) {
    logits = input(elements * item, item * bytes.below(8));
    const bool wild = bytes.coin();
    for (int64_t i = 0; i < elements; ++i) {
      uint64_t bits = bytes.number();
      if (!wild) {  // small numbers: exponents near that of 1
        const double value = double(bits % 4000) * 0.01 - 20.0;
        const float narrow = float(value);
        uint32_t word;
        std::memcpy(&word, &narrow, 4);
        if (args.dtype == sk::DType::kFloat64)
          std::memcpy(&bits, &value, 8);
        else
          bits = args.dtype == sk::DType::kFloat32    ? word
                 : args.dtype == sk::DType::kBFloat16 ? word >> 16
                                                      : 0x3800 | (bits & 0x87ff);
      }
      std::memcpy(logits + i * item, &bits, size_t(item));
    }
    args.logits = logits;
  }

  void choose_targets(Bytes& bytes) {
    args.targets_are_int32 = bytes.coin();
    args.ignore_index = -100;
    const int64_t target_item = args.targets_are_int32 ? 4 : 8;
    char* targets = input(args.rows * target_item, target_item * bytes.below(4));
    bad_targets = bytes.below(10) == 0;
    for (int64_t i = 0; i < args.rows; ++i) {
      int64_t target = bytes.below(20) ? bytes.below(args.classes) : -100;
      if (bad_targets && bytes.below(4) == 0) target = int64_t(bytes.number());
      std::memcpy(targets + i * target_item, &target, size_t(target_item));
    }
    args.targets = targets;
  }

  void choose_settings(Bytes& bytes) {
    args.inverse_temperature = bytes.coin() ? 1.0f : 0.1f + 0.01f * float(bytes.below(1000));
    args.softcap = bytes.below(4) ? 0.0f : 1.0f + float(bytes.below(50));
    args.label_smoothing = bytes.below(4) ? 0.0f : 0.1f;
  }

  void choose_outputs(Bytes& bytes) {
    for (void*& address : args.outputs) address = bytes.coin() ? output() : nullptr;
    argmax.resize(size_t(bytes.coin() ? args.rows : 0));
    args.argmax = argmax.empty() ? nullptr : argmax.data();
  }

  void choose_gate(Bytes& bytes) {
    mask.assign(size_t(args.rows), 9);
    if (!bytes.coin()) return;
    args.mask = mask.data();
    args.significance = output();
    args.weights[bytes.below(sk::kStatistics)] = 1.0f;
    args.threshold = float(bytes.below(5));
    if (bytes.coin()) {
      char* offset = input(args.rows * real, 0);
      for (int64_t i = 0; i < args.rows * real; ++i) offset[i] = char(bytes.number());
      args.offset = offset;
    }
    if (!bytes.coin()) return;
    weight.resize(size_t(args.rows));
    args.weight = weight.data();
    args.gate_temperature = 0.5f;
    args.p_min = 0.1f;
    args.seed = bytes.number();
  }
};

int64_t offset_of(const sk::RowLayout& layout, int64_t row) {
  int64_t offset = 0;
  for (int d = layout.dimensions - 1; d >= 0; --d) {
    const int64_t size = d > 0 ? layout.size[d] : row + 1;
    offset += row % size * layout.stride[d];
    row /= size;
  }
  return offset;
}

void fuzz_row_stats_backward(Bytes& bytes, const RowStatsCase& forward) {
  const sk::RowStatsArgs& args = forward.args;
  sk::RowStatsBackwardArgs backward{};
  static_cast<sk::RowStatsInput&>(backward) = args;
  // Over the logits, in their layout or row by row.
  const bool in_place = !forward.overlaps && bytes.below(4) == 0;
  const bool packed = forward.overlaps || bytes.coin();
  const int64_t size = packed ? args.rows * args.classes : forward.elements;
  Block memory(size * forward.item, forward.item * bytes.below(8));
  backward.gradient_class_stride = args.class_stride;
  backward.gradient_layout = args.layout;
  if (in_place) {
    backward.gradient = forward.logits;
  } else {
    backward.gradient = memory.begin();
    backward.zeroed = bytes.coin();
    if (!backward.zeroed) std::fill_n(memory.begin(), size * forward.item, char(0x55));
    if (packed) {
      backward.gradient_class_stride = 1;
      backward.gradient_layout = {1, {}, {args.classes}};
    }
  }
  backward.maximum = args.saved_maximum;
  backward.total = args.saved_total;
  std::vector<std::vector<char>> upstreams;
  const auto upstream = [&](const void*& values, int64_t& step) {
    if (bytes.below(4) == 0) return;
    step = bytes.below(4) ? 1 : 0;
    const int64_t count = step ? args.rows : std::min<int64_t>(args.rows, 1);
    auto& of_rows = upstreams.emplace_back(size_t(count * forward.real), char(0));
    for (int64_t i = 0; i < count; ++i) {
      const double value = double(bytes.below(3));  // 0 among them
      const float narrow = float(value);
      std::memcpy(of_rows.data() + i * forward.real,
                  forward.real == 8 ? static_cast<const void*>(&value) : &narrow,
                  size_t(forward.real));
    }
    values = of_rows.data();
  };
  upstream(backward.loss_gradient, backward.loss_gradient_step);
  upstream(backward.entropy_gradient, backward.entropy_gradient_step);
  backward.entropy = backward.entropy_gradient ? args.outputs[sk::kEntropy] : nullptr;
  sk::row_stats_backward(backward);

  const std::vector<char> zero(size_t(forward.item), 0);
  for (int64_t row = 0; row < args.rows; ++row)
    for (int64_t j = 0; sk::target_of(args, row) == args.ignore_index && j < args.classes; ++j) {
      const int64_t at =
          offset_of(backward.gradient_layout, row) + j * backward.gradient_class_stride;
      const char* found = static_cast<const char*>(backward.gradient) + at * forward.item;
      require(!std::memcmp(found, zero.data(), zero.size()), "the gradient of an ignored row");
    }
}

// Row statistics, the gate and the backward: any layout and dtype, logits of any bits, targets that
// may be bad. What they compute is tested elsewhere; this tests that they stay inside their memory.
void fuzz_row_stats(Bytes& bytes) {
  const RowStatsCase forward(bytes);
  const sk::RowStatsResult result = sk::row_stats(forward.args);
  require(result.bad_target_row < forward.args.rows, "the row of a bad target");
  require(forward.bad_targets || result.bad_target_row < 0, "a good target called bad");
  if (result.bad_target_row >= 0) return;
  require(result.invalid <= forward.args.rows, "the invalid rows");
  for (uint8_t flag : forward.mask) require(forward.args.mask ? flag <= 1 : flag == 9, "the mask");
  fuzz_row_stats_backward(bytes, forward);
}

// The threshold's controllers, on numbers of any bits.
void fuzz_control(Bytes& bytes) {
  sk::ControlArgs args{};
  args.states = 1 + bytes.below(3);
  args.rows = bytes.size(3000);
  const int64_t rows = args.states * args.rows;
  auto values = bytes.fill<float>(args.states * sk::kControlValues);
  std::vector<int64_t> counters(size_t(args.states * sk::kControlCounters), bytes.below(100));
  auto significance = bytes.fill<float>(rows), mass = bytes.fill<float>(rows);
  if (bytes.coin())
    for (float& s : significance) s = float(bytes.below(1000)) * 0.01f;
  const auto setpoint = bytes.fill<float>(args.states);
  const auto overflow = bytes.fill<int32_t>(args.states);
  args.label_bytes = bytes.coin() ? 1 : bytes.coin() ? 4 : 8;
  const auto labels = bytes.fill<char>(rows * args.label_bytes);
  args.values = values.data();
  args.counters = counters.data();
  args.significance = significance.data();
  args.labels = bytes.coin() ? labels.data() : nullptr;
  args.ignore_index = bytes.coin() ? -100 : bytes.below(3);
  args.mass = bytes.coin() ? mass.data() : nullptr;
  args.setpoint = setpoint.data();
  args.overflow = bytes.coin() ? overflow.data() : nullptr;
  args.settings = {bytes.coin() ? 0.0f : 0.5f, 0.1f};
  sk::control(args);
}

void fuzz_sum_tree(Bytes& bytes) {
  sk::SumTree tree{};
  tree.size = 1 + (bytes.below(8) ? bytes.size(5000) : bytes.below(200'000));
  std::vector<float> leaves(static_cast<size_t>(tree.size));
  for (float& leaf : leaves) leaf = float(bytes.below(4));
  tree.leaves = leaves.data();
  std::vector<std::vector<double>> levels;
  for (int64_t nodes = tree.size; tree.depth == 0 || nodes > 1; ++tree.depth) {
    nodes = (nodes + sk::SumTree::kFan - 1) / sk::SumTree::kFan;
    tree.levels[tree.depth] = levels.emplace_back(size_t(nodes), -1.0).data();
  }
  sk::sum_tree_build(tree);
  std::vector<int64_t> changed(static_cast<size_t>(bytes.size(300)));
  for (int64_t& row : changed) {
    row = bytes.below(tree.size);
    leaves[size_t(row)] = float(bytes.below(4));
  }
  sk::sum_tree_update(tree, changed.data(), int64_t(changed.size()));
  double total = 0;  // exact, as these leaves are small integers
  for (float leaf : leaves) total += leaf;
  require(levels.back()[0] == total, "the sum of the leaves");
  std::vector<double> targets(static_cast<size_t>(bytes.size(100)));
  for (double& target : targets) target = double(bytes.below(int64_t(total) + 1));
  std::vector<int64_t> found(targets.size(), -1);
  sk::sum_tree_find(tree, targets.data(), int64_t(targets.size()), found.data());
  for (size_t i = 0; i < found.size(); ++i) {
    require(found[i] >= 0 && found[i] < tree.size, "the leaf of a target");
    if (targets[i] < total) require(leaves[size_t(found[i])] > 0, "a leaf of nothing drawn");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const auto sets = sk::available_instruction_sets();
  sk::set_instruction_set(sets[size_t(bytes.below(int64_t(sets.size())))]);
  switch (bytes.below(8)) {
    case 0:
      fuzz_compact(bytes);
      break;
    case 1:
      fuzz_move(bytes, false);
      break;
    case 2:
      fuzz_move(bytes, true);
      break;
    case 3:
      fuzz_control(bytes);
      break;
    case 4:
      fuzz_sum_tree(bytes);
      break;
    default:
      fuzz_row_stats(bytes);
  }
  return 0;
}

#ifdef FUZZ_STANDALONE
#include <chrono>
#include <random>

int main(int argc, char** argv) {
  using Clock = std::chrono::steady_clock;
  const double seconds = argc > 1 ? std::atof(argv[1]) : 60.0;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  std::printf("fuzzing for %g s with seed %llu\n", seconds, static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  std::mt19937_64 random(seed);
  int64_t runs = 0;
  const auto start = Clock::now();
  for (; std::chrono::duration<double>(Clock::now() - start).count() < seconds; ++runs) {
    std::vector<uint8_t> input(random() % 512);
    for (uint8_t& byte : input) byte = uint8_t(random());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%lld inputs, nothing wrong\n", static_cast<long long>(runs));
}
#endif
