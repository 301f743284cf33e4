// sparse_kernels._cpp: the CPU kernels for Python. Tensors come as addresses, so that one build
// serves every PyTorch; sparse_kernels/backends/cpp.py checks them before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <utility>
#include <vector>

#include "direct.h"
#include "row_stats_arguments.h"
#include "sparse_kernels/cpu/compact.h"
#include "sparse_kernels/cpu/control.h"
#include "sparse_kernels/cpu/gather.h"
#include "sparse_kernels/cpu/instruction_set.h"
#include "sparse_kernels/cpu/large_pages.h"
#include "sparse_kernels/cpu/parallel.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "sparse_kernels/cpu/sum_tree.h"

namespace py = pybind11;
namespace sk = sparse_kernels;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The statistics in their order, the argmax, and what a backward needs.
constexpr py::ssize_t kOutputs = sk::kStatistics + 3;

// Tuples are read through Python's own accessors: pybind11's casts would cost as much as the
// statistics of a hundred rows.
int64_t integer(const py::tuple& values, py::ssize_t i) {
  const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(values.ptr(), i));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
sk::Settings settings_of(const py::tuple& values) {
  sk::Settings settings;
  if (!sk::read_settings(values.ptr(), &settings)) throw py::error_already_set();
  return settings;
}

// The class stride, the outermost rows' stride, then size and stride of each further dimension.
sk::RowLayout row_layout(const py::tuple& layout) {
  sk::RowLayout rows{};
  rows.dimensions = int(layout.size() / 2);
  if (rows.dimensions < 1 || rows.dimensions > sk::RowLayout::kDimensions)
    throw std::invalid_argument("a layout must have 1 to 4 dimensions of rows");
  rows.stride[0] = integer(layout, 1);
  for (int d = 1; d < rows.dimensions; ++d) {
    rows.size[d] = integer(layout, 2 * d);
    rows.stride[d] = integer(layout, 2 * d + 1);
  }
  return rows;
}

void set_input(sk::RowStatsInput& args, Address logits, int dtype, int64_t rows, int64_t classes,
               const py::tuple& layout, Address targets, bool targets_are_int32,
               const sk::Settings& settings) {
  args.logits = at<void>(logits);
  args.dtype = sk::DType(dtype);
  args.rows = rows;
  args.classes = classes;
  args.class_stride = integer(layout, 0);
  args.layout = row_layout(layout);
  args.targets = at<void>(targets);
  args.targets_are_int32 = targets_are_int32;
  sk::set_scoring(args, settings);
}

void set_outputs(sk::RowStatsArgs& args, const py::tuple& outputs) {
  if (PyTuple_GET_SIZE(outputs.ptr()) == 0) return;  // none
  if (PyTuple_GET_SIZE(outputs.ptr()) != kOutputs)
    throw std::invalid_argument(
        "outputs must be a tuple of as many addresses as there are outputs");
  const auto address = [&](int k) { return Address(integer(outputs, k)); };
  for (int k = 0; k < sk::kStatistics; ++k) args.outputs[k] = at<void>(address(k));
  args.argmax = at<int64_t>(address(sk::kStatistics));
  args.saved_maximum = at<void>(address(sk::kStatistics + 1));
  args.saved_total = at<void>(address(sk::kStatistics + 2));
}

// The levels' addresses come as a tuple.
sk::SumTree sum_tree(Address leaves, int64_t size, const py::tuple& levels) {
  sk::SumTree tree{at<float>(leaves), size, {}, int(levels.size())};
  if (tree.depth > sk::SumTree::kLevels)
    throw std::invalid_argument("levels must not be more than a tree can have");
  for (int level = 0; level < tree.depth; ++level)
    tree.levels[level] = at<double>(Address(integer(levels, level)));
  return tree;
}

// Returns the lowest row with a bad target, or -1.
int64_t run(const sk::RowStatsArgs& args, int32_t* invalid) {
  py::gil_scoped_release unlocked;
  const sk::RowStatsResult result = sk::row_stats(args);
  if (invalid) *invalid = int32_t(result.invalid);
  return result.bad_target_row;
}

