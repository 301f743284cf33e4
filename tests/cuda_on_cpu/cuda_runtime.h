// The part of CUDA's language that csrc/cuda uses, on a CPU, so that its host and device code runs
// where there is no GPU. Each CUDA thread is a fiber, switched only at barriers and warp
// intrinsics.
//
// The fibers of a block run in an order that changes with every round, so that a missing barrier
// shows. A thread that waits for others that never arrive ends the program. Blocks run one after
// the other, in any order, so one that waits for another never ends; shared memory is initially
// filled with arbitrary bytes, as on a GPU.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
// All shared memory is one section, which each block finds filled anew.
#define __shared__ static __attribute__((section("cuda_shared")))
extern char cuda_shared_begin[] __asm__("__start_cuda_shared")
    __attribute__((weak, visibility("hidden")));
extern char cuda_shared_end[] __asm__("__stop_cuda_shared")
    __attribute__((weak, visibility("hidden")));

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr int kMultiprocessors = 3;

// A barrier that `expected` threads wait at.
struct Barrier {
  unsigned expected, arrived = 0, generation = 0;
};

struct Block {
  struct Thread {
    ucontext_t context;
    bool done = false;
  };
  unsigned index, left;  // threads that are not done
  std::vector<Thread> threads;
  std::vector<uint64_t> lanes;  // the value that each thread last passed to its warp
  std::vector<Barrier> warps;
  Barrier all;
};
inline Block* block = nullptr;  // the one whose turn it is
inline bool progress = false;   // of any thread, since this round began
inline const std::function<void()>* body = nullptr;
inline ucontext_t scheduler;

[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void wait(Barrier& barrier) {
  const unsigned me = threadIdx.x, generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) swapcontext(&block->threads[me].context, &scheduler);
}

// Passes this thread's value to its warp and calls `read` with the values of all 32 lanes.
template <class Read>
uint64_t exchange(uint32_t mask, uint64_t value, const Read& read) {
  if (mask != 0xffffffffu) die("a warp intrinsic with a partial mask");
  Barrier& warp = block->warps[threadIdx.x / kWarp];
  block->lanes[threadIdx.x] = value;
  wait(warp);
  const uint64_t result = read(&block->lanes[threadIdx.x / kWarp * kWarp]);
  wait(warp);  // no thread passes its next value before all have read this one
  return result;
}

// The value of lane `from`.
template <class Value>
Value shuffle(uint32_t mask, Value value, unsigned from) {
  static_assert(sizeof(Value) == 4 || sizeof(Value) == 8, "what a shuffle takes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(Value));
  bits = exchange(mask, bits, [=](const uint64_t* lanes) { return lanes[from % kWarp]; });
  std::memcpy(&value, &bits, sizeof(Value));
  return value;
}

// Byte by byte: the section may hold the sanitizer's red zones, which memset may not touch.
__attribute__((no_sanitize("address"))) inline void fill_shared_memory() {
  for (volatile char* at = cuda_shared_begin; at < cuda_shared_end; ++at) *at = char(0xa5);
}

inline void run_thread() {
  (*body)();
  block->threads[threadIdx.x].done = true;
  --block->left;
  progress = true;
}

inline std::unique_ptr<Block> make_block(unsigned index, unsigned size) {
  static std::unique_ptr<char[]> stacks(new char[1024 * kStack]);  // untouched until used
  auto made = std::make_unique<Block>();
  made->index = index;
  made->left = size;
  made->threads.resize(size);
  made->lanes.resize(size);
  made->warps.assign(size / kWarp, Barrier{kWarp});
  made->all.expected = size;
  for (unsigned i = 0; i < size; ++i) {
    ucontext_t& context = made->threads[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = &stacks[i * kStack];
    context.uc_stack.ss_size = kStack;
    context.uc_link = &scheduler;
    makecontext(&context, run_thread, 0);
  }
  return made;
}

// Calls `visit` with 0 to `size` - 1, beginning with another one each time, up or down.
template <class Visit>
void in_some_order(unsigned size, const Visit& visit) {
  static uint32_t order = 1;
  order = order * 1664525u + 1013904223u;
  const unsigned start = (order >> 8) % size;
  const bool backwards = order >> 31;
  for (unsigned k = 0; k < size; ++k) visit((start + (backwards ? size - k : k)) % size);
}

inline void run(dim3 blocks, dim3 threads, const std::function<void()>& kernel) {
  if (threads.x % kWarp || threads.x > 1024) die("a block that is not whole warps, or over 1,024");
  gridDim = blocks;
  blockDim = threads;
  body = &kernel;
  in_some_order(blocks.x, [&](unsigned index) {
    const auto live = make_block(index, threads.x);
    block = live.get();
    blockIdx.x = index;
    fill_shared_memory();
    while (live->left > 0) {  // each turn runs each thread as far as possible
      progress = false;
      in_some_order(threads.x, [&](unsigned i) {
        if (live->threads[i].done) return;
        threadIdx.x = i;
        swapcontext(&scheduler, &live->threads[i].context);
      });
      if (live->left > 0 && !progress) die("threads wait for others that never come");
    }
  });
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block->all); }
inline void __syncwarp() {
  cuda_on_cpu::wait(cuda_on_cpu::block->warps[threadIdx.x / cuda_on_cpu::kWarp]);
}
inline void __threadfence() {}  // one thread at a time
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int by) {
  return uint32_t((uint64_t(high) << 32 | low) >> by % 32);
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __ballot_sync(uint32_t mask, bool flag) {
  return uint32_t(cuda_on_cpu::exchange(mask, flag, [](const uint64_t* lanes) {
    uint64_t bits = 0;
    for (unsigned i = 0; i < cuda_on_cpu::kWarp; ++i) bits |= lanes[i] << i;
    return bits;
  }));
}
template <class Value>
Value __shfl_sync(uint32_t mask, Value value, int from) {
  return cuda_on_cpu::shuffle(mask, value, unsigned(from));
}
template <class Value>
Value __shfl_xor_sync(uint32_t mask, Value value, int other) {
  return cuda_on_cpu::shuffle(mask, value, threadIdx.x % cuda_on_cpu::kWarp ^ unsigned(other));
}
template <class Value>
Value __shfl_up_sync(uint32_t mask, Value value, unsigned back) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  return cuda_on_cpu::shuffle(mask, value, lane < back ? lane : lane - back);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 12040;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = cuda_on_cpu::kMultiprocessors;
  return cudaSetDevice(device);
}
namespace cuda_on_cpu {
inline int64_t launches = 0;
}
// The number of kernels launched so far, for tests to ask.
extern "C" __attribute__((visibility("default"), used)) inline int64_t cuda_on_cpu_launches() {
  return cuda_on_cpu::launches;
}
template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  ++cuda_on_cpu::launches;
  cuda_on_cpu::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
