// Serves calls of the CPU kernels that it reads from the standard input, until that ends. So an
// emulator runs the kernels of another processor for tests/helpers/emulated.py, which describes
// the requests and has the same functions as sparse_kernels._cpp.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "sparse_kernels/cpu/compact.h"
#include "sparse_kernels/cpu/gather.h"
#include "sparse_kernels/cpu/instruction_set.h"
#include "sparse_kernels/cpu/row_stats.h"

namespace sk = sparse_kernels;

namespace {

void read(void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);  // the input has ended
}

template <class T>
T next() {
  T value;
  read(&value, sizeof value);
  return value;
}
int64_t integer() { return next<int64_t>(); }
double real() { return next<double>(); }

// A call's memory, which goes back with its result.
std::deque<std::vector<char>> blocks;

// The next operand's bytes, of exactly the size that the kernel may use; or null.
void* memory() {
  const int64_t bytes = integer();
  if (bytes < 0) return nullptr;
  blocks.emplace_back(size_t(bytes));
  read(blocks.back().data(), size_t(bytes));
  return blocks.back().data();
}
template <class T>
T* memory_of() {
  return static_cast<T*>(memory());
}

void answer(int64_t result) {
  std::fwrite(&result, sizeof result, 1, stdout);
  for (const std::vector<char>& block : blocks) std::fwrite(block.data(), 1, block.size(), stdout);
  std::fflush(stdout);
  blocks.clear();
}

sk::RowLayout layout(int64_t* class_stride) {
  sk::RowLayout rows{};
  rows.dimensions = int(integer());
  *class_stride = integer();
  for (int d = 0; d < rows.dimensions; ++d) {
    rows.size[d] = integer();
    rows.stride[d] = integer();
  }
  return rows;
}

void input(sk::RowStatsInput& args) {
  args.dtype = sk::DType(integer());
  args.rows = integer();
  args.classes = integer();
  args.layout = layout(&args.class_stride);
  args.logits = memory();
  args.targets_are_int32 = integer() != 0;
  args.targets = memory();
  args.inverse_temperature = 1.0 / real();
  args.softcap = real();
  args.label_smoothing = real();
  args.ignore_index = integer();
}

void outputs(sk::RowStatsArgs& args) {
  for (void*& output : args.outputs) output = memory();
  args.argmax = memory_of<int64_t>();
  args.saved_maximum = memory();
  args.saved_total = memory();
}

void row_stats() {
  sk::RowStatsArgs args{};
  input(args);
  outputs(args);
  answer(sk::row_stats(args).bad_target_row);
}

void gate_rows() {
  sk::RowStatsArgs args{};
  input(args);
  outputs(args);
  args.gate_temperature = real();
  args.p_min = real();
  args.seed = uint64_t(integer());
  args.step = uint64_t(integer());
  args.mask = memory_of<uint8_t>();
  args.significance = memory();
  args.weight = memory_of<float>();
  args.offset = memory();
  for (double& weight : args.weights) weight = real();
  args.threshold = real();
  int32_t* invalid = memory_of<int32_t>();
  const sk::RowStatsResult result = sk::row_stats(args);
  *invalid = int32_t(result.invalid);
  answer(result.bad_target_row);
}

void row_stats_backward() {
  sk::RowStatsBackwardArgs args{};
  input(args);
  args.gradient_layout = layout(&args.gradient_class_stride);
  args.gradient = memory();  // null: the logits'
  if (!args.gradient) args.gradient = const_cast<void*>(args.logits);
  args.maximum = memory();
  args.total = memory();
  args.entropy = memory();
  args.loss_gradient = memory();
  args.entropy_gradient = memory();
  args.zeroed = integer() != 0;
  sk::row_stats_backward(args);
  answer(0);
}

void count_flags() {
  const int64_t rows = integer();
  int64_t total = 0;
  for (int64_t count : sk::count_flags(memory_of<uint8_t>(), rows)) total += count;
  answer(total);
}

void compact() {
  const int64_t rows = integer(), capacity = integer();
  const uint8_t* mask = memory_of<uint8_t>();
  const float* weight_in = memory_of<float>();
  int64_t* index = memory_of<int64_t>();
  float* weight = memory_of<float>();
  answer(sk::compact(mask, weight_in, rows, {}, capacity, index, weight));
}

void move_rows(decltype(&sk::gather_rows) function) {
  const int64_t slots = integer(), rows = integer();
  const int64_t* index = memory_of<int64_t>();
  std::vector<sk::RowMove> moves(static_cast<size_t>(integer()));
  for (sk::RowMove& move : moves) {
    move.in_stride = integer();
    move.row_bytes = integer();
    move.in = memory_of<char>();
    move.out = memory_of<char>();
  }
  answer(function(moves, index, slots, rows));
}

void serve(int64_t call) {
  switch (call) {
    case 0:
      sk::set_instruction_set(sk::InstructionSet(integer()));
      return answer(int64_t(sk::available_instruction_sets().back()));
    case 1:
      return row_stats();
    case 2:
      return gate_rows();
    case 3:
      return row_stats_backward();
    case 4:
      return count_flags();
    case 5:
      return compact();
    case 6:
      return move_rows(sk::gather_rows);
    case 7:
      return move_rows(sk::scatter_rows);
  }
  std::fprintf(stderr, "unknown call %lld\n", static_cast<long long>(call));
  std::exit(1);
}

}  // namespace

int main() {
  for (;;) serve(integer());
}
