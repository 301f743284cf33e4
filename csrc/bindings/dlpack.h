// The part of DLPack's C exchange interface, version 1.3, that is used here: it reads and makes
// tensors of another library without a Python call. The standard fixes all layouts
// (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace sparse_kernels {
namespace dlpack {

constexpr uint32_t kMajor = 1;  // within a major version structures only grow, at their end
constexpr int32_t kCpu = 1;
enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
inline bool operator==(DataType a, DataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

struct Managed {
  Version version;
  void* context;
  void (*deleter)(Managed*);
  uint64_t flags;
  Tensor tensor;
};

// Each returns 0, or -1 with a Python exception set.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor* prototype, Managed** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*export_managed)(void* object, Managed** out);
  int (*to_object)(Managed* tensor, void** object);  // takes ownership of the tensor
  int (*look)(void* object, Tensor* out);            // borrowed, until control returns; may be null
  int (*current_stream)(int32_t type, int32_t id, void** stream);
};

}  // namespace dlpack
}  // namespace sparse_kernels
