// Settings of a call, read from Python's own tuple: pybind11's casts of as many numbers would cost
// as much as the statistics of a hundred rows.
#pragma once

#include <Python.h>

#include <cstdint>

namespace sparse_kernels {

// sparse_kernels._arguments.Settings, in the order of its fields. Python has checked the ranges.
struct Settings {
  double temperature;
  double softcap;  // 0: none
  double label_smoothing;
  int64_t ignore_index;
  double gate_temperature;  // 0: a threshold without draws
  double p_min;
  uint64_t seed;
  uint64_t step;  // 0 where Python's is a tensor
};

// False with a Python exception set where an item is not a number.
inline bool read_settings(PyObject* tuple, Settings* settings) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 8) {
    PyErr_BadArgument();
    return false;
  }
  const auto item = [&](int i) { return PyTuple_GET_ITEM(tuple, i); };
  settings->temperature = PyFloat_AsDouble(item(0));
  settings->softcap = PyFloat_AsDouble(item(1));
  settings->label_smoothing = PyFloat_AsDouble(item(2));
  settings->ignore_index = PyLong_AsLongLong(item(3));
  settings->gate_temperature = PyFloat_AsDouble(item(4));
  settings->p_min = PyFloat_AsDouble(item(5));
  settings->seed = PyLong_AsUnsignedLongLongMask(item(6));
  settings->step = PyLong_Check(item(7)) ? PyLong_AsUnsignedLongLongMask(item(7)) : 0;
  return !PyErr_Occurred();
}

}  // namespace sparse_kernels