void pack(Address mask, Address weight_in, int64_t rows, std::vector<int64_t> counts,
          int64_t capacity, Address index, Address weight, Address count, Address overflow) {
  const int64_t total =
      sk::compact(at<uint8_t>(mask), at<float>(weight_in), rows, std::move(counts), capacity,
                  at<int64_t>(index), at<float>(weight));
  const int64_t kept = total < capacity ? total : capacity;
  *at<int32_t>(count) = int32_t(kept);
  *at<int32_t>(overflow) = int32_t(total - kept);
}

void control(Address values, Address counters, Address significance, Address labels,
             int label_bytes, Address mass, Address setpoint, Address overflow, int64_t states,
             int64_t rows, const py::tuple& setting_values) {
  const sk::Settings settings = settings_of(setting_values);
  const sk::ControlArgs args{at<float>(values),
                             at<int64_t>(counters),
                             at<float>(significance),
                             at<void>(labels),
                             label_bytes,
                             settings.ignore_index,
                             at<float>(mass),
                             at<float>(setpoint),
                             at<int32_t>(overflow),
                             states,
                             rows,
                             {float(settings.gate_temperature), float(settings.p_min)}};
  py::gil_scoped_release unlocked;
  sk::control(args);
}

// The tensors' moves one after the other: input, its row stride in bytes, output, bytes of a row.
template <class Function>
int64_t move_rows(const Function& function, const py::tuple& numbers, Address index, int64_t slots,
                  int64_t rows) {
  std::vector<sk::RowMove> moves(numbers.size() / 4);
  py::ssize_t i = 0;
  for (sk::RowMove& move : moves) {
    move.in = at<char>(Address(integer(numbers, i++)));
    move.in_stride = integer(numbers, i++);
    move.out = at<char>(Address(integer(numbers, i++)));
    move.row_bytes = integer(numbers, i++);
  }
  py::gil_scoped_release unlocked;
  return function(moves, at<int64_t>(index), slots, rows);
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  m.doc() = "CPU kernels of sparse_kernels; called by sparse_kernels.backends.cpp alone.";

  m.def("row_stats", [](Address logits, int dtype, int64_t rows, int64_t classes,
                        const py::tuple& layout, Address targets, bool targets_are_int32,
                        const py::tuple& settings, const py::tuple& outputs) {
    sk::RowStatsArgs args{};
    set_input(args, logits, dtype, rows, classes, layout, targets, targets_are_int32,
              settings_of(settings));
    set_outputs(args, outputs);
    return run(args, nullptr);
  });

  m.def("row_stats_backward",
        [](Address logits, int dtype, int64_t rows, int64_t classes, const py::tuple& layout,
           Address targets, bool targets_are_int32, const py::tuple& settings, Address gradient,
           const py::tuple& gradient_layout, Address maximum, Address total, Address entropy,
           Address loss_gradient, Address entropy_gradient, bool zeroed) {
          sk::RowStatsBackwardArgs args{};
          set_input(args, logits, dtype, rows, classes, layout, targets, targets_are_int32,
                    settings_of(settings));
          args.gradient = at<void>(gradient);
          args.gradient_class_stride = integer(gradient_layout, 0);
          args.gradient_layout = row_layout(gradient_layout);
          args.maximum = at<void>(maximum);
          args.total = at<void>(total);
          args.entropy = at<void>(entropy);
          args.loss_gradient = at<void>(loss_gradient);
          args.entropy_gradient = at<void>(entropy_gradient);
          args.zeroed = zeroed;
          py::gil_scoped_release unlocked;
          sk::row_stats_backward(args);
        });

  m.def("gate_rows", [](Address logits, int dtype, int64_t rows, int64_t classes,
                        const py::tuple& layout, Address targets, bool targets_are_int32,
                        const py::tuple& setting_values, const py::tuple& outputs, Address mask,
                        Address significance, Address weight, Address offset,
                        const py::dict& weights, Address threshold, Address invalid) {
    sk::RowStatsArgs args{};
    const sk::Settings settings = settings_of(setting_values);
    set_input(args, logits, dtype, rows, classes, layout, targets, targets_are_int32, settings);
    set_outputs(args, outputs);
    sk::set_draws(args, settings);
    args.mask = at<uint8_t>(mask);
    args.significance = at<void>(significance);
    args.weight = at<float>(weight);
    args.offset = at<void>(offset);
    if (!sk::read_weights(weights.ptr(), args.weights))
      throw std::invalid_argument("weights must be numbers, named by their statistics");
    args.threshold =
        args.dtype == sk::DType::kFloat64 ? *at<double>(threshold) : *at<float>(threshold);
    return run(args, at<int32_t>(invalid));
  });

  m.def("count_flags",
        [](Address mask, int64_t rows) { return sk::count_flags(at<uint8_t>(mask), rows); });

  m.def("compact", &pack);

  // The two that end a gate's call, on what gate_rows has left in the cache.
  m.def("compact_and_control",
        [](Address mask, Address weight_in, int64_t rows, std::vector<int64_t> counts,
           int64_t capacity, Address index, Address weight, Address count, Address overflow,
           Address values, Address counters, Address significance, Address labels, int label_bytes,
           Address mass, Address setpoint, const py::tuple& settings) {
          pack(mask, weight_in, rows, std::move(counts), capacity, index, weight, count, overflow);
          control(values, counters, significance, labels, label_bytes, mass, setpoint, overflow, 1,
                  rows, settings);
        });

  m.def("control", &control);

  m.def("gather_rows", [](const py::tuple& moves, Address index, int64_t slots, int64_t rows) {
    return move_rows(sk::gather_rows, moves, index, slots, rows);
  });
  m.def("scatter_rows", [](const py::tuple& moves, Address index, int64_t slots, int64_t rows) {
    return move_rows(sk::scatter_rows, moves, index, slots, rows);
  });

  m.def("philox_uniform",
        [](uint64_t seed, uint64_t step, Address rows, int64_t count, Address out) {
          py::gil_scoped_release unlocked;
          sk::philox_uniform(seed, step, at<int64_t>(rows), count, at<double>(out));
        });
  m.def("sum_tree_build", [](Address leaves, int64_t size, const py::tuple& levels) {
    const sk::SumTree tree = sum_tree(leaves, size, levels);
    py::gil_scoped_release unlocked;
    sk::sum_tree_build(tree);
  });
  m.def("sum_tree_update",
        [](Address leaves, int64_t size, const py::tuple& levels, Address index, int64_t count) {
          const sk::SumTree tree = sum_tree(leaves, size, levels);
          py::gil_scoped_release unlocked;
          sk::sum_tree_update(tree, at<int64_t>(index), count);
        });
  m.def("sum_tree_find", [](Address leaves, int64_t size, const py::tuple& levels, Address targets,
                            int64_t count, Address out) {
    const sk::SumTree tree = sum_tree(leaves, size, levels);
    py::gil_scoped_release unlocked;
    sk::sum_tree_find(tree, at<double>(targets), count, at<int64_t>(out));
  });

  m.attr("LARGE") = sk::kLarge;
  m.def("request_large_pages",
        [](Address memory, int64_t bytes) { sk::request_large_pages(at<void>(memory), bytes); });

  m.def("instruction_set", [] { return sk::name_of(sk::instruction_set()); });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (auto value : sk::available_instruction_sets()) names.push_back(sk::name_of(value));
    return names;
  });
  m.def("set_instruction_set", [](const std::string& name) {
    sk::set_instruction_set(sk::instruction_set_from_name(name));
  });
  m.def("max_threads", &sk::max_threads);
  sk::add_direct_functions(m.ptr());
}
