// One element of the logistic mixture: y = logit(F(x)), and log dy/dx = log f - log F - log(1 - F), with
//
//   F = sum_k pi_k sigmoid(z_k),  f = sum_k pi_k e^{-s_k} sigmoid(z_k) sigmoid(-z_k),  z_k = (x - mu_k) e^{-s_k}
//
// (Ho et al. 2019, Flow++, arXiv:1902.00275, eq. 11-13), and the step of Halley's method, kept in a bracket, that
// solves for x. All three sums are kept as a largest exponent and a rest: F and 1 - F are exact however small.
#pragma once

#include "scalar.h"

namespace pygen {

constexpr int64_t kMaxComponents = 128;

// As in pygen/ops/mixture.py: of log scales, and of the log slope that a step or a gradient divides by.
constexpr double kLogScaleLimit = 30;
constexpr double kLogSlopeLimit = 60;

// A bisection at every other step would reach neighbouring numbers within this many.
constexpr int kMaxSteps = 128;

template <class T>
PYGEN_INLINE T bounded_log_scale(T log_scale) {
  return scalar::at_least(scalar::at_most(log_scale, T(kLogScaleLimit)), T(-kLogScaleLimit));
}

// A NaN does not replace the largest value: it shows in the sum.
template <class T>
PYGEN_INLINE T larger(T a, T b) {
  return b > a ? b : a;
}

// Logarithms of a component's part of F, of 1 - F and of f, but for factors between 1/4 and 1 and, in f, e^{-s}.
template <class T>
struct Exponents {
  T below, above, density;
};

template <class T>
PYGEN_INLINE Exponents<T> component_exponents(T logit, T z) {
  // Both parts of z without a comparison, which would keep loops from vectorising; halving is exact.
  const T magnitude = scalar::abs(z);
  return {logit + T(0.5) * (z - magnitude), logit - T(0.5) * (z + magnitude), logit - magnitude};
}

// sigmoid(z) and sigmoid(-z), the larger of the two, and their difference.
template <class T>
struct Sigmoids {
  T positive, negative, larger, difference;
};

template <class T>
PYGEN_INLINE Sigmoids<T> both_sigmoids(T z) {
  const T e = scalar::exp(-scalar::abs(z));
  const T large = T(1) / (T(1) + e), small = e * large;
  return {z < T(0) ? small : large, z < T(0) ? large : small, large, scalar::with_sign_of(large - small, z)};
}

// The largest exponents, and what e^{largest of f} is over those of F and of 1 - F: at most 1.
template <class T>
struct Peaks {
  Exponents<T> exponent;
  T over_below, over_above;
};

template <class T>
PYGEN_INLINE T peak_ratio(T density, T other) {
  return scalar::exp(density - other);
}

// A component's parts of F, of 1 - F and of f, each over e^peak.
template <class T>
struct Terms {
  T below, above, density;
};

// On the side where z lies, F or 1 - F has the exponent of f, so two exponentials make three terms. Log scales within
// kLogScaleLimit cannot lift a part of f that underflows here to where it would count.
template <class T>
PYGEN_INLINE Terms<T> component_terms(T logit, T z, T inverse_scale, T larger_sigmoid, Peaks<T> peak) {
  const bool negative = z < T(0);
  const T near = larger_sigmoid * scalar::exp((logit - scalar::abs(z)) - peak.exponent.density);
  const T far = larger_sigmoid * scalar::exp(logit - scalar::pick(negative, peak.exponent.above, peak.exponent.below));
  return {scalar::pick(negative, near * peak.over_below, far), scalar::pick(negative, far, near * peak.over_above),
          larger_sigmoid * near * inverse_scale};
}

// y, log dy/dx and f / F, f / (1 - F), from the sums of the terms.
template <class T>
struct Curve {
  T y, log_slope;
  T log_over_below, log_over_above;
};

template <class T>
PYGEN_INLINE Curve<T> mixture_curve(Terms<T> sum, Exponents<T> peak) {
  const T below = scalar::log(sum.below), above = scalar::log(sum.above), density = scalar::log(sum.density);
  const T y = (peak.below - peak.above) + (below - above);
  const T over_below = (peak.density - peak.below) + (density - below);
  const T over_above = (peak.density - peak.above) + (density - above);
  // Far out the exponents of f and of the smaller of F and 1 - F are the same large number, and their difference exact.
  const T log_slope = (y < T(0) ? over_below : over_above) + scalar::log1p_unit(scalar::exp(-scalar::abs(y)));
  return {y, log_slope, over_below, over_above};
}

// How log dy/dx changes with x: its derivative, and a bound of it in which nothing cancels.
template <class T>
struct Bend {
  T derivative, bound;
};

// From the logarithms of f / F and f / (1 - F); rate and turn: the sums of the density terms times e^{-s}, and times
// e^{-s} (sigmoid(z) - sigmoid(-z)).
template <class T>
PYGEN_INLINE Bend<T> mixture_bend(T log_over_below, T log_over_above, T density, T rate, T turn) {
  const T over_below = scalar::exp(log_over_below), over_above = scalar::exp(log_over_above);
  return {over_above - over_below - turn / density, over_above + over_below + rate / density};
}

// The state of the search for x: it lies in [low, high]; `open` is 1 until it is found, then 0.
template <class T>
struct Search {
  T x, low, high, step, ladj, open;
};

// From the curve at search.x, and how its log slope bends, to the next x. Halley's step, unless it leaves the bracket
// or is not shrinking: then the middle of the bracket. Once a step is so short that the next would change nothing, it
// is the last, and ladj is taken along it.
template <class T>
PYGEN_INLINE Search<T> advance(Search<T> search, T target, T y, T log_slope, T bend, T bend_bound) {
  using scalar::pick;
  const T excess = y - target;
  const T low = pick(excess <= T(0), search.x, search.low), high = pick(excess >= T(0), search.x, search.high);
  const T newton = -excess * scalar::exp(scalar::at_most(-log_slope, T(kLogSlopeLimit)));
  const T curved = T(1) + T(0.5) * newton * bend;
  const T step = newton / pick(curved < T(0.5), T(0.5), pick(curved > T(2), T(2), curved)), reached = search.x + step;
  const T relative = bend_bound * newton;
  const bool last = relative * relative <= std::numeric_limits<T>::epsilon();
  const T middle = low + T(0.5) * (high - low);
  const bool useful = (reached > low) & (reached < high) & (scalar::abs(step) <= T(0.5) * search.step);
  // No number is left between low and high: x is one of the two.
  const bool exhausted = !last & !useful & ((middle <= low) | (middle >= high));
  const bool invalid = excess != excess;
  const T inside = pick(reached < low, low, pick(reached > high, high, reached));
  const T moved = pick(last, inside, pick(exhausted, search.x, pick(useful, reached, middle)));
  const T next = pick(invalid, excess, moved);
  const T ladj = -(log_slope + pick(last, bend * step, T(0)));
  const bool closed = search.open == T(0);
  return {pick(closed, search.x, next),    pick(closed, search.low, low),
          pick(closed, search.high, high), pick(closed, search.step, scalar::abs(next - search.x)),
          pick(closed, search.ladj, ladj), pick(closed | last | exhausted | invalid, T(0), T(1))};
}

// Gradients with respect to y and log dy/dx as functions of x and the parameters.
template <class T>
struct Upstream {
  T y, log_slope;
};

// The inverse is dx = (dy - y_theta dtheta) / y_x, and its ladj is -log_slope at x; first its gradient of y.
template <class T>
PYGEN_INLINE T implicit_gradient(T grad_x, T grad_ladj, T log_slope, T bend) {
  return (grad_x - grad_ladj * bend) * scalar::exp(scalar::at_most(-log_slope, T(kLogSlopeLimit)));
}

template <class T>
struct ComponentGradient {
  T logit, mean, log_scale;
};

// `share` is the component's terms over their sums, `inverse_scale` e^{-s}. As pi_k = sigmoid(y) share.below +
// sigmoid(-y) share.above, the softmax needs no exponential of its own. The gradient of x is minus the sum of those of
// the means.
template <class T>
PYGEN_INLINE ComponentGradient<T> component_gradient(Terms<T> share, T z, T log_scale, T inverse_scale,
                                                     Sigmoids<T> sigmoid, T sigmoid_y, T sigmoid_minus_y,
                                                     Upstream<T> grad) {
  const T below = share.below * sigmoid.negative, above = share.above * sigmoid.positive;
  const T between = share.density * sigmoid.difference;
  const T grad_z = grad.y * (below + above) + grad.log_slope * ((above - below) - between);
  const T logit = share.below * (grad.y - grad.log_slope * sigmoid_minus_y) -
                  share.above * (grad.y + grad.log_slope * sigmoid_y) + grad.log_slope * share.density;
  const T log_scale_gradient = -(z * grad_z + grad.log_slope * share.density);
  return {logit, -inverse_scale * grad_z, scalar::abs(log_scale) < T(kLogScaleLimit) ? log_scale_gradient : T(0)};
}

}  // namespace pygen
