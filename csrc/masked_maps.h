// The maps of one input whose parameters a masked network gives: x = (y - t) / s, or the inverse of a spline.
#pragma once

#include "coupling.h"
#include "spline.h"

namespace pygen {

// Parameters are u and t, with s = activation(u + offset) + epsilon.
template <class T>
struct AffineMap {
  int64_t activation;
  T limit, offset, epsilon;
};

template <class T>
struct SplineMap {
  SplineOptions<T> options;
  int64_t parametrization;
  T shared[5];     // left, right, bottom, top, tails
  const T* table;  // (5, features) where these differ from input to input, else nullptr
  int64_t features;

  PYGEN_INLINE T bound(int i, int64_t input) const { return table ? table[i * features + input] : shared[i]; }
};

// For a program that maps no input.
struct NoMap {};

}  // namespace pygen
