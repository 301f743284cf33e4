// sparse_kernels._cpp's functions of plain tensors: looked at, checked, their outputs made and the
// kernel run in one call, because for a few rows each step in Python takes longer than the kernel.
//
// Each returns None for anything but the common case, and where the kernel finds an index or a
// target out of range: then the general route serves, or says what is wrong. So a check here may
// be stricter than what is served in the end, and never laxer; no message is written twice.
#include "direct.h"

#include <initializer_list>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "sparse_kernels/cpu/compact.h"
#include "sparse_kernels/cpu/control.h"
#include "sparse_kernels/cpu/gather.h"
#include "sparse_kernels/cpu/row_stats.h"

namespace sparse_kernels {
namespace {

using dlpack::DataType;

const dlpack::ExchangeApi* api;
PyTypeObject* plain_types[2];  // Tensor and Parameter: a subclass may mean anything by its memory

constexpr DataType kFloat32{dlpack::kFloat, 32, 1}, kFloat64{dlpack::kFloat, 64, 1},
    kFloat16{dlpack::kFloat, 16, 1}, kBFloat16{dlpack::kBfloat, 16, 1}, kInt32{dlpack::kInt, 32, 1},
    kInt64{dlpack::kInt, 64, 1}, kBool{dlpack::kBool, 8, 1};

// Thrown for what is not served; any Python exception is dropped with it.
struct NotServed {};

void want(bool condition) {
  if (!condition) throw NotServed();
}

// Owned.
struct Reference {
  PyObject* object;

  explicit Reference(PyObject* object) : object(object) {}
  Reference(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object); }
  PyObject* release() { return std::exchange(object, nullptr); }
};

bool truth(PyObject* found) {
  const Reference held(found);
  const int value = found ? PyObject_IsTrue(found) : -1;
  want(value >= 0);
  return value;
}

PyObject *requires_grad_name, *is_neg_name, *is_conj_name;

// A contiguous CPU tensor whose bytes are its values.
struct In {
  dlpack::Tensor t;

  explicit In(PyObject* object) {
    want(Py_TYPE(object) == plain_types[0] || Py_TYPE(object) == plain_types[1]);
    want(api->look(object, &t) == 0 && t.device.type == dlpack::kCpu);
    int64_t expected = 1;
    for (int d = numel() > 0 ? t.ndim : 0; d-- > 0;) {
      if (t.shape[d] != 1 && t.strides) want(t.strides[d] == expected);
      expected *= t.shape[d];
    }
    want(t.data || numel() == 0);  // a tensor of zeros may have no memory
    // Only noted, not done: only these can be negated, or the conjugate, of what they hold.
    if (t.dtype.code == dlpack::kFloat || t.dtype.code == dlpack::kComplex)
      want(!truth(PyObject_CallMethodNoArgs(object, is_neg_name)));
    if (t.dtype.code == dlpack::kComplex)
      want(!truth(PyObject_CallMethodNoArgs(object, is_conj_name)));
  }

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < t.ndim; ++d) n *= t.shape[d];
    return n;
  }
  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset);
  }
};

void set_error(void*, const char*, const char* message) {
  PyErr_SetString(PyExc_RuntimeError, message);
}

