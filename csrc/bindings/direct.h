// Functions of sparse_kernels._cpp that take and give tensors: see direct.cpp.
#pragma once

#include <Python.h>

namespace sparse_kernels {

void add_direct_functions(PyObject* module);

}  // namespace sparse_kernels
