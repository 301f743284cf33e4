// sparse_kernels._cpp's functions of plain tensors: operands recognised, outputs made and the
// kernel run in one call, because for a few rows each step in Python takes longer than the kernel.
//
// Each serves the common case and returns None for everything else, errors included: then the
// general route of Python serves the call, or says what is wrong with it. So nothing here has a
// message, and what is recognised may be narrower than what is served in the end, never wider.
#include "direct.h"

#include <initializer_list>
#include <new>

#include "plain_scores.h"
#include "plain_selection.h"
#include "plain_tensors.h"
#include "sparse_kernels/cpu/control.h"
#include "sparse_kernels/cpu/large_pages.h"

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

// mask, weight, capacity -> the fields of a Selection
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
  PyObject* size = PyLong_FromLongLong(rows);
  require(size);
  return tuple_of({&packed.index, &packed.weight, &packed.count, &packed.overflow}, size);
}

// The index of a Selection. Its other tensors are not read, but one made by hand must have them.
PyObject* index_of(PyObject* selection) {
  require(PyTuple_GET_SIZE(selection) == 5);
  const auto item = [&](int i) { return PyTuple_GET_ITEM(selection, i); };
  const dlpack::Tensor index = looked_at(item(0)), weight = looked_at(item(1));
  require(index.ndim == 1 && weight.ndim == 1 && weight.shape[0] == index.shape[0]);
  require(weight.dtype == kFloat32);
  for (int i : {2, 3}) {
    const dlpack::Tensor number = looked_at(item(i));
    require(number.dtype == kInt32 && number.ndim == 0);
  }
  return item(0);
}

// tree, Selection or its index, rows, whether gradients are enabled -> the tree's packed rows
PyObject* gather_plain(PyObject* const* args) {
  const Input index(PyTuple_Check(args[1]) ? index_of(args[1]) : args[1]);
  require(index.is(kInt64, 1));
  return packed_rows(args[0], index.data<int64_t>(), index.t.shape[0], integer(args[2]), args[3]);
}

// logits, targets, settings, names of statistics, whether for a gradient -> the fields of a
// RowStats, then maximum and total where for a gradient
PyObject* row_stats_plain(PyObject* const* args) {
  Statistics made(args);
  made.run(args[3], args[4] == Py_True);
  const Py_ssize_t size = Statistics::kFields + (args[4] == Py_True ? 2 : 0);
  Reference tuple(PyTuple_New(size));
  require(tuple.object);
  for (int k = 0; k < Statistics::kFields; ++k)
    PyTuple_SET_ITEM(tuple.object, k, made.fields[k].take());
  if (args[4] == Py_True) {
    PyTuple_SET_ITEM(tuple.object, Statistics::kFields, made.maximum.take());
    PyTuple_SET_ITEM(tuple.object, Statistics::kFields + 1, made.total.take());
  }
  return tuple.release();
}

// logits, targets, settings, maximum, total, entropy, gradients of loss and entropy, of which three
// may be None, untouched_zeros of sparse_kernels.memory -> the gradient in the logits
PyObject* row_stats_backward_plain(PyObject* const* args) {
  const ScoredRows rows(args[0], args[1], args[2]);
  const RowWise maximum(args[3], rows), total(args[4], rows), entropy(args[5], rows),
      of_loss(args[6], rows), of_entropy(args[7], rows);
  require(maximum.data && maximum.step == 1 && total.data && total.step == 1);
  require(!of_entropy.data || (entropy.data && entropy.step == 1));
  RowStatsBackwardArgs call{};
  rows.describe(call);
  // Where rows without a gradient are large together, they take no memory.
  const int64_t row_bytes = call.classes * (rows.logits.t.dtype.bits / 8);
  Reference zeros(nullptr);
  if (call.rows * row_bytes >= kLarge && idle_rows(call, of_loss, of_entropy) * row_bytes >= kLarge)
    require((zeros.object = PyObject_CallOneArg(args[8], args[0])));
  call.zeroed = zeros.object && zeros.object != Py_None;
  Output gradient;
  if (!call.zeroed) gradient = Output(rows.logits.t.shape, rows.logits.t.ndim, rows.logits.t.dtype);
  call.gradient = call.zeroed ? Input(zeros.object).data<void>() : gradient.data<void>();
  call.gradient_class_stride = 1;
  call.gradient_layout = call.layout;
  call.maximum = maximum.data;
  call.total = total.data;
  call.entropy = of_entropy.data ? entropy.data : nullptr;
  call.loss_gradient = of_loss.data;
  call.loss_gradient_step = of_loss.step;
  call.entropy_gradient = of_entropy.data;
  call.entropy_gradient_step = of_entropy.step;
  {
    Unlocked unlocked;
    row_stats_backward(call);
  }
  return call.zeroed ? zeros.release() : gradient.take();
}

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
  // They begin with the threshold and the step.
  scores.run(*values.data<float>(), &counters, rest[4] == Py_True);
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
  const Reference is_neg(PyObject_GetAttr(args[1], is_neg_name));
  if (!is_neg.object) return nullptr;
  if (Py_IS_TYPE(is_neg.object, &PyMethodDescr_Type)) {
    const auto* method = reinterpret_cast<PyMethodDescrObject*>(is_neg.object)->d_method;
    if (method->ml_flags == METH_NOARGS) is_neg_function = method->ml_meth;
  }
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
    method("row_stats_plain", served_or_none<row_stats_plain, 5>),
    method("row_stats_backward_plain", served_or_none<row_stats_backward_plain, 9>),
    method("gate_rows_plain", served_or_none<gate_rows_plain, Scores::kArguments + 1>),
    method("select_plain", served_or_none<select_plain, Scores::kArguments + 4>),
    method("gate_step_plain", served_or_none<gate_step_plain, Scores::kArguments + 5>),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_functions(PyObject* module) { PyModule_AddFunctions(module, functions); }

}  // namespace sparse_kernels
