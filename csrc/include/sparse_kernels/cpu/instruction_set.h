// The instruction set that the kernels use: the widest that the processor has, or one set by name.
//
// Linkage rule for every header that a file with its own instruction-set flags includes
// (setup.py: FILE_FLAGS): a function in it is a template whose arguments name the instruction set's
// vector type, or it is `static`. A plain `inline` function would be one symbol in all object
// files; the linker keeps any one copy, perhaps the one compiled for AVX-512, and processors
// without AVX-512 would stop at an illegal instruction in code that is meant to run everywhere.
// tests/kernels/test_build.py looks for such symbols.
#pragma once

#include <string>
#include <vector>

namespace sparse_kernels {

enum class InstructionSet : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3 };

// Those that this build has and this processor runs, narrowest first; never empty.
std::vector<InstructionSet> available_instruction_sets();
InstructionSet instruction_set();
// Throws std::invalid_argument where it is not available.
void set_instruction_set(InstructionSet value);
const char* name_of(InstructionSet value);
InstructionSet instruction_set_from_name(const std::string& name);

}  // namespace sparse_kernels
