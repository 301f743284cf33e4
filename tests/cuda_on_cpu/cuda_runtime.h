// CUDA's language on a CPU, as far as csrc/cuda speaks it, so that its host and device code runs
// where there is no GPU: each CUDA thread is a fiber, switched at barriers and warp intrinsics
// only.
//
// Fibers of a block run in an order that changes with every round, so that a missing barrier shows.
// A thread that waits for one that never comes ends the program. Blocks run one after the other.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

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

// Threads that wait until ``expected`` of them have come.
struct Barrier {
  unsigned expected, arrived = 0, generation = 0;
};

struct Block {
  struct Thread {
    ucontext_t context;
    bool done = false;
  };
  unsigned size;
  std::vector<Thread> threads;
  std::vector<uint32_t> lanes;  // what each thread last gave to its warp
  std::vector<Barrier> warps;
  Barrier all;
  bool moved = false;  // since this round began
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
};
inline Block* block = nullptr;

[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void wait(Barrier& barrier) {
  const unsigned me = threadIdx.x, generation = barrier.generation;
  block->moved = true;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation)
    swapcontext(&block->threads[me].context, &block->scheduler);
}

// This thread's value goes to its warp; ``read`` sees the values of all 32 lanes.
template <class Read>
uint32_t exchange(uint32_t mask, uint32_t value, const Read& read) {
  if (mask != 0xffffffffu) die("a warp intrinsic with a partial mask");
  Barrier& warp = block->warps[threadIdx.x / kWarp];
  block->lanes[threadIdx.x] = value;
  wait(warp);
  const uint32_t result = read(&block->lanes[threadIdx.x / kWarp * kWarp]);
  wait(warp);  // nobody gives its next value before all have read this one
  return result;
}

inline void run_thread() {
  (*block->body)();
  block->threads[threadIdx.x].done = true;
  block->moved = true;
}

inline void run_block(Block& state, char* stacks) {
  block = &state;
  for (unsigned i = 0; i < state.size; ++i) {
    ucontext_t& context = state.threads[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + i * kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = &state.scheduler;
    makecontext(&context, run_thread, 0);
  }
  static uint32_t order = 1;
  for (unsigned left = state.size; left > 0;) {
    order = order * 1664525u + 1013904223u;
    const unsigned start = (order >> 8) % state.size;
    const bool backwards = order >> 31;
    state.moved = false;
    for (unsigned k = 0; k < state.size; ++k) {
      const unsigned i = (start + (backwards ? state.size - k : k)) % state.size;
      if (state.threads[i].done) continue;
      threadIdx.x = i;
      swapcontext(&state.scheduler, &state.threads[i].context);
      left -= state.threads[i].done;
    }
    if (left > 0 && !state.moved) die("threads wait for others that never come");
  }
}

inline void run(dim3 grid, dim3 threads, const std::function<void()>& body) {
  if (threads.x % kWarp || threads.x > 1024) die("a block that is not whole warps, or over 1,024");
  static const std::unique_ptr<char[]> stacks(new char[1024 * kStack]);  // untouched until used
  gridDim = grid;
  blockDim = threads;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx.x = b;
    Block state;
    state.size = threads.x;
    state.threads.resize(threads.x);
    state.lanes.resize(threads.x);
    state.warps.assign(threads.x / kWarp, Barrier{kWarp});
    state.all.expected = threads.x;
    state.body = &body;
    run_block(state, stacks.get());
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block->all); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __ballot_sync(uint32_t mask, bool flag) {
  return cuda_on_cpu::exchange(mask, flag, [](const uint32_t* lanes) {
    uint32_t bits = 0;
    for (unsigned i = 0; i < cuda_on_cpu::kWarp; ++i) bits |= lanes[i] << i;
    return bits;
  });
}
inline int __shfl_xor_sync(uint32_t mask, int value, int other) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  return int(cuda_on_cpu::exchange(
      mask, uint32_t(value), [=](const uint32_t* lanes) { return lanes[lane ^ unsigned(other)]; }));
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  cuda_on_cpu::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
