// Settings and weights of a call, read from Python's own tuple and dictionary: pybind11's casts of
// as many numbers would cost as much as the statistics of a hundred rows.
#pragma once

#include <Python.h>

#include <cstdint>
#include <iterator>

#include "cpu/row_stats.h"

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

inline void set_scoring(RowStatsInput& args, const Settings& settings) {
  args.ignore_index = settings.ignore_index;
  args.inverse_temperature = 1.0 / settings.temperature;
  args.softcap = settings.softcap;
  args.label_smoothing = settings.label_smoothing;
}
inline void set_draws(RowStatsArgs& args, const Settings& settings) {
  args.gate_temperature = settings.gate_temperature;
  args.p_min = settings.p_min;
  args.seed = settings.seed;
  args.step = settings.step;
}

// False where `dictionary` is not names of statistics, each with a plain number.
inline bool read_weights(PyObject* dictionary, double (&weights)[kStatistics]) {
  static constexpr const char* names[] = {"loss",     "entropy", "grad_norm", "sum_squares",
                                          "max_prob", "margin",  "logsumexp"};
  static_assert(std::size(names) == kStatistics);
  if (!PyDict_CheckExact(dictionary) || PyDict_GET_SIZE(dictionary) == 0) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(dictionary, &position, &key, &value)) {
    // Other numbers would run code of their own, which may change the dictionary.
    if (!PyUnicode_Check(key) || !(PyFloat_Check(value) || PyLong_Check(value))) return false;
    int k = 0;
    while (k < kStatistics && PyUnicode_CompareWithASCIIString(key, names[k]) != 0) ++k;
    if (k == kStatistics) return false;
    weights[k] = PyFloat_AsDouble(value);
    if (weights[k] == -1.0 && PyErr_Occurred()) return false;
  }
  return true;
}

}  // namespace sparse_kernels
