// What the row statistics take of a call's settings and weights.
#pragma once

#include <Python.h>

#include <cmath>
#include <iterator>

#include "settings.h"
#include "sparse_kernels/cpu/row_stats.h"

namespace sparse_kernels {

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

// False where `dictionary` is not names of statistics, each with a plain number that is not too
// large for the sum (Python's limit and message).
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
    if (!(std::fabs(weights[k]) <= 1e30)) return false;
  }
  return true;
}

}  // namespace sparse_kernels
