// sparse_kernels._cuda: the CUDA kernels for Python. Tensors come as addresses of one device's
// memory; sparse_kernels/backends/cuda.py checks them before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "settings.h"
#include "sparse_kernels/cuda/compact.h"
#include "sparse_kernels/cuda/control.h"
#include "sparse_kernels/cuda/device_stream.h"
#include "sparse_kernels/cuda/gather.h"
#include "sparse_kernels/cuda/versions.h"

namespace py = pybind11;
namespace sk = sparse_kernels::cuda;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

sk::DeviceStream place(int device, Address stream) { return {device, at<void>(stream)}; }

// (in, out, in_stride, row_bytes) of each tensor.
std::vector<sk::RowsToMove> rows_to_move(const std::vector<std::array<int64_t, 4>>& tensors) {
  std::vector<sk::RowsToMove> moves;
  moves.reserve(tensors.size());
  for (const auto& [in, out, in_stride, row_bytes] : tensors)
    moves.push_back({at<void>(Address(in)), at<void>(Address(out)), in_stride, row_bytes});
  return moves;
}

// significance, labels, their bytes, mass, values, counters, setpoint, invalid, settings.
using Control =
    std::tuple<Address, Address, int, Address, Address, Address, Address, Address, py::tuple>;

sk::ControlArgs control_args(const Control& control) {
  const auto& [significance, labels, label_bytes, mass, values, counters, setpoint, invalid,
               setting_values] = control;
  sparse_kernels::Settings settings;
  if (!sparse_kernels::read_settings(setting_values.ptr(), &settings))
    throw py::error_already_set();
  return {at<float>(significance),
          at<void>(labels),
          label_bytes,
          settings.ignore_index,
          at<float>(mass),
          at<float>(values),
          at<int64_t>(counters),
          at<float>(setpoint),
          at<int32_t>(invalid),
          {float(settings.gate_temperature), float(settings.p_min)}};
}

}  // namespace

// A call only enqueues, but that waits where the device's queue is full: not with the GIL held.
PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of sparse_kernels; called by sparse_kernels.backends.cuda alone.";

  // A size that int32_t cannot hold is refused by the cast: TypeError.
  m.def("compact_storage_bytes", [](int32_t rows, bool with_control, int device, Address stream) {
    return sk::compact_storage_bytes(rows, with_control, place(device, stream));
  });

  m.def("compact",
        [](Address mask, Address weight_in, int32_t rows, int32_t capacity, Address index,
           Address weight, Address count, Address overflow, const std::optional<Control>& control,
           Address storage, int64_t storage_bytes, int device, Address stream) {
          const sk::CompactArgs args{
              at<uint8_t>(mask),
              rows,
              {at<float>(weight_in), at<int64_t>(index), at<float>(weight), capacity},
              at<int32_t>(count),
              at<int32_t>(overflow)};
          const sk::ControlArgs with = control ? control_args(*control) : sk::ControlArgs{};
          py::gil_scoped_release unlocked;
          sk::compact(args, control ? &with : nullptr, at<void>(storage), storage_bytes,
                      place(device, stream));
        });

  m.def("control", [](const Control& control, Address overflow, int64_t states, int64_t rows,
                      int device, Address stream) {
    const sk::ControlArgs args = control_args(control);
    py::gil_scoped_release unlocked;
    sk::control(args, at<int32_t>(overflow), states, rows, place(device, stream));
  });

  m.def("gather_rows", [](const std::vector<std::array<int64_t, 4>>& tensors, Address index,
                          int64_t slots, int64_t rows, int device, Address stream) {
    const auto moves = rows_to_move(tensors);
    py::gil_scoped_release unlocked;
    sk::gather_rows(moves.data(), int(moves.size()), at<int64_t>(index), slots, rows,
                    place(device, stream));
  });

  m.def("scatter_rows", [](const std::vector<std::array<int64_t, 4>>& tensors, Address index,
                           int64_t slots, Address kept, int64_t rows, int device, Address stream) {
    const auto moves = rows_to_move(tensors);
    py::gil_scoped_release unlocked;
    sk::scatter_rows(moves.data(), int(moves.size()), at<int64_t>(index), slots, at<int32_t>(kept),
                     rows, place(device, stream));
  });

  m.def("versions", [] {
    const sk::Versions found = sk::versions();
    return std::make_tuple(found.runtime, found.driver);
  });

#ifdef SPARSE_KERNELS_ARCHITECTURES
  m.attr("architectures") = SPARSE_KERNELS_ARCHITECTURES;
#endif
}
