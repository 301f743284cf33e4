// sparse_kernels._cpp's functions of plain tensors: operands recognised, outputs made and the
// kernel run in one call, because for a few rows each step in Python takes longer than the kernel.
//
// Each serves the common case and returns None for everything else, errors included: then the
// general route of Python serves the call, or says what is wrong with it. So nothing here has a
// message, and what is recognised may be narrower than what is served in the end, never wider.
#include "direct.h"

#include <initializer_list>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "cpu/compact.h"
#include "cpu/control.h"
#include "cpu/gather.h"
#include "cpu/row_stats.h"
#include "plain_tensors.h"
#include "row_stats_arguments.h"

namespace sparse_kernels {
namespace {

using namespace plain;

// `last`: one more item, whose reference is taken over; or none.
PyObject* tuple_of(std::initializer_list<Output*> outputs, PyObject* last = nullptr) {
  Reference owned(last), tuple(PyTuple_New(Py_ssize_t(outputs.size()) + (last != nullptr)));
  require(tuple.object);
  Py_ssize_t i = 0;
  for (Output* output : outputs) PyTuple_SET_ITEM(tuple.object, i++, output->take());
  if (last) PyTuple_SET_ITEM(tuple.object, i, owned.release());
  return tuple.release();
}

class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

int64_t integer(PyObject* object) {
  require(PyLong_CheckExact(object));
  const int64_t value = PyLong_AsLongLong(object);
  require(value != -1 || !PyErr_Occurred());
  return value;
}

// A selection's tensors.
struct Packed {
  Output index, weight, count, overflow;
  int64_t slots = 0;

