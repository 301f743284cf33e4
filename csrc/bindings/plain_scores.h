// Statistics, scores and a gate's decisions, made from plain tensors.
#pragma once

#include <Python.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "plain_tensors.h"
#include "row_stats_arguments.h"

namespace sparse_kernels {
namespace plain {

// Contiguous logits, the classes in the last dimension, their targets and a call's settings.
struct ScoredRows {
  Input logits, targets;
  Settings settings;

  ScoredRows(PyObject* logits_object, PyObject* targets_object, PyObject* settings_object)
      : logits(logits_object), targets(targets_object) {
    const int row_ndim = logits.t.ndim - 1;
    const DataType dtype = logits.t.dtype;
    require(dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16);
    require(row_ndim >= 0 && logits.t.shape[row_ndim] > 0);
    require(targets.is(kInt64, row_ndim) || targets.is(kInt32, row_ndim));
    for (int d = 0; d < row_ndim; ++d) require(targets.t.shape[d] == logits.t.shape[d]);
    require(read_settings(settings_object, &settings));
  }

  void describe(RowStatsInput& call) const {
    set_scoring(call, settings);
    const DataType dtype = logits.t.dtype;
    call.dtype = dtype == kFloat32    ? DType::kFloat32
                 : dtype == kBFloat16 ? DType::kBFloat16
                                      : DType::kFloat16;
    call.logits = logits.data<void>();
    call.rows = targets.numel();
    call.classes = logits.t.shape[logits.t.ndim - 1];
    call.class_stride = 1;
    call.layout.dimensions = 1;
    call.layout.stride[0] = call.classes;
    call.targets = targets.data<void>();
    call.targets_are_int32 = targets.t.dtype == kInt32;
  }

  // Of one value a row.
  Output row_wise(DataType type) const { return Output(targets.t.shape, targets.t.ndim, type); }
};

// Statistics, and what their gradient needs.
struct Statistics : ScoredRows {
  static constexpr int kFields = 9;  // sparse_kernels.types.RowStats's, the last a head's alone
  Output fields[kFields], maximum, total;

  // logits, targets, settings
  explicit Statistics(PyObject* const* args) : ScoredRows(args[0], args[1], args[2]) {}

  // `names` is a tuple or list of fields' names.
  void run(PyObject* names, bool with_gradient) {
    static constexpr const char* kNames[] = {"loss",     "entropy", "grad_norm", "sum_squares",
                                             "max_prob", "margin",  "argmax",    "logsumexp"};
    static constexpr int kArgmax = 6;
    require(PyTuple_CheckExact(names) || PyList_CheckExact(names));
    RowStatsArgs call{};
    describe(call);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(names); ++i) {
      PyObject* name = PySequence_Fast_GET_ITEM(names, i);
      require(PyUnicode_CheckExact(name));
      int k = 0;
      while (k < kFields - 1 && PyUnicode_CompareWithASCIIString(name, kNames[k]) != 0) ++k;
      require(k < kFields - 1);
      if (!fields[k].data<void>()) fields[k] = row_wise(k == kArgmax ? kInt64 : kFloat32);
    }
    call.argmax = fields[kArgmax].data<int64_t>();
    for (int k = 0, statistic = 0; k < kFields - 1; ++k)
      if (k != kArgmax) call.outputs[statistic++] = fields[k].data<void>();
    if (with_gradient) {
      maximum = row_wise(kFloat32);
      total = row_wise(kFloat32);
      call.saved_maximum = maximum.data<void>();
      call.saved_total = total.data<void>();
    }
    RowStatsResult result;
    {
      Unlocked unlocked;
      result = row_stats(call);
    }
    require(result.bad_target_row < 0);
  }
};

// A number of each row, float32: contiguous, or one number that all rows share.
struct RowWise {
  const void* data = nullptr;  // null for None
  int64_t step = 1;

  RowWise(PyObject* object, const ScoredRows& rows) {
    if (object == Py_None) return;
    const dlpack::Tensor t = looked_at(object);
    require(t.dtype == kFloat32 && t.ndim == rows.targets.t.ndim);
    bool shared = t.strides && rows.targets.numel() > 1;
    for (int d = 0; d < t.ndim; ++d) {
      require(t.shape[d] == rows.targets.t.shape[d]);
      shared = shared && (t.strides[d] == 0 || t.shape[d] == 1);
    }
    if (!shared) {
      data = Input(object).data<void>();
    } else {
      require(t.data && !is_negated(object));
      data = static_cast<const char*>(t.data) + t.byte_offset;
      step = 0;
    }
  }
};

// The number of rows whose gradient is 0, whatever their logits.
inline int64_t idle_rows(const RowStatsInput& call, const RowWise& of_loss,
                         const RowWise& of_entropy) {
  const auto is_zero = [](const RowWise& gradient, int64_t row) {
    return !gradient.data || static_cast<const float*>(gradient.data)[row * gradient.step] == 0;
  };
  int64_t idle = 0;
  for (int64_t row = 0; row < call.rows; ++row)
    idle += target_of(call, row) == call.ignore_index ||
            (is_zero(of_loss, row) && is_zero(of_entropy, row));
  return idle;
}

// A plain number that float32 can hold, or the only element of a float32 tensor.
inline float number(PyObject* object) {
  if (PyFloat_CheckExact(object) || PyLong_CheckExact(object)) {
    const double value = PyFloat_AsDouble(object);
    require(value != -1.0 || !PyErr_Occurred());
    require(!std::isfinite(value) || std::fabs(value) <= double(std::numeric_limits<float>::max()));
    return float(value);
  }
  const Input tensor(object);
  require(tensor.t.dtype == kFloat32 && tensor.numel() == 1);
  return *tensor.data<float>();
}

// Scores and decisions.
struct Scores : ScoredRows {
  RowStatsArgs call{};
  Output mask, significance, weight, invalid, grad_norm;

  // logits, targets, weights, settings
  static constexpr int kArguments = 4;

  explicit Scores(PyObject* const* args) : ScoredRows(args[0], args[1], args[3]) {
    require(read_weights(args[2], call.weights));
    describe(call);
    set_draws(call, settings);
  }

  // The step is the first value of its tensor, unless it was a number.
  void run(float threshold, const Input* step, bool with_grad_norm) {
    require(!step || step->t.dtype == kInt64);
    mask = row_wise(kBool);
    significance = row_wise(kFloat32);
    invalid = Output(nullptr, 0, kInt32);
    if (call.gate_temperature > 0) weight = row_wise(kFloat32);
    if (with_grad_norm) grad_norm = row_wise(kFloat32);
    call.threshold = threshold;
    if (step) call.step = uint64_t(*step->data<int64_t>());
    call.mask = mask.data<uint8_t>();
    call.significance = significance.data<void>();
    call.weight = weight.data<float>();
    call.outputs[kGradNorm] = grad_norm.data<void>();
    RowStatsResult result;
    {
      Unlocked unlocked;
      result = row_stats(call);
    }
    require(result.bad_target_row < 0);
    *invalid.data<int32_t>() = int32_t(result.invalid);
  }

  void run(PyObject* threshold_object, PyObject* step_object) {
    const float threshold = number(threshold_object);
    if (PyLong_Check(step_object)) return run(threshold, nullptr, false);
    const Input step(step_object);
    require(step.numel() == 1);
    run(threshold, &step, false);
  }
};

}  // namespace plain
}  // namespace sparse_kernels
