#include "sparse_kernels/cpu/compact.h"

#include <algorithm>

#include "compact_functions.h"
#include "sparse_kernels/cpu/instruction_set.h"
#include "sparse_kernels/cpu/parallel.h"

namespace sparse_kernels {
namespace {

constexpr int64_t kWord = 64;
constexpr int64_t kGrain = 128 * 1024;  // least number of flags worth waking a thread for
constexpr int64_t kChunk =
    16 * 1024;  // flags whose indices stay in L1 until their weights are written

const FlagFunctions& implementation() {
  switch (instruction_set()) {
#if defined(SPARSE_KERNELS_X86)
    case InstructionSet::kAvx512:
      return avx512::flag_functions;
    case InstructionSet::kAvx2:
      return avx2::flag_functions;
#elif defined(SPARSE_KERNELS_NEON)
    case InstructionSet::kNeon:
      return neon::flag_functions;
#endif
    default:
      return portable::flag_functions;
  }
}

// Writes the indices and weights of the flags set in [begin, end) to the slots [slot, limit).
// Returns the slot after the last one.
int64_t pack_part(const FlagFunctions& flags, const uint8_t* mask, const float* weight_in,
                  int64_t begin, int64_t end, int64_t slot, int64_t limit, int64_t* index,
                  float* weight) {
  for (; begin < end && slot < limit; begin += kChunk) {
    const int64_t first = slot;
    slot = flags.pack(mask, begin, std::min(end, begin + kChunk), index, slot, limit);
    if (weight_in)
      for (int64_t i = first; i < slot; ++i) weight[i] = weight_in[index[i]];
    else
      std::fill(weight + first, weight + slot, 1.0f);
  }
  return slot;
}

}  // namespace

std::vector<int64_t> count_flags(const uint8_t* mask, int64_t rows) {
  const FlagFunctions& flags = implementation();
  const int parts = parts_for(rows, kGrain);
  std::vector<int64_t> counts(parts);
  parallel_parts(rows, parts, kWord, [&](int part, int64_t begin, int64_t end) {
    counts[part] = flags.count(mask, begin, end);
  });
  return counts;
}

int64_t compact(const uint8_t* mask, const float* weight_in, int64_t rows,
                std::vector<int64_t> counts, int64_t capacity, int64_t* index, float* weight) {
  const FlagFunctions& flags = implementation();
  int64_t total;
  int64_t packed;
  if (parts_for(rows, kGrain) == 1 && counts.size() <= 1) {
    packed = pack_part(flags, mask, weight_in, 0, rows, 0, capacity, index, weight);
    total = packed;
    if (!counts.empty())
      total = counts[0];
    else if (packed == capacity)  // there may be more flags than fit
      total = flags.count(mask, 0, rows);
  } else {
    if (counts.empty()) counts = count_flags(mask, rows);
    const int parts = int(counts.size());
    std::vector<int64_t> starts(parts + 1, 0);
    for (int part = 0; part < parts; ++part) starts[part + 1] = starts[part] + counts[part];
    // Hazard: a part must write only its own slots, even where the mask has changed since the
    // count.
    parallel_parts(rows, parts, kWord, [&](int part, int64_t begin, int64_t end) {
      const int64_t limit = std::min(capacity, starts[part + 1]);
      const int64_t slot =
          pack_part(flags, mask, weight_in, begin, end, starts[part], limit, index, weight);
      if (slot < limit) {  // flags were cleared since: no slot is left unwritten
        std::fill(index + slot, index + limit, int64_t(0));
        std::fill(weight + slot, weight + limit, 0.0f);
      }
    });
    total = starts[parts];
    packed = std::min(total, capacity);
  }
  std::fill(index + packed, index + capacity, int64_t(0));
  std::fill(weight + packed, weight + capacity, 0.0f);
  return total;
}

}  // namespace sparse_kernels
