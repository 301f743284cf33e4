// Two vectors at a time, for loops in which the order of the logits does not matter.
//
// load_pair() reads 2 kLanes consecutive logits into two vectors, in an order that store_pair() and
// stream_pair() reverse. Those of 16 bits need not be moved to the lanes of their places then: the
// even ones go to one vector and the odd ones to the other, and their results are one store.
// Here are the functions for any vector; vec_avx2.h and vec_avx512.h have their own for bfloat16.
#pragma once

#include <type_traits>

#include "vec_pair.h"

namespace sparse_kernels {

template <class Vec, class T>
inline void load_pair(const T* p, Vec& first, Vec& second) {
  first = Vec::load(p);
  second = Vec::load(p + Vec::kLanes);
}

// Moves the lanes of two vectors that load_pair() read from logits of type T to their places.
template <class T, class Vec>
inline void put_in_order(const T*, Vec&, Vec&) {}

// As store(), but to bfloat16 the bits of a NaN are rounded like any others. They stay a NaN's
// unless the NaN fills all of its lower half too; what arithmetic returns for bfloat16 operands
// does not.
template <class Vec, class T>
inline void store_pair(T* p, Vec first, Vec second) {
  store(p, first);
  store(p + Vec::kLanes, second);
}

// store_pair() past the caches, as stream() is store().
template <class Vec, class T>
inline void stream_pair(T* p, Vec first, Vec second) {
  stream(p, first);
  stream(p + Vec::kLanes, second);
}

// What such a loop takes at a time, and the same for it: a pair, or one vector where a pair would
// not stay in registers.
template <class Vec>
using Batch = std::conditional_t<Vec::kInRegisters, Pair<Vec>, Vec>;

template <class Half, class T>
inline void load_in_any_order(const T* p, Pair<Half>& pair) {
  load_pair(p, pair.low, pair.high);
}
template <class T, class Half>
inline Pair<Half> in_order(Pair<Half> pair) {
  put_in_order(static_cast<const T*>(nullptr), pair.low, pair.high);
  return pair;
}
template <class Half, class T>
inline void store_in_any_order(T* p, Pair<Half> pair) {
  store_pair(p, pair.low, pair.high);
}
template <class Half, class T>
inline void stream_in_any_order(T* p, Pair<Half> pair) {
  stream_pair(p, pair.low, pair.high);
}
template <class Vec, class T>
inline void load_in_any_order(const T* p, Vec& v) {
  v = Vec::load(p);
}
template <class Vec, class T>
inline void store_in_any_order(T* p, Vec v) {
  store(p, v);
}
template <class Vec, class T>
inline void stream_in_any_order(T* p, Vec v) {
  stream(p, v);
}

}  // namespace sparse_kernels
