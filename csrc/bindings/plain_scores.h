// Scores and a gate's decisions, made from plain tensors.
#pragma once

#include <Python.h>

#include <cstdint>

#include "plain_tensors.h"
#include "row_stats_arguments.h"

namespace sparse_kernels {
namespace plain {

// Scores and decisions of contiguous logits, the classes in the last dimension.
struct Scores {
  Input logits, targets;
  Settings settings;
  RowStatsArgs call{};
  Output mask, significance, weight, invalid, grad_norm;

  // logits, targets, weights, settings
  static constexpr int kArguments = 4;

  explicit Scores(PyObject* const* args) : logits(args[0]), targets(args[1]) {
    const int row_ndim = logits.t.ndim - 1;
    const DataType dtype = logits.t.dtype;
    require(dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16);
    require(row_ndim >= 0 && logits.t.shape[row_ndim] > 0);
    require(targets.is(kInt64, row_ndim) || targets.is(kInt32, row_ndim));
    for (int d = 0; d < row_ndim; ++d) require(targets.t.shape[d] == logits.t.shape[d]);
    require(read_weights(args[2], call.weights) && read_settings(args[3], &settings));
    set_scoring(call, settings);
    set_draws(call, settings);
    call.dtype = dtype == kFloat32    ? DType::kFloat32
                 : dtype == kBFloat16 ? DType::kBFloat16
                                      : DType::kFloat16;
    call.logits = logits.data<void>();
    call.rows = targets.numel();
    call.classes = logits.t.shape[row_ndim];
    call.class_stride = 1;
    call.layout.dimensions = 1;
    call.layout.stride[0] = call.classes;
    call.targets = targets.data<void>();
    call.targets_are_int32 = targets.t.dtype == kInt32;
  }

  // The threshold, and the step unless it was a number, are the first value of their tensors.
  void run(const Input& threshold, const Input* step, bool with_grad_norm) {
    require(threshold.t.dtype == kFloat32 && (!step || step->t.dtype == kInt64));
    const auto row_wise = [&](DataType type) {
      return Output(targets.t.shape, targets.t.ndim, type);
    };
    mask = row_wise(kBool);
    significance = row_wise(kFloat32);
    invalid = Output(nullptr, 0, kInt32);
    if (call.gate_temperature > 0) weight = row_wise(kFloat32);
    if (with_grad_norm) grad_norm = row_wise(kFloat32);
    call.threshold = *threshold.data<float>();
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
    const Input threshold(threshold_object);
    require(threshold.numel() == 1);
    if (PyLong_Check(step_object)) return run(threshold, nullptr, false);
    const Input step(step_object);
    require(step.numel() == 1);
    run(threshold, &step, false);
  }
};

}  // namespace plain
}  // namespace sparse_kernels
