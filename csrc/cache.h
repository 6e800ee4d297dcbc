// Attention over a growing set of keys, one block of keys at a time: (peak, sum, accumulator) of softmax(scale q k^T)
// v.
//
// With scores s_j, peak m = max s_j, sum l = sum e^{s_j - m} and accumulator a = sum e^{s_j - m} v_j, the result is a /
// l, and two disjoint sets of keys merge as below (Milakov and Gimelshein 2018, arXiv:1805.02867, section 3.1).
#pragma once

#include "scalar.h"

namespace pygen::cache {

template <class T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();  // the peak of no keys

// By how much sums and accumulators shrink when their peak rises from `old_peak` to `peak`.
template <class T>
PYGEN_INLINE T shrinkage(T old_peak, T peak) {
  return old_peak == peak ? T(1) : scalar::exp(old_peak - peak);
}

template <class T>
PYGEN_INLINE T higher(T a, T b) {
  return a > b ? a : b;
}

// How many tokens the row may append and attend to: -1 marks a row whose append does not fit.
PYGEN_INLINE int64_t length_before(int32_t length, int64_t block, int64_t capacity) {
  return length >= 0 && length + block <= capacity ? length : -1;
}

}  // namespace pygen::cache
