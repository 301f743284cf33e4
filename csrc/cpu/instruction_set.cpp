#include "sparse_kernels/cpu/instruction_set.h"

#include <atomic>
#include <stdexcept>

#if defined(SPARSE_KERNELS_X86)
#include <cpuid.h>
#endif

namespace sparse_kernels {
namespace {

#if defined(SPARSE_KERNELS_X86)
// Asked of the processor itself: clang 14 has no name for it in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool processor_has(InstructionSet value) {
#if defined(SPARSE_KERNELS_X86)
  __builtin_cpu_init();
  switch (value) {
    case InstructionSet::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case InstructionSet::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi") && has_f16c();
    default:
      return value == InstructionSet::kPortable;
  }
#elif defined(SPARSE_KERNELS_NEON)  // every aarch64 processor has it
  return value == InstructionSet::kPortable || value == InstructionSet::kNeon;
#else
  return value == InstructionSet::kPortable;
#endif
}

constexpr InstructionSet kAll[] = {InstructionSet::kPortable, InstructionSet::kAvx2,
                                   InstructionSet::kAvx512, InstructionSet::kNeon};

InstructionSet widest() { return available_instruction_sets().back(); }

std::atomic<InstructionSet>& current() {
  static std::atomic<InstructionSet> value{widest()};
  return value;
}

}  // namespace

std::vector<InstructionSet> available_instruction_sets() {
  std::vector<InstructionSet> available;
  for (InstructionSet value : kAll)
    if (processor_has(value)) available.push_back(value);
  return available;
}

InstructionSet instruction_set() { return current().load(std::memory_order_relaxed); }

void set_instruction_set(InstructionSet value) {
  if (!processor_has(value))
    throw std::invalid_argument(std::string("this processor or build has no ") + name_of(value));
  current().store(value, std::memory_order_relaxed);
}

const char* name_of(InstructionSet value) {
  switch (value) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kNeon:
      return "neon";
    default:
      return "portable";
  }
}

InstructionSet instruction_set_from_name(const std::string& name) {
  for (InstructionSet value : kAll)
    if (name == name_of(value)) return value;
  throw std::invalid_argument("unknown instruction set '" + name +
                              "'; known: portable, avx2, avx512, neon");
}

}  // namespace sparse_kernels
