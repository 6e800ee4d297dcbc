// Monotone piecewise polynomial splines of a group of elements: forward, inverse and backward. What is particular to
// each degree is in pieces.h, the polynomial itself in piece.h.
#pragma once

#include "pieces.h"

namespace pygen {

template <Degree D, int L, class T>
struct PiecesOf;
template <int L, class T>
struct PiecesOf<Degree::kLinear, L, T> : LinearPieces<L, T> {};
template <int L, class T>
struct PiecesOf<Degree::kQuadratic, L, T> : QuadraticPieces<L, T> {};
template <int L, class T>
struct PiecesOf<Degree::kCubic, L, T> : CubicPieces<L, T> {};

// Loops over lanes have no named structs but such as only their fields are read of: GCC keeps others in memory, and the
// loop scalar.

// Where in their pieces L values lie that are `inside` of their interval, the image's with kInverse: theta and 1 -
// theta, each with all its digits where the root is near its end.
template <Degree D, bool kInverse, int L, class T>
PYGEN_INLINE void locate(const Pieces<L, T>& found, const T* inside, const T* excess, T* theta, T* rest) {
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    const T start = kInverse ? found.y[l] : found.x[l], size = kInverse ? found.height[l] : found.width[l];
    theta[l] = piece_theta(inside[l], excess[l], start, size);
    rest[l] = T(1) - theta[l];
  }
  if constexpr (kInverse) {
    constexpr T least_bend = D == Degree::kCubic ? kLeastBend<T> : std::numeric_limits<T>::lowest();
    T value[L], start[L], end[L], root[L], low[L], high[L];
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const PieceEquation<T> equation = piece_equation(found.at(l), theta[l], rest[l]);
      root[l] = quadratic_root(equation.value, equation.start, equation.end, least_bend);
      value[l] = equation.value;
      start[l] = equation.start;
      end[l] = equation.end;
      low[l] = T(0);
      high[l] = T(1);
    }
    for (int i = 0; i < (D == Degree::kCubic ? kCubicSteps<T> : 0); ++i) {
      PYGEN_LANES
      for (int l = 0; l < L; ++l) root[l] = cubic_step(value[l], start[l], end[l], root[l], low[l], high[l]);
    }
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const bool mirrored = theta[l] > rest[l];
      theta[l] = scalar::pick(mirrored, T(1) - root[l], root[l]);
      rest[l] = scalar::pick(mirrored, root[l], T(1) - root[l]);
    }
  }
}

// The splines of L elements: images and each element's own ladj.
template <Degree D, bool kInverse, int L, class T>
PYGEN_INLINE void piecewise(const T* value, T* rows, const PiecewiseOptions<T>& options, T* image, T* ladj) {
  const T low = kInverse ? options.bottom : options.left, high = kInverse ? options.top : options.right;
  const T from = kInverse ? options.left : options.bottom, to = kInverse ? options.right : options.top;
  const T stretch = (options.top - options.bottom) / (options.right - options.left);
  const bool tails = options.tails;
  PiecesOf<D, L, T> found;
  T inside[L], excess[L], theta[L], rest[L];
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    inside[l] = piece_inside(value[l], low, high);
    excess[l] = piece_excess(value[l], low, high);
  }
  find_pieces<kInverse>(inside, rows, options, found);
  locate<D, kInverse, L, T>(found, inside, excess, theta, rest);
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    const T slope = stretch * piece_slope<D>(found.at(l), theta[l], rest[l]);
    const T share = kInverse ? found.x[l] + found.width[l] * theta[l] : piece_value<D>(found.at(l), theta[l], rest[l]);
    const T mapped = from + (to - from) * share + (kInverse ? excess[l] / slope : excess[l] * slope);
    const T logarithm = kInverse ? -scalar::log(slope) : scalar::log(slope);
    const bool identity = tails & (excess[l] != T(0));
    image[l] = scalar::pick(identity, value[l], mapped);
    ladj[l] = scalar::pick(identity, T(0), logarithm);
  }
}

// Gradients of `piecewise` at L elements. The rows are overwritten with the gradients of the parameters.
template <Degree D, bool kInverse, int L, class T>
PYGEN_INLINE void piecewise_gradient(const T* value, T* rows, const T* grad_output, const T* grad_ladj,
                                     const PiecewiseOptions<T>& options, T* grad_input) {
  const T low = kInverse ? options.bottom : options.left, high = kInverse ? options.top : options.right;
  const T span = high - low, other_span = kInverse ? options.right - options.left : options.top - options.bottom;
  const bool tails = options.tails;
  PiecesOf<D, L, T> found;
  Pieces<L, T> grad;
  T inside[L], excess[L], theta[L], rest[L];
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    inside[l] = piece_inside(value[l], low, high);
    excess[l] = piece_excess(value[l], low, high);
  }
  find_pieces<kInverse>(inside, rows, options, found);
  locate<D, kInverse, L, T>(found, inside, excess, theta, rest);
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    const bool identity = tails & (excess[l] != T(0));
    const T grad_image = scalar::pick(identity, T(0), grad_output[l] * other_span);  // in the unit square
    const T grad_logarithm = scalar::pick(identity, T(0), grad_ladj[l]);
    // Nor does an element in a tail pass its excess on: zero times what overflows would not be zero.
    const T excess_in_square = scalar::pick(identity, T(0), excess[l] / span);
    const PieceGradient<T> gradient =
        piece_gradient<D, kInverse>(found.at(l), theta[l], rest[l], excess_in_square, grad_image, grad_logarithm);
    grad_input[l] = scalar::pick(identity, grad_output[l], gradient.input / span);
    grad.x[l] = gradient.x;
    grad.width[l] = gradient.width;
    grad.y[l] = gradient.y;
    grad.height[l] = gradient.height;
    grad.slope0[l] = gradient.slope0;
    grad.slope1[l] = gradient.slope1;
  }
  parameter_gradients<L>(found, grad, options, rows);
}

// Calls `f(Tag{})` with the degree as a constant, Tag::value.
template <Degree D>
struct DegreeTag {
  static constexpr Degree value = D;
};

template <class F>
PYGEN_INLINE void for_degree(Degree degree, F&& f) {
  switch (degree) {
    case Degree::kLinear:
      return f(DegreeTag<Degree::kLinear>{});
    case Degree::kQuadratic:
      return f(DegreeTag<Degree::kQuadratic>{});
    default:
      return f(DegreeTag<Degree::kCubic>{});
  }
}

}  // namespace pygen
