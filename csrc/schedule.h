// One step of a diffusion solver for one element:
//   m0 = clamp(c0 x + c1 e),  x' = c2 m0 + c3 x + c4 e + c5 z + c6 h0 + c7 h1 + ...
// with x the sample, e the model's output, z the noise and h what the solver kept: the common form of DDPM (Ho et al.
// 2020, eq. 7), DDIM (Song et al. 2021, eq. 12), DPM-Solver++ (Lu et al. 2022) and their kin.
//
// The files that include this are built without contraction of a*b+c, so that the sums round alike everywhere.
#pragma once

#include <limits>

#include "scalar.h"

namespace pygen {

constexpr int kSolverCoefficients = 6;  // those before the history's

// One row of the table in the type of the arithmetic, with the clip bounds (infinite for none).
template <class T>
struct StepCoefficients {
  T x_in_m0, e_in_m0, m0, x, e, z;
  T low, high;

  // `row` is null for a step outside the table, which makes everything NaN.
  PYGEN_INLINE static StepCoefficients read(const float* row, T low, T high) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    if (!row) return {nan, nan, nan, nan, nan, nan, low, high};
    return {T(row[0]), T(row[1]), T(row[2]), T(row[3]), T(row[4]), T(row[5]), low, high};
  }
};

template <class T>
PYGEN_INLINE T unclipped_denoised(T x, T e, const StepCoefficients<T>& c) {
  return c.x_in_m0 * x + c.e_in_m0 * e;
}

template <class T>
PYGEN_INLINE T clip_denoised(T m0, const StepCoefficients<T>& c) {
  return scalar::at_most(scalar::at_least(m0, c.low), c.high);  // NaN comes through
}

// x' before noise and history.
template <class T>
PYGEN_INLINE T step_sum(T m0, T x, T e, const StepCoefficients<T>& c) {
  return c.m0 * m0 + c.x * x + c.e * e;
}

template <class T>
struct StepGradient {
  T x, e;
};

// As in torch.clamp, the bounds themselves pass the gradient.
template <class T>
PYGEN_INLINE StepGradient<T> step_gradient(T x, T e, T grad_next, T grad_m0, const StepCoefficients<T>& c) {
  const T m0 = unclipped_denoised(x, e, c);
  const T inner = m0 >= c.low && m0 <= c.high ? c.m0 * grad_next + grad_m0 : T(0);
  return {c.x * grad_next + c.x_in_m0 * inner, c.e * grad_next + c.e_in_m0 * inner};
}

// Which row of the table a sample takes.
struct StepRows {
  const float* table;
  int64_t steps, columns;
  const int64_t* indices;  // null: `index` for all samples
  int64_t index_stride;
  int64_t index;

  PYGEN_INLINE const float* of(int64_t sample) const {
    const int64_t i = indices ? indices[sample * index_stride] : index;
    return i >= 0 && i < steps ? table + i * columns : nullptr;
  }
};

}  // namespace pygen
