#include "compact.h"

#include <algorithm>

#include "instruction_set.h"
#include "parallel.h"

namespace sparse_kernels {
namespace {

constexpr int64_t kWord = 64;
constexpr int64_t kGrain = 128 * 1024;  // flags a thread must have to be worth waking
constexpr int64_t kChunk = 16 * 1024;   // flags whose indices are still in L1 when weighed

const FlagFunctions& implementation() {
  switch (instruction_set()) {
#if defined(SPARSE_KERNELS_X86)
    case InstructionSet::kAvx512:
      return avx512::flag_functions;
    case InstructionSet::kAvx2:
      return avx2::flag_functions;
#endif
    default:
      return portable::flag_functions;
  }
}

// Indices and weights of [begin, end) into the slots [at, limit); returns the slot after the last.
int64_t pack_part(const FlagFunctions& flags, const uint8_t* mask, const float* weight_in,
                  int64_t begin, int64_t end, int64_t at, int64_t limit, int64_t* index,
                  float* weight) {
  for (; begin < end && at < limit; begin += kChunk) {
    const int64_t first = at;
    at = flags.pack(mask, begin, std::min(end, begin + kChunk), index, at, limit);
    if (weight_in)
      for (int64_t i = first; i < at; ++i) weight[i] = weight_in[index[i]];
    else
      std::fill(weight + first, weight + at, 1.0f);
  }
  return at;
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
    // What lies behind the last slot only counts.
    total = packed;
    if (!counts.empty())
      total = counts[0];
    else if (packed == capacity)
      total = flags.count(mask, 0, rows);
  } else {
    if (counts.empty()) counts = count_flags(mask, rows);
    const int parts = int(counts.size());
    std::vector<int64_t> starts(parts + 1, 0);
    for (int part = 0; part < parts; ++part) starts[part + 1] = starts[part] + counts[part];
    // A part writes its own slots alone, also where the mask has changed since it was counted.
    parallel_parts(rows, parts, kWord, [&](int part, int64_t begin, int64_t end) {
      pack_part(flags, mask, weight_in, begin, end, starts[part],
                std::min(capacity, starts[part + 1]), index, weight);
    });
    total = starts[parts];
    packed = std::min(total, capacity);
  }
  std::fill(index + packed, index + capacity, int64_t(0));
  std::fill(weight + packed, weight + capacity, 0.0f);
  return total;
}

}  // namespace sparse_kernels