  // `capacity` is None for as many slots as are kept.
  Packed(const uint8_t* mask, const float* weight_in, int64_t rows, PyObject* capacity) {
    std::vector<int64_t> counts;
    if (capacity == Py_None) {
      counts = count_flags(mask, rows);
      for (int64_t c : counts) slots += c;
    } else {
      slots = integer(capacity);
      require(slots >= 0 && slots <= std::numeric_limits<int32_t>::max());
    }
    index = Output(&slots, 1, kInt64);
    weight = Output(&slots, 1, kFloat32);
    count = Output(nullptr, 0, kInt32);
    overflow = Output(nullptr, 0, kInt32);
    const int64_t total = compact(mask, weight_in, rows, std::move(counts), slots,
                                  index.data<int64_t>(), weight.data<float>());
    const int64_t kept = total < slots ? total : slots;
    *count.data<int32_t>() = int32_t(kept);
    *overflow.data<int32_t>() = int32_t(total - kept);
  }
};

// mask, weight, capacity -> index, weight, count, overflow
PyObject* compact_plain(PyObject* const* args) {
  const Input mask(args[0]);
  require(mask.is(kBool, 1));
  const int64_t rows = mask.t.shape[0];
  const float* weight = nullptr;
  if (args[1] != Py_None) {
    const Input weights(args[1]);
    require(weights.is(kFloat32, 1) && weights.t.shape[0] == rows);
    weight = weights.data<float>();
  }
  Packed packed(mask.data<uint8_t>(), weight, rows, args[2]);
  return tuple_of({&packed.index, &packed.weight, &packed.count, &packed.overflow});
}

// The rows of a tree of contiguous tensors at `index`, [slots], each below `rows`.
PyObject* packed_rows(PyObject* tree, const int64_t* index, int64_t slots, int64_t rows,
                      PyObject* grad_enabled) {
  require(rows > 0);
  const bool is_dict = PyDict_CheckExact(tree), is_list = PyList_CheckExact(tree);
  const bool is_one = !is_dict && !is_list && !PyTuple_CheckExact(tree);
  // References of our own: other threads may change the tree while the rows are moved.
  const Reference keys(is_dict ? PyDict_Keys(tree) : nullptr);
  const Reference leaves(is_one    ? PyTuple_Pack(1, tree)
                         : is_dict ? PyDict_Values(tree)
                                   : PySequence_Tuple(tree));
  require(leaves.object);
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(leaves.object);

  std::vector<Output> outputs;
  std::vector<RowMove> moves;
  outputs.reserve(size_t(size));
  moves.reserve(size_t(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* leaf = PySequence_Fast_GET_ITEM(leaves.object, i);
    const Input in(leaf);
    require(in.t.ndim > 0 && in.t.shape[0] == rows && in.t.dtype.lanes == 1);
    require(grad_enabled != Py_True || !is_true(PyObject_GetAttr(leaf, requires_grad_name)));
    const int64_t row_bytes = in.numel() / rows * ((in.t.dtype.bits + 7) / 8);
    std::vector<int64_t> shape(in.t.shape, in.t.shape + in.t.ndim);
    shape[0] = slots;
    outputs.emplace_back(shape.data(), in.t.ndim, in.t.dtype);
    moves.push_back({in.data<char>(), row_bytes, outputs.back().data<char>(), row_bytes});
  }
  int64_t bad_slot;
  {
    Unlocked unlocked;
    bad_slot = gather_rows(moves, index, slots, rows);
  }
  require(bad_slot < 0);

  if (is_one) return outputs[0].take();
  Reference packed(is_dict ? PyDict_New() : is_list ? PyList_New(size) : PyTuple_New(size));
  require(packed.object);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* tensor = outputs[size_t(i)].take();
    if (is_dict) {
      const Reference owned(tensor);
      require(PyDict_SetItem(packed.object, PyList_GET_ITEM(keys.object, i), tensor) == 0);
    } else if (is_list) {
      PyList_SET_ITEM(packed.object, i, tensor);
    } else {
      PyTuple_SET_ITEM(packed.object, i, tensor);
    }
  }
  return packed.release();
}

// tree, index, rows, whether gradients are enabled -> the tree's packed rows
PyObject* gather_plain(PyObject* const* args) {
  const Input index(args[1]);
  require(index.is(kInt64, 1));
  return packed_rows(args[0], index.data<int64_t>(), index.t.shape[0], integer(args[2]), args[3]);
}

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

// Scores' arguments, threshold -> mask, significance, weight, invalid
PyObject* gate_rows_plain(PyObject* const* args) {
  Scores scores(args);
  scores.run(args[Scores::kArguments], PyTuple_GET_ITEM(args[3], 7));
  return tuple_of({&scores.mask, &scores.significance, &scores.weight, &scores.invalid});
}

// Scores' arguments, threshold, capacity, tree, whether gradients are enabled -> as gate_rows, then
// as compact, then the tree's packed rows: None without a tree or where the general route must.
PyObject* select_plain(PyObject* const* args) {
  PyObject* const* rest = args + Scores::kArguments;
  Scores scores(args);
  scores.run(rest[0], PyTuple_GET_ITEM(args[3], 7));
  const int64_t rows = scores.call.rows;
  Packed packed(scores.mask.data<uint8_t>(), scores.weight.data<float>(), rows, rest[1]);
  PyObject* tree = nullptr;
  if (rest[2] != Py_None) try {
      tree = packed_rows(rest[2], packed.index.data<int64_t>(), packed.slots, rows, rest[3]);
    } catch (const NotServed&) {
      PyErr_Clear();
    }
  return tuple_of({&scores.mask, &scores.significance, &scores.weight, &scores.invalid,
                   &packed.index, &packed.weight, &packed.count, &packed.overflow},
                  tree ? tree : Py_NewRef(Py_None));
}

// Scores' arguments, a state's values and counters, setpoint, capacity, whether by mass -> as
// select, then grad_norm. The state has not changed where None is returned.
PyObject* gate_step_plain(PyObject* const* args) {
  PyObject* const* rest = args + Scores::kArguments;
  const Input values(rest[0]), counters(rest[1]), setpoint(rest[2]);
  require(values.is(kFloat32, 1) && values.t.shape[0] == kControlValues);
  require(counters.is(kInt64, 1) && counters.t.shape[0] == kControlCounters);
  require(setpoint.t.dtype == kFloat32 && setpoint.numel() == 1);
  Scores scores(args);
  scores.run(values, &counters, rest[4] == Py_True);  // they begin with the threshold and the step
  Packed packed(scores.mask.data<uint8_t>(), scores.weight.data<float>(), scores.call.rows,
                rest[3]);
  ControlArgs call{};
  call.values = values.data<float>();
  call.counters = counters.data<int64_t>();
  call.significance = scores.significance.data<float>();
  call.labels = scores.targets.data<void>();
  call.label_bytes = scores.targets.t.dtype.bits / 8;
  call.ignore_index = scores.settings.ignore_index;
  call.mass = scores.grad_norm.data<float>();
  call.setpoint = setpoint.data<float>();
  call.overflow = packed.overflow.data<int32_t>();
  call.states = 1;
  call.rows = scores.call.rows;
  call.settings = {float(scores.settings.gate_temperature), float(scores.settings.p_min)};
  PyObject* results =
      tuple_of({&scores.mask, &scores.significance, &scores.weight, &scores.invalid, &packed.index,
                &packed.weight, &packed.count, &packed.overflow, &scores.grad_norm});
  Unlocked unlocked;
  control(call);
  return results;
}

template <PyObject* (*function)(PyObject* const*), Py_ssize_t arguments>
PyObject* served_or_none(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != arguments) {
    PyErr_BadArgument();
    return nullptr;
  }
  if (api) try {
      return function(args);
    } catch (const NotServed&) {
      PyErr_Clear();
    } catch (const std::bad_alloc&) {
    }
  Py_RETURN_NONE;
}

// Tensor's exchange interface, Tensor, Parameter -> whether this version of it can be used.
PyObject* use_exchange_api(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyType_Check(args[1]) || !PyType_Check(args[2])) {
    PyErr_BadArgument();
    return nullptr;
  }
  const auto* offered =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (!offered) return nullptr;
  while (offered && offered->version.major != dlpack::kMajor) offered = offered->previous;
  if (!offered || !offered->look) Py_RETURN_FALSE;
  for (int i = 0; i < 2; ++i) types[i] = reinterpret_cast<PyTypeObject*>(Py_NewRef(args[i + 1]));
  requires_grad_name = PyUnicode_InternFromString("requires_grad");
  is_neg_name = PyUnicode_InternFromString("is_neg");
  is_conj_name = PyUnicode_InternFromString("is_conj");
  api = offered;
  Py_RETURN_TRUE;
}

using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, FastFunction function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, nullptr};
}

PyMethodDef functions[] = {
    method("use_exchange_api", use_exchange_api),
    method("compact_plain", served_or_none<compact_plain, 3>),
    method("gather_plain", served_or_none<gather_plain, 4>),
    method("gate_rows_plain", served_or_none<gate_rows_plain, Scores::kArguments + 1>),
    method("select_plain", served_or_none<select_plain, Scores::kArguments + 4>),
    method("gate_step_plain", served_or_none<gate_step_plain, Scores::kArguments + 5>),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_functions(PyObject* module) { PyModule_AddFunctions(module, functions); }

}  // namespace sparse_kernels