// A new tensor of the library's own; owned until taken.
class Out {
 public:
  Out() = default;
  Out(const int64_t* shape, int ndim, DataType dtype) {
    dlpack::Tensor prototype{
        nullptr, {dlpack::kCpu, 0}, ndim, dtype, const_cast<int64_t*>(shape), nullptr, 0};
    want(api->allocate(&prototype, &managed_, nullptr, set_error) == 0);
    data_ = static_cast<char*>(managed_->tensor.data) + managed_->tensor.byte_offset;
  }
  Out(Out&& other) noexcept : managed_(other.managed_), data_(other.data_) {
    other.managed_ = nullptr;
  }
  Out& operator=(Out&& other) noexcept {
    std::swap(managed_, other.managed_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Out() {
    if (managed_) managed_->deleter(managed_);
  }

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  // A new reference; None for none.
  PyObject* take() {
    void* object = Py_NewRef(Py_None);
    if (managed_) {
      Py_DECREF(Py_None);
      dlpack::Managed* managed = managed_;
      managed_ = nullptr;
      want(api->to_object(managed, &object) == 0);
    }
    return static_cast<PyObject*>(object);
  }

 private:
  dlpack::Managed* managed_ = nullptr;
  char* data_ = nullptr;
};

// ``last``: one more item, whose reference is taken over; or none.
PyObject* tuple_of(std::initializer_list<Out*> outs, PyObject* last = nullptr) {
  Reference held(last);
  Reference tuple(PyTuple_New(Py_ssize_t(outs.size()) + (last != nullptr)));
  want(tuple.object);
  Py_ssize_t i = 0;
  for (Out* out : outs) PyTuple_SET_ITEM(tuple.object, i++, out->take());
  if (last) PyTuple_SET_ITEM(tuple.object, i, held.release());
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
  want(PyLong_CheckExact(object));
  const int64_t value = PyLong_AsLongLong(object);
  want(value != -1 || !PyErr_Occurred());
  return value;
}
double number(PyObject* object) {
  want(PyFloat_CheckExact(object) || PyLong_CheckExact(object));
  const double value = PyFloat_AsDouble(object);
  want(value != -1.0 || !PyErr_Occurred());
  return value;
}

// A selection's tensors.
struct Kept {
  Out index, weight, count, overflow;
  int64_t slots;

  // ``capacity`` is None for as many slots as are kept.
  Kept(const uint8_t* mask, const float* weight_in, int64_t rows, PyObject* capacity) : slots(0) {
    std::vector<int64_t> counts;
    if (capacity == Py_None) {
      counts = count_flags(mask, rows);
      for (int64_t c : counts) slots += c;
    } else {
      slots = integer(capacity);
      want(slots >= 0 && slots <= std::numeric_limits<int32_t>::max());
    }
    index = Out(&slots, 1, kInt64);
    weight = Out(&slots, 1, kFloat32);
    count = Out(nullptr, 0, kInt32);
    overflow = Out(nullptr, 0, kInt32);
    const int64_t total = compact(mask, weight_in, rows, std::move(counts), slots,
                                  index.data<int64_t>(), weight.data<float>());
    const int64_t kept = total < slots ? total : slots;
    *count.data<int32_t>() = int32_t(kept);
    *overflow.data<int32_t>() = int32_t(total - kept);
  }
};

// mask, weight, capacity -> index, weight, count, overflow
PyObject* compact_plain(PyObject* const* args) {
  const In mask(args[0]);
  want(mask.t.dtype == kBool && mask.t.ndim == 1);
  const int64_t rows = mask.t.shape[0];
  const float* weight = nullptr;
  if (args[1] != Py_None) {
    const In given(args[1]);
    want(given.t.dtype == kFloat32 && given.t.ndim == 1 && given.t.shape[0] == rows);
    weight = given.data<float>();
  }
  Kept kept(mask.data<uint8_t>(), weight, rows, args[2]);
  return tuple_of({&kept.index, &kept.weight, &kept.count, &kept.overflow});
}

// The rows of a tree of contiguous tensors at ``index``, [slots], each below ``rows``.
PyObject* packed_rows(PyObject* tree, const int64_t* index, int64_t slots, int64_t rows,
                      bool recorded) {
  want(rows > 0);
  const bool is_dict = PyDict_CheckExact(tree), is_list = PyList_CheckExact(tree);
  const bool is_one = !is_dict && !is_list && !PyTuple_CheckExact(tree);
  // References of our own: other threads may change the tree while the rows are moved.
  const Reference keys(is_dict ? PyDict_Keys(tree) : nullptr);
  const Reference leaves(is_one    ? PyTuple_Pack(1, tree)
                         : is_dict ? PyDict_Values(tree)
                                   : PySequence_Tuple(tree));
  want(leaves.object);
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(leaves.object);

  std::vector<Out> outs;
  std::vector<RowMove> moves;
  outs.reserve(size_t(size));
  moves.reserve(size_t(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* leaf = PySequence_Fast_GET_ITEM(leaves.object, i);
    const In in(leaf);
    want(in.t.ndim > 0 && in.t.shape[0] == rows && in.t.dtype.lanes == 1);
    want(!recorded || !truth(PyObject_GetAttr(leaf, requires_grad_name)));
    const int64_t row_bytes = in.numel() / rows * ((in.t.dtype.bits + 7) / 8);
    std::vector<int64_t> shape(in.t.shape, in.t.shape + in.t.ndim);
    shape[0] = slots;
    outs.emplace_back(shape.data(), in.t.ndim, in.t.dtype);
    moves.push_back({in.data<char>(), row_bytes, outs.back().data<char>(), row_bytes});
  }
  int64_t bad;
  {
    Unlocked unlocked;
    bad = gather_rows(moves, index, slots, rows);
  }
  want(bad < 0);

  if (is_one) return outs[0].take();
  Reference packed(is_dict ? PyDict_New() : is_list ? PyList_New(size) : PyTuple_New(size));
  want(packed.object);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* tensor = outs[size_t(i)].take();
    if (is_dict) {
      const Reference held(tensor);
      want(PyDict_SetItem(packed.object, PyList_GET_ITEM(keys.object, i), tensor) == 0);
    } else if (is_list) {
      PyList_SET_ITEM(packed.object, i, tensor);
    } else {
      PyTuple_SET_ITEM(packed.object, i, tensor);
    }
  }
  return packed.release();
}

// tree, index, rows, whether gradients are recorded -> the tree's packed rows
PyObject* gather_plain(PyObject* const* args) {
  const In index(args[1]);
  want(index.t.dtype == kInt64 && index.t.ndim == 1);
  return packed_rows(args[0], index.data<int64_t>(), index.t.shape[0], integer(args[2]),
                     args[3] == Py_True);
}

// ``gate_rows``: contiguous classes in the last dimension, a threshold of the results' type.
struct Scored {
  In logits, targets;
  Out mask, significance, weight, invalid, grad_norm;
  int64_t rows;

  // logits, targets, threshold, weights, temperature, softcap, label_smoothing, ignore_index,
  // gate_temperature, p_min, seed, step; ``of_state``: the threshold and the step are what a
  // controller's values and counters begin with.
  static constexpr int kArguments = 12;

  Scored(PyObject* const* args, bool of_state, bool with_grad_norm)
      : logits(args[0]), targets(args[1]) {
    const int classes_at = logits.t.ndim - 1;
    want(classes_at >= 0 && targets.t.ndim == classes_at && logits.t.shape[classes_at] > 0);
    for (int d = 0; d < classes_at; ++d) want(targets.t.shape[d] == logits.t.shape[d]);
    rows = targets.numel();
    RowStatsArgs call{};
    const DataType dtype = logits.t.dtype;
    want(dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16);
    call.dtype = dtype == kFloat32    ? DType::kFloat32
                 : dtype == kBFloat16 ? DType::kBFloat16
                                      : DType::kFloat16;
    want(targets.t.dtype == kInt64 || targets.t.dtype == kInt32);
    const In threshold(args[2]);
    want(threshold.t.dtype == kFloat32 && (of_state || threshold.numel() == 1));

    call.logits = logits.data<void>();
    call.rows = rows;
    call.classes = logits.t.shape[classes_at];
    call.class_stride = 1;
    call.layout.dimensions = 1;
    call.layout.stride[0] = call.classes;
    call.targets = targets.data<void>();
    call.targets_are_int32 = targets.t.dtype == kInt32;
    set_weights(call, args[3]);
    const double temperature = number(args[4]);
    call.softcap = number(args[5]);
    call.label_smoothing = number(args[6]);
    call.ignore_index = integer(args[7]);
    call.gate_temperature = number(args[8]);
    call.p_min = number(args[9]);
    want(temperature > 0 && call.softcap >= 0 && call.label_smoothing >= 0 &&
         call.label_smoothing <= 1 && call.gate_temperature >= 0 && call.p_min >= 0 &&
         call.p_min <= 1);
    call.inverse_temperature = 1.0 / temperature;
    call.seed = uint64_t(integer(args[10]));
    if (PyLong_CheckExact(args[11])) {
      call.step = uint64_t(integer(args[11]));
    } else {
      const In step(args[11]);
      want(step.t.dtype == kInt64 && (of_state || step.numel() == 1));
      call.step = uint64_t(*step.data<int64_t>());
    }
    call.threshold = *threshold.data<float>();

    const auto row_wise = [&](DataType type) { return Out(targets.t.shape, classes_at, type); };
    mask = row_wise(kBool);
    significance = row_wise(kFloat32);
    invalid = Out(nullptr, 0, kInt32);
    if (call.gate_temperature > 0) weight = row_wise(kFloat32);
    if (with_grad_norm) grad_norm = row_wise(kFloat32);
    call.mask = mask.data<uint8_t>();
    call.significance = significance.data<void>();
    call.weight = weight.data<float>();
    call.outputs[kGradNorm] = grad_norm.data<void>();
    RowStatsResult result;
    {
      Unlocked unlocked;
      result = row_stats(call);
    }
    want(result.bad_target_row < 0);
    *invalid.data<int32_t>() = int32_t(result.invalid);
  }

 private:
  static void set_weights(RowStatsArgs& call, PyObject* weights) {
    static const char* const names[kStatistics] = {
        "loss", "entropy", "grad_norm", "sum_squares", "max_prob", "margin", "logsumexp"};
    want(PyDict_CheckExact(weights) && PyDict_GET_SIZE(weights) > 0);
    Py_ssize_t at = 0;
    PyObject *key, *value;
    while (PyDict_Next(weights, &at, &key, &value)) {
      want(PyUnicode_Check(key));
      int k = 0;
      while (k < kStatistics && PyUnicode_CompareWithASCIIString(key, names[k]) != 0) ++k;
      want(k < kStatistics);
      call.weights[k] = number(value);
    }
  }
};

// As Scored's -> mask, significance, weight, invalid
PyObject* gate_rows_plain(PyObject* const* args) {
  Scored scored(args, false, false);
  return tuple_of({&scored.mask, &scored.significance, &scored.weight, &scored.invalid});
}

// As Scored's, capacity, tree, whether gradients are recorded -> as gate_rows, then as compact,
// then the tree's packed rows, None where there is no tree or it is for the general route.
PyObject* select_plain(PyObject* const* args) {
  PyObject* const* rest = args + Scored::kArguments;
  Scored scored(args, false, false);
  Kept kept(scored.mask.data<uint8_t>(), scored.weight.data<float>(), scored.rows, rest[0]);
  Reference packed(nullptr);
  if (rest[1] != Py_None) try {
      packed.object = packed_rows(rest[1], kept.index.data<int64_t>(), kept.slots, scored.rows,
                                  rest[2] == Py_True);
    } catch (const NotServed&) {
      PyErr_Clear();
    }
  return tuple_of({&scored.mask, &scored.significance, &scored.weight, &scored.invalid, &kept.index,
                   &kept.weight, &kept.count, &kept.overflow},
                  packed.object ? packed.release() : Py_NewRef(Py_None));
}

// As Scored's with the state's values and counters for threshold and step, capacity, setpoint,
// whether by mass -> as select, then grad_norm. The state has not moved where None is returned.
PyObject* gate_step_plain(PyObject* const* args) {
  PyObject* const* rest = args + Scored::kArguments;
  const In values(args[2]), counters(args[11]), setpoint(rest[1]);
  const bool by_mass = rest[2] == Py_True;
  want(values.t.dtype == kFloat32 && values.t.ndim == 1 && values.t.shape[0] == kControlValues);
  want(counters.t.dtype == kInt64 && counters.t.ndim == 1 &&
       counters.t.shape[0] == kControlCounters);
  want(setpoint.t.dtype == kFloat32 && setpoint.numel() == 1);
  Scored scored(args, true, by_mass);
  Kept kept(scored.mask.data<uint8_t>(), scored.weight.data<float>(), scored.rows, rest[0]);
  PyObject* found =
      tuple_of({&scored.mask, &scored.significance, &scored.weight, &scored.invalid, &kept.index,
                &kept.weight, &kept.count, &kept.overflow, &scored.grad_norm});
  ControlArgs call{};
  call.values = values.data<float>();
  call.counters = counters.data<int64_t>();
  call.significance = scored.significance.data<float>();
  call.labels = scored.targets.data<void>();
  call.label_bytes = scored.targets.t.dtype.bits / 8;
  call.ignore_index = integer(args[7]);
  call.mass = scored.grad_norm.data<float>();
  call.setpoint = setpoint.data<float>();
  call.overflow = kept.overflow.data<int32_t>();
  call.states = 1;
  call.rows = scored.rows;
  call.settings = {float(number(args[8])), float(number(args[9]))};
  Unlocked unlocked;
  control(call);
  return found;
}

template <PyObject* (*function)(PyObject* const*), Py_ssize_t wanted>
PyObject* served_or_none(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != wanted) {
    PyErr_Format(PyExc_TypeError, "%zd arguments; wanted %zd", count, wanted);
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
    PyErr_SetString(PyExc_TypeError, "wanted a capsule and two types");
    return nullptr;
  }
  const auto* found =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (!found) return nullptr;
  while (found && found->version.major != dlpack::kMajor) found = found->previous;
  if (!found || !found->look) Py_RETURN_FALSE;
  for (int i = 0; i < 2; ++i)
    plain_types[i] = reinterpret_cast<PyTypeObject*>(Py_NewRef(args[i + 1]));
  requires_grad_name = PyUnicode_InternFromString("requires_grad");
  is_neg_name = PyUnicode_InternFromString("is_neg");
  is_conj_name = PyUnicode_InternFromString("is_conj");
  api = found;
  Py_RETURN_TRUE;
}

#define SPARSE_KERNELS_FUNCTION(name, function)                                                \
  {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, \
   nullptr}

PyMethodDef functions[] = {
    SPARSE_KERNELS_FUNCTION("use_exchange_api", use_exchange_api),
    SPARSE_KERNELS_FUNCTION("compact_plain", (served_or_none<compact_plain, 3>)),
    SPARSE_KERNELS_FUNCTION("gather_plain", (served_or_none<gather_plain, 4>)),
    SPARSE_KERNELS_FUNCTION("gate_rows_plain",
                            (served_or_none<gate_rows_plain, Scored::kArguments>)),
    SPARSE_KERNELS_FUNCTION("select_plain", (served_or_none<select_plain, Scored::kArguments + 3>)),
    SPARSE_KERNELS_FUNCTION("gate_step_plain",
                            (served_or_none<gate_step_plain, Scored::kArguments + 3>)),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_functions(PyObject* module) { PyModule_AddFunctions(module, functions); }

}  // namespace sparse_kernels
