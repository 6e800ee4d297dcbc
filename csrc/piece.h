// One piece of a monotone piecewise polynomial in Hermite's form, forward, inverse and backward: with
// theta = (x - x_k) / w, r = 1 - theta and delta = h / w,
//
//   y = y_k + w (d theta r^2 + (3 delta - d') theta^2 r + delta theta^3),
//   dy/dx = d r^2 + 2 (3 delta - d - d') theta r + d' theta^2.
//
// Linear pieces have d = d' = delta, quadratic ones d + d' = 2 delta. Everything here is scaled to the unit square.
#pragma once

#include "scalar.h"

namespace pygen {

enum class Degree : int64_t { kLinear = 1, kQuadratic, kCubic };

template <class T>
struct Piece {
  T x, width, y, height, slope0, slope1;
};

// Where a value lies: in which part 0 .. 1 of its interval, and by how much outside, in its own units, negative below.
// NaN counts as inside, and stays NaN there.
template <class T>
PYGEN_INLINE T piece_inside(T value, T low, T high) {
  return scalar::at_least(scalar::at_most((value - low) / (high - low), T(1)), T(0));
}

template <class T>
PYGEN_INLINE T piece_excess(T value, T low, T high) {
  return value < low ? value - low : value > high ? value - high : T(0);
}

// Outside, theta is that of the end, whatever rounding made of the knot there.
template <class T>
PYGEN_INLINE T piece_theta(T inside, T excess, T start, T size) {
  const T theta = scalar::at_least(scalar::at_most((inside - start) / size, T(1)), T(0));
  return excess < T(0) ? T(0) : excess > T(0) ? T(1) : theta;
}

template <Degree D, class T>
PYGEN_INLINE T piece_value(Piece<T> piece, T theta, T rest) {
  if constexpr (D == Degree::kLinear) {
    return piece.y + piece.height * theta;
  } else if constexpr (D == Degree::kQuadratic) {
    return piece.y + piece.width * theta * (piece.slope0 + T(0.5) * theta * (piece.slope1 - piece.slope0));
  } else {
    const T delta = piece.height / piece.width, bend = T(3) * delta - piece.slope1;
    return piece.y + piece.width * theta * (rest * (piece.slope0 * rest + bend * theta) + delta * theta * theta);
  }
}

template <Degree D, class T>
PYGEN_INLINE T piece_slope(Piece<T> piece, T theta, T rest) {
  if constexpr (D == Degree::kLinear) {
    return piece.slope0 + T(0) * theta;  // NaN stays NaN
  } else if constexpr (D == Degree::kQuadratic) {
    return piece.slope0 * rest + piece.slope1 * theta;
  } else {
    const T bend = T(3) * (piece.height / piece.width) - piece.slope0 - piece.slope1;
    return piece.slope0 * rest * rest + T(2) * bend * theta * rest + piece.slope1 * theta * theta;
  }
}

// The slope's derivative with respect to theta.
template <Degree D, class T>
PYGEN_INLINE T piece_turn(Piece<T> piece, T theta, T rest) {
  if constexpr (D == Degree::kLinear) {
    return T(0);
  } else if constexpr (D == Degree::kQuadratic) {
    return piece.slope1 - piece.slope0;
  } else {
    return piece.slope0 * (T(2) * theta - T(4) * rest) + piece.slope1 * (T(4) * theta - T(2) * rest) +
           T(6) * (piece.height / piece.width) * (rest - theta);
  }
}

// The equation start theta + ... = value of a piece scaled to the unit square once more, seen from the end that is
// nearer: there its root has most digits. Mirrored, where the share `eta` of h is more than the rest, the root is
// 1 - theta.
template <class T>
struct PieceEquation {
  T value, start, end;  // the slopes at this end and the other
};

template <class T>
PYGEN_INLINE PieceEquation<T> piece_equation(Piece<T> piece, T eta, T rest) {
  const T over_delta = piece.width / piece.height;
  const T slope0 = piece.slope0 * over_delta, slope1 = piece.slope1 * over_delta;
  const bool mirrored = eta > rest;
  return {mirrored ? rest : eta, mirrored ? slope1 : slope0, mirrored ? slope0 : slope1};
}

// The root of start theta + (3 - 2 start - end) theta^2: of the piece itself, where it is linear or quadratic.
template <class T>
PYGEN_INLINE T quadratic_root(T value, T start, T end, T least_bend) {
  const T bend = scalar::at_least(T(3) - T(2) * start - end, least_bend);
  const T root = std::sqrt(scalar::at_least(start * start + T(4) * bend * value, T(0)));
  return scalar::at_most(T(2) * value / (start + root), T(1));
}

// A bracketed step towards a cubic's root: to that of the parabola with its value, slope and curvature (Halley's
// irrational method), or, where this would leave the bracket, to the middle.
template <class T>
PYGEN_INLINE T cubic_step(T value, T start, T end, T theta, T& low, T& high) {
  const T rest = T(1) - theta;
  const T at = theta * (rest * (start * rest + (T(3) - end) * theta) + theta * theta);
  const T slope = start * rest * rest + T(2) * (T(3) - start - end) * theta * rest + end * theta * theta;
  const T curvature = start * (T(6) * theta - T(4)) + end * (T(6) * theta - T(2)) + T(6) * (T(1) - T(2) * theta);
  const bool above = at > value;
  low = above ? low : theta;
  high = above ? theta : high;
  const T excess = T(2) * (at - value);
  const T root = std::sqrt(scalar::at_least(slope * slope - excess * curvature, T(0)));
  const T next = theta - excess / (slope + root);
  return (next < low) | (next > high) ? T(0.5) * (low + high) : next;
}

// Steps after which theta has all its digits, from quadratic_root with kLeastBend: each at least triples
// those that are right, and the slowest case, a cube root, takes one less.
template <class T>
constexpr int kCubicSteps = sizeof(T) == 4 ? 5 : 7;
template <class T>
constexpr T kLeastBend = T(0.3);

// Gradients with respect to a piece's numbers. Going forward the output is y and ladj = log dy/dx; going back it is x
// and ladj = -log dy/dx, with x a function of y and the piece by the implicit function theorem. A linear piece is a
// function of x_k, y_k, w, h and d, a quadratic one of x_k, y_k, w, d and d': the others have none.
template <class T>
struct PieceGradient {
  T input, x, width, y, height, slope0, slope1;
};

// `excess` is that of the input in the unit square.
template <Degree D, bool kInverse, class T>
PYGEN_INLINE PieceGradient<T> piece_gradient(Piece<T> piece, T theta, T rest, T excess, T grad_output, T grad_ladj) {
  const T both = theta * rest, over_width = T(1) / piece.width, delta = piece.height * over_width;
  const T slope = piece_slope<D>(piece, theta, rest);
  const T through_slope = (kInverse ? -grad_ladj : grad_ladj) / slope;
  const T excess_of_x = kInverse ? excess / slope : excess;
  const bool outside = excess != T(0);

  // What comes through theta as it moves with x, and through y; outside y moves with the end slope only.
  const T bend = outside ? T(0) : through_slope * piece_turn<D>(piece, theta, rest) * over_width;
  const T input = kInverse ? (grad_output + bend) / slope : grad_output * slope + bend;
  const T through_image = kInverse ? -input : grad_output;
  const T moved = outside ? T(0) : kInverse ? -grad_output : input;
  const T through_y = outside ? T(0) : through_image;

  T width = -moved * theta, height = T(0), slope0 = T(0), slope1 = T(0);
  if constexpr (D == Degree::kLinear) {
    height = through_y * theta;
    slope0 = through_slope;
  } else if constexpr (D == Degree::kQuadratic) {
    const T half = T(0.5) * theta;
    width += through_y * theta * (piece.slope0 + half * (piece.slope1 - piece.slope0));
    slope0 = through_y * piece.width * theta * (T(1) - half) + through_slope * rest;
    slope1 = through_y * piece.width * theta * half + through_slope * theta;
  } else {
    const T curved = outside ? T(0) : through_slope * T(6) * both * over_width;
    width += through_y * both * (piece.slope0 * rest - piece.slope1 * theta) - curved * delta;
    height = through_y * theta * theta * (T(1) + T(2) * rest) + curved;
    slope0 = through_y * piece.width * both * rest + through_slope * rest * (rest - T(2) * theta);
    slope1 = through_slope * theta * (theta - T(2) * rest) - through_y * piece.width * both * theta;
  }
  slope0 += excess < T(0) ? through_image * excess_of_x : T(0);
  slope1 += excess > T(0) ? through_image * excess_of_x : T(0);
  return {input, -moved, width, through_y, height, slope0, slope1};
}

}  // namespace pygen
