// A selection's tensors, and the selected rows of a tree of tensors, made from plain tensors.
#pragma once

#include <Python.h>

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "plain_tensors.h"
#include "sparse_kernels/cpu/compact.h"
#include "sparse_kernels/cpu/gather.h"

namespace sparse_kernels {
namespace plain {

// A selection's tensors.
struct Packed {
  Output index, weight, count, overflow;
  int64_t slots = 0;
  static constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // that its counts hold

  // `capacity` is None for as many slots as are kept.
  Packed(const uint8_t* mask, const float* weight_in, int64_t rows, PyObject* capacity) {
    require(rows <= kMost);
    std::vector<int64_t> counts;
    if (capacity == Py_None) {
      counts = count_flags(mask, rows);
      for (int64_t c : counts) slots += c;
    } else {
      slots = integer(capacity);
      require(slots >= 0 && slots <= kMost);
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

// The rows of a tree of contiguous tensors at `index`, [slots], each below `rows`.
inline PyObject* packed_rows(PyObject* tree, const int64_t* index, int64_t slots, int64_t rows,
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

}  // namespace plain
}  // namespace sparse_kernels
