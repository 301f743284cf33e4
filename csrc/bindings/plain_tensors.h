// PyTorch's CPU tensors, read and made in C++ through DLPack's exchange interface, with no call of
// Python. Only plain ones: whatever else a tensor may be is left to the callers' general route.
#pragma once

#include <Python.h>

#include <cstdint>
#include <new>
#include <utility>

#include "dlpack.h"

namespace sparse_kernels {
namespace plain {

using dlpack::DataType;

inline const dlpack::ExchangeApi* api;
inline PyTypeObject* types[2];  // Tensor and Parameter: a subclass may mean anything by its memory
inline PyObject *requires_grad_name, *is_neg_name, *is_conj_name;
inline PyCFunction is_neg_function;  // what Tensor.is_neg calls; null where it is no plain method

constexpr DataType kFloat32{dlpack::kFloat, 32, 1}, kFloat16{dlpack::kFloat, 16, 1},
    kBFloat16{dlpack::kBfloat, 16, 1}, kInt32{dlpack::kInt, 32, 1}, kInt64{dlpack::kInt, 64, 1},
    kBool{dlpack::kBool, 8, 1};

// Thrown for what is not served; any Python exception is dropped with it.
struct NotServed {};

inline void require(bool condition) {
  if (!condition) throw NotServed();
}

// An owned reference, or none.
struct Reference {
  PyObject* object;

  explicit Reference(PyObject* object) : object(object) {}
  Reference(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object); }
  PyObject* release() { return std::exchange(object, nullptr); }
};

inline bool is_true(PyObject* answer) {
  const Reference owned(answer);
  const int value = answer ? PyObject_IsTrue(answer) : -1;
  require(value >= 0);
  return value;
}

// A tensor's values are its negated bytes. Of any dtype, though most such views are of complex
// ones.
inline bool is_negated(PyObject* tensor) {
  return is_true(is_neg_function ? is_neg_function(tensor, nullptr)
                                 : PyObject_CallMethodNoArgs(tensor, is_neg_name));
}

// Metadata alone: what is not read may have any layout.
inline dlpack::Tensor looked_at(PyObject* object) {
  dlpack::Tensor t;
  require(Py_TYPE(object) == types[0] || Py_TYPE(object) == types[1]);
  require(api->look(object, &t) == 0 && t.device.type == dlpack::kCpu);
  return t;
}

// Borrowed: a contiguous CPU tensor whose bytes are its values.
struct Input {
  dlpack::Tensor t;

  explicit Input(PyObject* object) : t(looked_at(object)) {
    int64_t expected = 1;
    for (int d = numel() > 0 ? t.ndim : 0; d-- > 0;) {
      if (t.shape[d] != 1 && t.strides) require(t.strides[d] == expected);
      expected *= t.shape[d];
    }
    require(t.data || numel() == 0);  // a tensor of zeros may have no memory
    require(!is_negated(object));
    if (t.dtype.code == dlpack::kComplex)
      require(!is_true(PyObject_CallMethodNoArgs(object, is_conj_name)));
  }

  bool is(DataType dtype, int ndim) const { return t.dtype == dtype && t.ndim == ndim; }
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

// A new tensor, owned until taken; or none. Its memory is allocated here as PyTorch does it, of the
// same size, so that each can use what the other has freed: the exchange interface's own function
// would make a tensor of PyTorch's only to be wrapped in another. A small one's lies behind its
// description: the C library has blocks at hand for an allocation without an alignment only.
class Output {
 public:
  Output() = default;
  Output(const int64_t* shape, int ndim, DataType dtype) {
    int64_t bytes = (dtype.bits + 7) / 8;
    for (int d = 0; d < ndim; ++d) require(!__builtin_mul_overflow(bytes, shape[d], &bytes));
    const size_t described = sizeof(dlpack::Managed) + sizeof(int64_t) * size_t(ndim);
    const bool small = bytes <= kSmall;
    void* apart = small ? nullptr : ::operator new(size_t(bytes), kAlignment, std::nothrow);
    const size_t behind = small ? size_t(bytes) + size_t(kAlignment) - 1 : 0;
    auto* memory = static_cast<char*>(::operator new(described + behind, std::nothrow));
    if (!memory || !(small || apart)) {
      free_memory(apart, memory);
      throw NotServed();
    }
    data_ = static_cast<char*>(small ? aligned(memory + described) : apart);
    auto* own_shape = reinterpret_cast<int64_t*>(memory + sizeof(dlpack::Managed));
    for (int d = 0; d < ndim; ++d) own_shape[d] = shape[d];
    managed_ = new (memory)
        dlpack::Managed{{dlpack::kMajor, 0},
                        apart,
                        [](dlpack::Managed* managed) { free_memory(managed->context, managed); },
                        0,
                        {data_, {dlpack::kCpu, 0}, ndim, dtype, own_shape, nullptr, 0}};
  }
  Output(Output&& other) noexcept { *this = std::move(other); }
  Output& operator=(Output&& other) noexcept {
    std::swap(managed_, other.managed_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Output() {
    if (managed_) managed_->deleter(managed_);
  }

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  // A new reference; None for none.
  PyObject* take() {
    if (!managed_) return Py_NewRef(Py_None);
    void* object = nullptr;
    require(api->to_object(std::exchange(managed_, nullptr), &object) == 0);
    return static_cast<PyObject*>(object);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};  // PyTorch's own
  static constexpr int64_t kSmall = 512;             // bytes
  static void* aligned(char* memory) {
    const uintptr_t mask = uintptr_t(kAlignment) - 1;
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + mask) & ~mask);
  }
  static void free_memory(void* apart, void* managed) {
    ::operator delete(apart, kAlignment);
    ::operator delete(managed);
  }

  dlpack::Managed* managed_ = nullptr;
  char* data_ = nullptr;
};

// Within its scope other threads may run Python.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

inline int64_t integer(PyObject* object) {
  require(PyLong_CheckExact(object));
  const int64_t value = PyLong_AsLongLong(object);
  require(value != -1 || !PyErr_Occurred());
  return value;
}

}  // namespace plain
}  // namespace sparse_kernels
