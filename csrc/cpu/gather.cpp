#include "sparse_kernels/cpu/gather.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

#include "sparse_kernels/cpu/large_pages.h"
#include "sparse_kernels/cpu/parallel.h"
#include "wide_copy.h"

namespace sparse_kernels {
namespace {

constexpr int64_t kGrain = 128 * 1024;  // least number of bytes worth waking a thread for
constexpr int64_t kWhole = 64 * 1024;   // rows of up to this many bytes are not split among threads
constexpr int64_t kCut = 64;            // larger rows are, at a multiple of this
constexpr int64_t kPrefetch = 1024;     // bytes of the next row to prefetch; hardware does the rest

int64_t first_out_of_range(const int64_t* index, int64_t slots, int64_t rows) {
  for (int64_t i = 0; i < slots; ++i)
    if (index[i] < 0 || index[i] >= rows) return i;
  return -1;
}

// The start of a thread's share that would begin at `byte` of packed rows, moved back to a place
// where rows may be split.
int64_t cut(int64_t byte, int64_t row_bytes) {
  const int64_t offset = byte % row_bytes;
  return row_bytes <= kWhole ? byte - offset : byte - offset % kCut;
}

// Calls body(move, begin, end, streaming) for ranges of bytes that together cover each output of
// `out_rows` rows. Each thread has its share of every output, as in PyTorch's own loops: what it
// writes is in the cache of the core that wrote this memory before and that will read it next.
template <class Body>
void for_each_share(const std::vector<RowMove>& moves, int64_t out_rows, const Body& body) {
  int64_t total = 0;
  for (const RowMove& move : moves) {
    total += out_rows * move.row_bytes;
    request_large_pages(move.out, out_rows * move.row_bytes);
  }
  const bool streaming = total >= kStreamed;
  const int parts = parts_for(total, kGrain);
  parallel_parts(parts, parts, 1, [&](int part, int64_t, int64_t) {
    for (const RowMove& move : moves) {
      if (move.row_bytes == 0) continue;
      const auto bound = [&](int64_t i) {
        return cut(out_rows * move.row_bytes * i / parts, move.row_bytes);
      };
      if (bound(part) < bound(part + 1)) body(move, bound(part), bound(part + 1), streaming);
    }
    if (streaming) finish_streaming();
  });
}

// The row at a slot. Hazard: another thread may change the index after it was checked; read once
// and bounded, it names a row of the tensor all the same.
int64_t row_at(const int64_t* index, int64_t rows) {
  const int64_t row = __atomic_load_n(index, __ATOMIC_RELAXED);
  return uint64_t(row) < uint64_t(rows) ? row : 0;
}

template <class Word>
void gather_words(const RowMove& move, const int64_t* index, int64_t rows, int64_t begin,
                  int64_t end) {
  for (int64_t byte = begin; byte < end; byte += int64_t(sizeof(Word)))
    std::memcpy(move.out + byte, move.in + row_at(index++, rows) * move.in_stride, sizeof(Word));
}

// Bytes [begin, end) of the packed rows. The most common small rows have loops of their own: a call
// of memcpy for a label would cost more than copying it.
void gather_share(const RowMove& move, const int64_t* index, int64_t slots, int64_t rows,
                  int64_t begin, int64_t end, bool streaming) {
  const int64_t row_bytes = move.row_bytes;
  int64_t slot = begin / row_bytes;
  switch (row_bytes) {
    case 1:
      return gather_words<uint8_t>(move, index + slot, rows, begin, end);
    case 2:
      return gather_words<uint16_t>(move, index + slot, rows, begin, end);
    case 4:
      return gather_words<uint32_t>(move, index + slot, rows, begin, end);
    case 8:
      return gather_words<uint64_t>(move, index + slot, rows, begin, end);
  }
  const int64_t prefetched = std::min(row_bytes, kPrefetch);
  for (int64_t offset = begin % row_bytes; begin < end; ++slot, offset = 0) {
    const int64_t bytes = std::min(row_bytes - offset, end - begin);
    if (slot + 1 < slots) {
      const char* next = move.in + row_at(index + slot + 1, rows) * move.in_stride;
      for (int64_t i = 0; i < prefetched; i += 64) __builtin_prefetch(next + i);
    }
    copy_bytes(move.out + begin, move.in + row_at(index + slot, rows) * move.in_stride + offset,
               bytes, streaming);
    begin += bytes;
  }
}

// The sources of a scatter's output: slot_of(i) goes to row index[i]. The rows are in ascending
// order and all different.
struct Sources {
  const int64_t* index;
  int64_t count;
  std::vector<int64_t> sorted;
  std::vector<int64_t> slot;  // empty: each is its own

  Sources(const int64_t* unsorted, int64_t slots) : index(unsorted), count(slots) {
    if (std::adjacent_find(unsorted, unsorted + slots, std::greater_equal<int64_t>()) ==
        unsorted + slots)
      return;
    slot.resize(slots);
    std::iota(slot.begin(), slot.end(), int64_t(0));
    std::stable_sort(slot.begin(), slot.end(),
                     [&](int64_t a, int64_t b) { return unsorted[a] < unsorted[b]; });
    // Of equal indices the last is kept: the first in reverse order.
    const auto end = std::unique(slot.rbegin(), slot.rend(),
                                 [&](int64_t a, int64_t b) { return unsorted[a] == unsorted[b]; });
    slot.erase(slot.begin(), end.base());
    for (int64_t i : slot) sorted.push_back(unsorted[i]);
    index = sorted.data();
    count = int64_t(slot.size());
  }
  int64_t slot_of(int64_t i) const { return slot.empty() ? i : slot[i]; }
};

void scatter_share(const RowMove& move, const Sources& sources, int64_t begin, int64_t end,
                   bool streaming) {
  const int64_t row_bytes = move.row_bytes;
  int64_t i = std::lower_bound(sources.index, sources.index + sources.count, begin / row_bytes) -
              sources.index;
  while (begin < end) {
    const int64_t next_row = i < sources.count ? sources.index[i] * row_bytes : end;
    if (begin < next_row) {
      const int64_t zeros_end = std::min(next_row, end);
      zero_bytes(move.out + begin, zeros_end - begin, streaming);
      begin = zeros_end;
    } else {
      const int64_t offset = begin - next_row;
      const int64_t bytes = std::min(row_bytes - offset, end - begin);
      copy_bytes(move.out + begin, move.in + sources.slot_of(i) * move.in_stride + offset, bytes,
                 streaming);
      begin += bytes;
      ++i;
    }
  }
}

}  // namespace

int64_t gather_rows(const std::vector<RowMove>& moves, const int64_t* index, int64_t slots,
                    int64_t rows) {
  const int64_t bad = first_out_of_range(index, slots, rows);
  if (bad >= 0) return bad;
  for_each_share(moves, slots, [&](const RowMove& move, int64_t begin, int64_t end, bool stream) {
    gather_share(move, index, slots, rows, begin, end, stream);
  });
  return -1;
}

int64_t scatter_rows(const std::vector<RowMove>& moves, const int64_t* index, int64_t slots,
                     int64_t rows) {
  // Hazard: another thread may change the index. What is checked is a copy, and the copy is used.
  const std::vector<int64_t> checked(index, index + slots);
  const int64_t bad = first_out_of_range(checked.data(), slots, rows);
  if (bad >= 0) return bad;
  const Sources sources(checked.data(), slots);
  for_each_share(moves, rows, [&](const RowMove& move, int64_t begin, int64_t end, bool stream) {
    scatter_share(move, sources, begin, end, stream);
  });
  return -1;
}

}  // namespace sparse_kernels
