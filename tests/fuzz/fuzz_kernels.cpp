// Calls the CPU kernels with shapes, strides, flags, indices and numbers made of random bytes.
// Memory has exactly the size that a kernel may use, so that the address sanitizer sees any access
// outside; moved rows are compared with those of simple loops.
//
// LLVMFuzzerTestOneInput is libFuzzer's entry point: clang++ -fsanitize=fuzzer,address,undefined.
// FUZZ_STANDALONE adds a main that needs no libFuzzer: fuzz_kernels [seconds] [seed].
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "sparse_kernels/cpu/compact.h"
#include "sparse_kernels/cpu/gather.h"
#include "sparse_kernels/cpu/instruction_set.h"
#include "sparse_kernels/cpu/row_stats.h"

namespace sk = sparse_kernels;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

// The input's bytes, then zeros.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint64_t number() {
    uint64_t value = 0;
    const size_t taken = std::min(size_, sizeof value);
    if (taken) std::memcpy(&value, data_, taken);
    data_ += taken;
    size_ -= taken;
    // Mixed, so that short inputs make many different numbers too.
    value = (value ^ ++drawn_ * 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
    return value ^ value >> 29;
  }
  int64_t below(int64_t bound) { return int64_t(number() % uint64_t(bound)); }
  bool coin() { return number() & 1; }
  // Sizes are mostly small, and around the lengths of vectors and words.
  int64_t size(int64_t most) {
    const int64_t edges[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129};
    const int64_t value = coin() ? edges[below(15)] : below(coin() ? 40 : most + 1);
    return std::min(value, most);
  }
  template <class T>
  std::vector<T> fill(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    for (T& value : values) {
      const uint64_t bits = number();
      std::memcpy(&value, &bits, sizeof value);
    }
    return values;
  }

 private:
  const uint8_t* data_;
  size_t size_;
  uint64_t drawn_ = 0;
};

// Memory that begins at any address and ends exactly where the allocation ends.
class Block {
 public:
  Block(int64_t bytes, int64_t offset)
      : memory_(static_cast<size_t>(bytes + offset)), offset_(offset) {}
  char* begin() { return memory_.data() + offset_; }

 private:
  std::vector<char> memory_;
  int64_t offset_;
};

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
  int64_t item, elements;  // bytes of a logit; logits from the first to the last
  bool bad_targets;
  std::vector<Block> inputs;
  std::vector<std::vector<float>> outputs;
  std::vector<int64_t> argmax;
  std::vector<float> offset;
  std::vector<uint8_t> mask;

  explicit RowStatsCase(Bytes& bytes) {
    inputs.reserve(2);
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

  float* output() { return outputs.emplace_back(size_t(args.rows), -7.0f).data(); }

 private:
  char* input(int64_t bytes, int64_t offset) {
    inputs.emplace_back(bytes, offset);
    return inputs.back().begin();
  }

  // Strides of the dimensions, the classes among them, in any order and with gaps.
  void choose_layout(Bytes& bytes) {
    const int dtype = int(bytes.below(3));
    item = dtype == 0 ? 4 : 2;
    args.dtype = sk::DType(dtype);
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
      (d < 0 ? args.class_stride : layout.stride[d]) = stride;
      stride = stride * (d < 0 ? args.classes : std::max<int64_t>(layout.size[d], 1)) +
               (bytes.below(4) ? 0 : bytes.below(3));
    }
    elements = args.rows ? 1 + (args.classes - 1) * args.class_stride : 0;
    for (int d = 0; d < layout.dimensions && args.rows; ++d)
      elements += (layout.size[d] - 1) * layout.stride[d];
  }

  void choose_logits(Bytes& bytes) {
    char* logits = input(elements * item, item * bytes.below(8));
    const bool wild = bytes.coin();
    for (int64_t i = 0; i < elements; ++i) {
      uint64_t bits = bytes.number();
      if (!wild) {  // small numbers: exponents near that of 1
        const float value = float(int64_t(bits % 4000)) * 0.01f - 20.0f;
        uint32_t word;
        std::memcpy(&word, &value, 4);
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
      offset = bytes.fill<float>(args.rows);
      args.offset = offset.data();
    }
    if (!bytes.coin()) return;
    args.weight = output();
    args.gate_temperature = 0.5f;
    args.p_min = 0.1f;
    args.seed = bytes.number();
  }
};

void fuzz_row_stats_backward(Bytes& bytes, const RowStatsCase& forward) {
  const sk::RowStatsArgs& args = forward.args;
  sk::RowStatsBackwardArgs backward{};
  static_cast<sk::RowStatsInput&>(backward) = args;
  Block gradient(forward.elements * forward.item, forward.item * bytes.below(8));
  backward.gradient = gradient.begin();
  backward.gradient_class_stride = args.class_stride;
  backward.gradient_layout = args.layout;
  backward.maximum = args.saved_maximum;
  backward.total = args.saved_total;
  const std::vector<float> upstream(size_t(args.rows), 1.0f);
  backward.loss_gradient = upstream.data();
  if (bytes.coin()) {
    backward.entropy = args.outputs[sk::kEntropy];
    backward.entropy_gradient = upstream.data();
  }
  sk::row_stats_backward(backward);
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

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const auto sets = sk::available_instruction_sets();
  sk::set_instruction_set(sets[size_t(bytes.below(int64_t(sets.size())))]);
  switch (bytes.below(4)) {
    case 0:
      fuzz_compact(bytes);
      break;
    case 1:
      fuzz_move(bytes, false);
      break;
    case 2:
      fuzz_move(bytes, true);
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
