// Which instruction set the kernels use: the widest that the processor has, or one set by name.
#pragma once

#include <string>
#include <vector>

namespace sparse_kernels {

enum class InstructionSet : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Those that this build has and this processor runs, narrowest first; never empty.
std::vector<InstructionSet> available_instruction_sets();
InstructionSet instruction_set();
// Throws std::invalid_argument where it is not available.
void set_instruction_set(InstructionSet value);
const char* name_of(InstructionSet value);
InstructionSet instruction_set_from_name(const std::string& name);

}  // namespace sparse_kernels
