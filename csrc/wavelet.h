// One 2 x 2 block of a picture as four channels: its corners (squeezing), or its Haar coefficients.
//
//   block (a b; c d):  corners a, d, b, c, a diagonal first (Dinh et al. 2017, arXiv:1605.08803, section 3.6)
//   Haar               (a+b+c+d, a-b+c-d, a+b-c-d, a-b-c+d) / 2 (Ardizzone et al. 2019, arXiv:1907.02392, section 3.2)
#pragma once

#include "scalar.h"

namespace pygen {

constexpr int kCorners = 4;

template <class T>
struct Four {
  T first, second, third, fourth;
};

// Symmetric and orthonormal: its own inverse.
template <class T>
PYGEN_INLINE Four<T> haar(T a, T b, T c, T d) {
  const T top = a + b, bottom = c + d, across_top = a - b, across_bottom = c - d;
  return {T(0.5) * (top + bottom), T(0.5) * (across_top + across_bottom), T(0.5) * (top - bottom),
          T(0.5) * (across_top - across_bottom)};
}

// The channels of a block.
template <bool kHaar, class T>
PYGEN_INLINE Four<T> block_to_channels(T a, T b, T c, T d) {
  if constexpr (kHaar) return haar(a, b, c, d);
  return {a, d, b, c};
}

// a, b, c, d of the block with these channels.
template <bool kHaar, class T>
PYGEN_INLINE Four<T> channels_to_block(T first, T second, T third, T fourth) {
  if constexpr (kHaar) return haar(first, second, third, fourth);
  return {first, third, fourth, second};
}

}  // namespace pygen
