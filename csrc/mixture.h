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

// LIMIT of pygen/ops/mixture.py: of log scales, and of the log slope that a step or a gradient divides by.
constexpr double kMixtureLimit = 60;

// A bisection at every other step would reach neighbouring numbers within this many.
constexpr int kMaxSteps = 128;

template <class T>
PYGEN_INLINE T bounded_log_scale(T log_scale) {
  return scalar::at_least(scalar::at_most(log_scale, T(kMixtureLimit)), T(-kMixtureLimit));
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

// A component's parts of F, of 1 - F and of f, each over e^peak.
template <class T>
struct Terms {
  T below, above, density;
};

template <class T>
PYGEN_INLINE Terms<T> component_terms(T logit, T z, T log_scale, T larger_sigmoid, Exponents<T> peak) {
  const Exponents<T> own = component_exponents(logit, z);
  return {larger_sigmoid * scalar::exp(own.below - peak.below), larger_sigmoid * scalar::exp(own.above - peak.above),
          larger_sigmoid * larger_sigmoid * scalar::exp((own.density - peak.density) - log_scale)};
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

// rate and turn: the sums of the density terms times e^{-s}, and times e^{-s} (sigmoid(z) - sigmoid(-z)).
template <class T>
PYGEN_INLINE Bend<T> mixture_bend(Curve<T> curve, T density, T rate, T turn) {
  const T over_below = scalar::exp(curve.log_over_below), over_above = scalar::exp(curve.log_over_above);
  return {over_above - over_below - turn / density, over_above + over_below + rate / density};
}

// The state of the search for x: it lies in [low, high]; `open` is 1 until it is found, then 0.
template <class T>
struct Search {
  T x, low, high, step, ladj, open;
};

// From the curve at search.x to the next x. Halley's step, unless it leaves the bracket or is not shrinking: then the
// middle of the bracket. Once a step is so short that the next would change nothing, it is the last, and ladj is taken
// along it.
template <class T>
PYGEN_INLINE Search<T> advance(Search<T> search, T target, Curve<T> curve, Bend<T> bend) {
  const T excess = curve.y - target;
  const T low = excess <= T(0) ? search.x : search.low, high = excess >= T(0) ? search.x : search.high;
  const T newton = -excess * scalar::exp(scalar::at_most(-curve.log_slope, T(kMixtureLimit)));
  const T curved = T(1) + T(0.5) * newton * bend.derivative;
  const T step = newton / scalar::at_most(scalar::at_least(curved, T(0.5)), T(2));
  const T relative = bend.bound * newton;
  const bool last = relative * relative <= std::numeric_limits<T>::epsilon();
  const T middle = low + T(0.5) * (high - low);
  const bool useful = search.x + step > low && search.x + step < high && scalar::abs(step) <= T(0.5) * search.step;
  // No number is left between low and high: x is one of the two.
  const bool exhausted = !last && !useful && (middle <= low || middle >= high);
  T next = useful ? search.x + step : middle;
  next = last ? scalar::at_most(scalar::at_least(search.x + step, low), high) : next;
  next = exhausted ? search.x : next;
  const bool invalid = excess != excess;
  next = invalid ? excess : next;
  const T ladj = -(curve.log_slope + (last ? bend.derivative * step : T(0)));
  const bool closed = search.open == T(0);
  return {closed ? search.x : next,    closed ? search.low : low,
          closed ? search.high : high, closed ? search.step : scalar::abs(next - search.x),
          closed ? search.ladj : ladj, closed || last || exhausted || invalid ? T(0) : T(1)};
}

// Gradients with respect to y and log dy/dx as functions of x and the parameters.
template <class T>
struct Upstream {
  T y, log_slope;
};

// The inverse is dx = (dy - y_theta dtheta) / y_x, and its ladj is -log_slope at x; first its gradient of y.
template <class T>
PYGEN_INLINE T implicit_gradient(T grad_x, T grad_ladj, T log_slope, T bend) {
  return (grad_x - grad_ladj * bend) * scalar::exp(scalar::at_most(-log_slope, T(kMixtureLimit)));
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
  return {logit, -inverse_scale * grad_z, scalar::abs(log_scale) < T(kMixtureLimit) ? log_scale_gradient : T(0)};
}

}  // namespace pygen
