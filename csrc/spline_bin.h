// One bin of a monotone rational-quadratic spline (Durkan et al. 2019, Neural Spline Flows, eq. 4-8), forward, inverse
// and backward: with theta = (x - x_k) / w_k, t = theta (1 - theta), delta = h_k / w_k and
// D = delta (1 - 2 t) + (d_k + d_k+1) t,
//
//   y = y_k + h_k (delta theta^2 + d_k t) / D,   dy/dx = delta^2 (d_k+1 theta^2 + 2 delta t + d_k (1 - theta)^2) / D^2.
#pragma once

#include "scalar.h"

namespace pygen {

// In the order of TAILS in pygen/ops/spline_reference.py.
enum class Tails : int64_t { kNone, kLinear, kCircular, kPerDimension };

// One bin: its edges, sizes, and the slopes at both ends.
template <class T>
struct Bin {
  T x, width, y, height, slope0, slope1;
};

// Where a point lies relative to its spline's bounds, low and high. NaN counts as inside, and stays NaN there.
template <class T>
struct Range {
  T low, high, tails;

  PYGEN_INLINE bool holds(T value) const { return !((value < low) | (value > high)); }
  PYGEN_INLINE bool identity_at(T value) const {
    return ((value < low) | (value > high)) & (tails != static_cast<T>(Tails::kNone));
  }
  // How far outside.
  PYGEN_INLINE T excess(T value) const { return value < low ? value - low : value > high ? value - high : T(0); }
  // part is (value - edge) / size within a bin that was found: 0 to 1, exactly so outside.
  PYGEN_INLINE T clamp(T value, T part) const {
    const T clamped = scalar::at_least(scalar::at_most(part, T(1)), T(0));
    return value < low ? T(0) : value > high ? T(1) : clamped;
  }
};

// A point of a bin: theta = (x - x_k) / w_k, and what value, slope and gradients there share.
template <class T>
struct BinPoint {
  T theta, rest, t, delta, denominator, numerator;
};

template <class T>
PYGEN_INLINE BinPoint<T> bin_point(const Bin<T>& bin, T theta, T rest) {
  const T t = theta * rest, delta = bin.height / bin.width;
  return {theta,
          rest,
          t,
          delta,
          delta * (T(1) - T(2) * t) + (bin.slope0 + bin.slope1) * t,
          bin.slope1 * theta * theta + T(2) * delta * t + bin.slope0 * rest * rest};
}

// The point that a value is at: x going forward, y going back. There, with eta = (y - y_k) / h_k and
// m = d_k (1 - eta) - d_k+1 eta, the discriminant is m^2 + 4 delta^2 eta (1 - eta), never negative; theta where m >= 0,
// else 1 - theta, comes from the form of the root that adds.
template <bool kInverse, class T>
PYGEN_INLINE BinPoint<T> bin_point_at(const Bin<T>& bin, T value, const Range<T>& range) {
  if constexpr (kInverse) {
    const T eta = range.clamp(value, (value - bin.y) / bin.height), rest = T(1) - eta;
    const T delta = bin.height / bin.width, m = bin.slope0 * rest - bin.slope1 * eta;
    const T root = std::sqrt(m * m + T(4) * delta * delta * eta * rest);
    const bool from_left = m >= T(0);
    const T part = T(2) * delta * (from_left ? eta : rest);
    const T near = part / (part + scalar::abs(m) + root), far = T(1) - near;
    return bin_point(bin, from_left ? near : far, from_left ? far : near);
  } else {
    const T theta = range.clamp(value, (value - bin.x) / bin.width);
    return bin_point(bin, theta, T(1) - theta);
  }
}

// dy/dx.
template <class T>
PYGEN_INLINE T bin_slope(const BinPoint<T>& at) {
  const T ratio = at.delta / at.denominator;
  return ratio * ratio * at.numerator;
}

template <class T>
struct SplineValue {
  T value, ladj;
};

template <bool kInverse, class T>
PYGEN_INLINE SplineValue<T> bin_value(const Bin<T>& bin, T value, const Range<T>& range) {
  const BinPoint<T> at = bin_point_at<kInverse>(bin, value, range);
  const T slope = bin_slope(at), excess = range.excess(value);
  const T x = bin.x + bin.width * at.theta + excess / slope;
  const T y =
      bin.y + bin.height * (at.theta * (at.delta * at.theta + bin.slope0 * at.rest) / at.denominator) + excess * slope;
  const T ladj = scalar::log(slope);
  const bool identity = range.identity_at(value);
  return {identity ? value : kInverse ? x : y, identity ? T(0) : kInverse ? -ladj : ladj};
}

// Gradients of bin_value with respect to the value and the bin's numbers; going back x is a function of y and the bin
// by the implicit function theorem.
template <class T>
struct BinGradient {
  T input, x, width, y, height, slope0, slope1;
};

template <bool kInverse, class T>
PYGEN_INLINE BinGradient<T> bin_gradient(const Bin<T>& bin, T value, const Range<T>& range, T grad_output,
                                         T grad_ladj) {
  const BinPoint<T> at = bin_point_at<kInverse>(bin, value, range);
  const T theta = at.theta, rest = at.rest, t = at.t, delta = at.delta, sum = bin.slope0 + bin.slope1;
  const T over_denominator = T(1) / at.denominator, over_numerator = T(1) / at.numerator, over_width = T(1) / bin.width;
  const T slope = bin_slope(at);
  const bool outside = !range.holds(value);
  const T through_ladj = kInverse ? -grad_ladj : grad_ladj;

  // Of log dy/dx with respect to x.
  const T turn = T(2) * over_width *
                 ((bin.slope1 * theta + delta * (rest - theta) - bin.slope0 * rest) * over_numerator -
                  (sum - T(2) * delta) * (rest - theta) * over_denominator);
  const T bend = outside ? T(0) : through_ladj * turn;
  const T input = kInverse ? (grad_output + bend) / slope : grad_output * slope + bend;
  const T through_y = kInverse ? -input : grad_output;
  const T moved = outside ? T(0) : kInverse ? -grad_output : input;  // with respect to x - x_k

  const T scale = bin.height * t * over_denominator * over_denominator;
  const T grad_delta = through_y * scale * (bin.slope1 * theta * theta - bin.slope0 * rest * rest) +
                       through_ladj * T(2) * t * (sum * over_denominator / delta + over_numerator);
  const T ladj_slope = T(2) * t * over_denominator;
  const T grad_slope0 = through_y * (scale * rest * (delta * rest + bin.slope1 * theta)) +
                        through_ladj * (rest * rest * over_numerator - ladj_slope);
  const T grad_slope1 = through_ladj * (theta * theta * over_numerator - ladj_slope) -
                        through_y * (scale * theta * (delta * theta + bin.slope0 * rest));
  const T grad_width = -(moved * theta + grad_delta * delta * over_width);
  const T grad_height =
      through_y * theta * (delta * theta + bin.slope0 * rest) * over_denominator + grad_delta * over_width;
  // Outside, y moves with an end's slope times the distance of x from that end.
  const T excess = through_y * (kInverse ? range.excess(value) / slope : range.excess(value));
  const T below = value < range.low ? excess : T(0), above = value > range.high ? excess : T(0);
  const bool identity = range.identity_at(value);
  return {identity ? grad_output : input,       outside ? T(0) : -moved,      outside ? T(0) : grad_width,
          outside ? T(0) : through_y,           outside ? T(0) : grad_height, identity ? T(0) : grad_slope0 + below,
          identity ? T(0) : grad_slope1 + above};
}

}  // namespace pygen
