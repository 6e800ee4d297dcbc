// The pieces (piece.h) of monotone polynomial splines, linear, quadratic (Mueller et al. 2019, Neural Importance
// Sampling, section 4) and cubic (Durkan et al. 2019, Cubic-Spline Flows; Steffen 1990, eq. 11): which one a value lies
// in, and the way from its gradient to the parameters'. In the unit square, for K bins:
//
//   linear     w = 1 / K,  h = shares(u),  d = d' = h / w
//   quadratic  w = shares(u),  d_j = least + (1 - least) v_j / area(v, w),  v = softplus(u) + 1e-3
//   cubic      w, h = shares(u),  d_j = min(2 s, 2 s', (w' s + w s') / (w + w')) between bins of slopes s and s'
//
// A group of L elements is taken together, "row j" of it being L neighbouring numbers, one an element: the CPU's vector
// lanes. A CUDA thread is a group of one. The rows of a group's parameters, as they lie packed, are overwritten.
#pragma once

#include "piece.h"
#include "scalar.h"
#include "shares.h"

namespace pygen {

constexpr int kMinPieces = 2, kMaxPieces = 128;

template <class T>
struct PiecewiseOptions {
  Degree degree;
  int bins;
  bool tails;  // the identity outside of the domain
  T left, right, bottom, top;
  Shares<T> widths, heights;
  T end_weight;  // of the end bins in the end heights of a quadratic spline with tails
  T scale;

  PYGEN_INLINE int heights_of_quadratic() const { return tails ? bins - 1 : bins + 1; }
  PYGEN_INLINE int parameters() const {
    return degree == Degree::kLinear      ? bins
           : degree == Degree::kQuadratic ? bins + heights_of_quadratic()
                                          : 2 * bins + 2;
  }
};

// The pieces of L elements, and the numbers of their bins.
template <int L, class T>
struct Pieces {
  T index[L], x[L], width[L], y[L], height[L], slope0[L], slope1[L];

  PYGEN_INLINE Piece<T> at(int l) const { return {x[l], width[l], y[l], height[l], slope0[l], slope1[l]}; }
};

// Each kind of spline has its pieces, a function that finds them for values 0 .. 1, of the image with kInverse, by one
// pass over the bins, and one that turns the rows to the parameters' gradient, given that of the pieces.
template <int L, class T>
struct LinearPieces : Pieces<L, T> {};

template <bool kInverse, int L, class T>
PYGEN_INLINE void find_pieces(const T* value, T* rows, const PiecewiseOptions<T>& options, LinearPieces<L, T>& found) {
  const T bins = static_cast<T>(options.bins), width = T(1) / bins;
  T sum[L], lost[L];
  to_shares<L>(rows, options.bins, options.scale, options.heights);
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    sum[l] = lost[l] = found.index[l] = found.y[l] = T(0);
    found.height[l] = rows[l];
  }
  for (int k = 1; k < options.bins; ++k) {
    const T index = static_cast<T>(k);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      add_exactly(rows[(k - 1) * L + l], sum[l], lost[l]);
      const bool past = kInverse ? value[l] >= sum[l] : value[l] * bins >= index;
      found.index[l] = scalar::pick(past, index, found.index[l]);
      found.y[l] = scalar::pick(past, sum[l], found.y[l]);
      found.height[l] = scalar::pick(past, rows[k * L + l], found.height[l]);
    }
  }
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    found.x[l] = found.index[l] * width;
    found.width[l] = width;
    found.slope0[l] = found.slope1[l] = found.height[l] * bins;
  }
}

template <int L, class T>
PYGEN_INLINE void parameter_gradients(const LinearPieces<L, T>& found, const Pieces<L, T>& grad,
                                      const PiecewiseOptions<T>& options, T* rows) {
  const T bins = static_cast<T>(options.bins);
  share_gradients<L>(rows, options.bins, options.scale, options.heights, [&](int j, T* to) {
    const T k = static_cast<T>(j);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T own = grad.height[l] + bins * (grad.slope0[l] + grad.slope1[l]);
      to[l] = scalar::pick(k < found.index[l], grad.y[l], scalar::pick(k == found.index[l], own, T(0)));
    }
  });
}

template <int L, class T>
struct QuadraticPieces : Pieces<L, T> {
  T end[L];               // v at both ends, with tails
  T unit[L];              // what turns v to a slope
  T before[L];            // the area of v before the piece
  T start[L], finish[L];  // v at the piece's ends

  // v at knot j.
  PYGEN_INLINE const T* knot(const T* heights, int j, const PiecewiseOptions<T>& options) const {
    if (!options.tails) return heights + j * L;
    return j == 0 || j == options.bins ? end : heights + (j - 1) * L;
  }
};

// The derivative of softplus where it has this value: 1 - e^-softplus, all digits of it where that is small.
template <class T>
PYGEN_INLINE T softplus_slope(T softplus) {
  const T half = scalar::tanh(T(0.5) * softplus);
  return T(2) * half / (T(1) + half);
}

constexpr double kLeastHeight = 1e-3;  // LEAST_HEIGHT in pygen/ops/piecewise_reference.py

template <bool kInverse, int L, class T>
PYGEN_INLINE void find_pieces(const T* value, T* rows, const PiecewiseOptions<T>& options,
                              QuadraticPieces<L, T>& found) {
  const int bins = options.bins, count = options.heights_of_quadratic();
  T* const heights = rows + bins * L;
  T sum[L], area[L], lost[L], lost_area[L];
  to_shares<L>(rows, bins, options.scale, options.widths);
  for (int j = 0; j < count; ++j) {
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      heights[j * L + l] = scalar::softplus(options.scale * heights[j * L + l]) + static_cast<T>(kLeastHeight);
    }
  }
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    sum[l] = area[l] = lost[l] = lost_area[l] = found.before[l] = found.index[l] = found.x[l] = T(0);
  }
  const int ends = options.tails ? 1 : 0;
  for (int j = ends; j < bins - ends; ++j) {
    const T *const v0 = heights + (j - ends) * L, *const v1 = v0 + L;
    PYGEN_LANES
    for (int l = 0; l < L; ++l) add_exactly(rows[j * L + l] * (T(0.5) * (v0[l] + v1[l])), area[l], lost_area[l]);
  }
  if (options.tails) {
    const T *const widths = rows + (bins - 1) * L, *const last = heights + (count - 1) * L;
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T weight0 = options.end_weight * rows[l], weight1 = options.end_weight * widths[l];
      const T end = (weight0 * heights[l] + weight1 * last[l] + area[l]) / (T(1) - weight0 - weight1);
      area[l] += T(0.5) * (rows[l] * (end + heights[l]) + widths[l] * (end + last[l]));
      found.end[l] = end;
    }
  }
  const T *const first = found.knot(heights, 0, options), *const second = found.knot(heights, 1, options);
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    found.unit[l] = options.heights.rest / area[l];
    found.width[l] = rows[l];
    found.start[l] = first[l];
    found.finish[l] = second[l];
    area[l] = lost_area[l] = T(0);
  }
  for (int k = 1; k < bins; ++k) {
    const T index = static_cast<T>(k);
    const T *const v0 = found.knot(heights, k - 1, options), *const v1 = found.knot(heights, k, options);
    const T* const v2 = found.knot(heights, k + 1, options);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T width = rows[(k - 1) * L + l];
      add_exactly(width, sum[l], lost[l]);
      add_exactly(width * (T(0.5) * (v0[l] + v1[l])), area[l], lost_area[l]);
      const bool past = value[l] >= (kInverse ? options.heights.least * sum[l] + found.unit[l] * area[l] : sum[l]);
      found.index[l] = scalar::pick(past, index, found.index[l]);
      found.x[l] = scalar::pick(past, sum[l], found.x[l]);
      found.before[l] = scalar::pick(past, area[l], found.before[l]);
      found.width[l] = scalar::pick(past, rows[k * L + l], found.width[l]);
      found.start[l] = scalar::pick(past, v1[l], found.start[l]);
      found.finish[l] = scalar::pick(past, v2[l], found.finish[l]);
    }
  }
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    const T slope0 = options.heights.least + found.unit[l] * found.start[l];
    const T slope1 = options.heights.least + found.unit[l] * found.finish[l];
    found.y[l] = options.heights.least * found.x[l] + found.unit[l] * found.before[l];
    found.height[l] = T(0.5) * (slope0 + slope1) * found.width[l];
    found.slope0[l] = slope0;
    found.slope1[l] = slope1;
  }
}

template <int L, class T>
PYGEN_INLINE void parameter_gradients(const QuadraticPieces<L, T>& found, const Pieces<L, T>& grad,
                                      const PiecewiseOptions<T>& options, T* rows) {
  const int bins = options.bins;
  T* const heights = rows + bins * L;
  const T scale = options.scale, end_weight = options.end_weight;
  const T least = options.heights.least, over_rest = T(1) / options.heights.rest;
  // Of the area before the piece, of all of it, and of an end bin's share in the end heights; of v at the piece's ends;
  // of the widths before the piece.
  T before[L], whole[L], ends[L], start[L], finish[L], moved[L];
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    const T unit = found.unit[l], slope0 = unit * grad.slope0[l], slope1 = unit * grad.slope1[l];
    before[l] = unit * grad.y[l];
    start[l] = slope0;
    finish[l] = slope1;
    whole[l] =
        -over_rest * unit * (found.before[l] * (unit * grad.y[l]) + found.start[l] * slope0 + found.finish[l] * slope1);
    ends[l] = T(0);
    moved[l] = grad.x[l] + least * grad.y[l];
  }
  if (options.tails) {
    const T *const first = rows, *const last = rows + (bins - 1) * L, last_bin = static_cast<T>(bins - 1);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T in_first = scalar::pick(found.index[l] == T(0), start[l], T(0.5) * first[l] * before[l]);
      const T in_last = scalar::pick(found.index[l] == last_bin, finish[l], T(0));
      ends[l] =
          (in_first + in_last + T(0.5) * (first[l] + last[l]) * whole[l]) / (T(1) - end_weight * (first[l] + last[l]));
    }
  }
  // Of the area of bin j.
  const auto of_area = [&](int j, T* to) {
    const T k = static_cast<T>(j), share = !options.tails || (j > 0 && j < bins - 1) ? T(1) : T(2) * end_weight;
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      to[l] = whole[l] + share * ends[l] + scalar::pick(k < found.index[l], before[l], T(0));
    }
  };
  const auto of_width = [&](int j, T* to) {
    const T k = static_cast<T>(j);
    const T *const v0 = found.knot(heights, j, options), *const v1 = found.knot(heights, j + 1, options);
    of_area(j, to);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T direct =
          scalar::pick(k < found.index[l], moved[l], scalar::pick(k == found.index[l], grad.width[l], T(0)));
      to[l] = T(0.5) * (v0[l] + v1[l]) * to[l] + direct;
    }
  };
  T mean[L], area[L], width[L], knot[L], half[L];
  mean_gradient<L>(rows, bins, options.widths, of_width, mean);
  PYGEN_LANES
  for (int l = 0; l < L; ++l) half[l] = T(0);
  for (int j = 0; j <= bins; ++j) {
    const T k = static_cast<T>(j);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T beyond = scalar::pick(k == found.index[l] + T(1), finish[l], T(0));
      knot[l] = half[l] + scalar::pick(k == found.index[l], start[l], beyond);
    }
    if (j < bins) {
      T* const row = rows + j * L;
      of_area(j, area);
      of_width(j, width);
      PYGEN_LANES
      for (int l = 0; l < L; ++l) {
        half[l] = T(0.5) * row[l] * area[l];
        knot[l] += half[l];
        row[l] = share_gradient(row[l], width[l], mean[l], scale, options.widths);
      }
    }
    if (options.tails && (j == 0 || j == bins)) continue;
    T* const v = heights + (options.tails ? j - 1 : j) * L;
    PYGEN_LANES
    for (int l = 0; l < L; ++l) v[l] = scale * knot[l] * softplus_slope(v[l] - static_cast<T>(kLeastHeight));
  }
}

// The slope at a knot between two bins.
template <class T>
PYGEN_INLINE T steffen_slope(T width0, T height0, T width1, T height1) {
  const T slope0 = height0 / width0, slope1 = height1 / width1;
  const T mean = (width1 * slope0 + width0 * slope1) / (width0 + width1);
  return scalar::at_most(mean, T(2) * scalar::at_most(slope0, slope1));
}

template <class T>
struct SteffenGradient {
  T width0, height0, width1, height1;
};

template <class T>
PYGEN_INLINE SteffenGradient<T> steffen_gradient(T width0, T height0, T width1, T height1, T grad) {
  const T over0 = T(1) / width0, over1 = T(1) / width1, over_sum = T(1) / (width0 + width1);
  const T slope0 = height0 * over0, slope1 = height1 * over1;
  const T mean = (width1 * slope0 + width0 * slope1) * over_sum;
  const bool steep = mean > T(2) * scalar::at_most(slope0, slope1), first = slope0 < slope1;
  const T grad_slope0 = grad * (steep ? (first ? T(2) : T(0)) : width1 * over_sum);
  const T grad_slope1 = grad * (steep ? (first ? T(0) : T(2)) : width0 * over_sum);
  const T grad_mean = steep ? T(0) : grad * over_sum;
  return {grad_mean * (slope1 - mean) - grad_slope0 * slope0 * over0, grad_slope0 * over0,
          grad_mean * (slope0 - mean) - grad_slope1 * slope1 * over1, grad_slope1 * over1};
}

// 3 sigmoid(u), the sigmoid no less than the rounding of 1: the share of its bin's slope that an end's slope is. With
// its derivative.
template <class T>
struct EndShare {
  T value, slope;
};

template <class T>
PYGEN_INLINE EndShare<T> end_share(T u) {
  const T sigmoid = scalar::sigmoid(u), least = std::numeric_limits<T>::epsilon();
  return {T(3) * scalar::at_least(sigmoid, least), sigmoid < least ? T(0) : T(3) * sigmoid * (T(1) - sigmoid)};
}

template <int L, class T>
struct CubicPieces : Pieces<L, T> {
  // Of the bins before and after: the piece's own where there is none.
  T width0[L], height0[L], width2[L], height2[L];
};

template <bool kInverse, int L, class T>
PYGEN_INLINE void find_pieces(const T* value, T* rows, const PiecewiseOptions<T>& options, CubicPieces<L, T>& found) {
  const int bins = options.bins;
  T* const heights = rows + bins * L;
  T x[L], y[L], lost_x[L], lost_y[L];
  to_shares<L>(rows, bins, options.scale, options.widths);
  to_shares<L>(heights, bins, options.scale, options.heights);
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    x[l] = y[l] = lost_x[l] = lost_y[l] = found.index[l] = found.x[l] = found.y[l] = T(0);
    found.width0[l] = found.width[l] = rows[l];
    found.height0[l] = found.height[l] = heights[l];
    found.width2[l] = rows[L + l];
    found.height2[l] = heights[L + l];
  }
  for (int k = 1; k < bins; ++k) {
    const T index = static_cast<T>(k);
    const int before = (k - 1) * L, own = k * L, after = (k + 1 < bins ? k + 1 : k) * L;
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      add_exactly(rows[before + l], x[l], lost_x[l]);
      add_exactly(heights[before + l], y[l], lost_y[l]);
      const bool past = value[l] >= (kInverse ? y[l] : x[l]);
      found.index[l] = scalar::pick(past, index, found.index[l]);
      found.x[l] = scalar::pick(past, x[l], found.x[l]);
      found.y[l] = scalar::pick(past, y[l], found.y[l]);
      found.width0[l] = scalar::pick(past, rows[before + l], found.width0[l]);
      found.width[l] = scalar::pick(past, rows[own + l], found.width[l]);
      found.width2[l] = scalar::pick(past, rows[after + l], found.width2[l]);
      found.height0[l] = scalar::pick(past, heights[before + l], found.height0[l]);
      found.height[l] = scalar::pick(past, heights[own + l], found.height[l]);
      found.height2[l] = scalar::pick(past, heights[after + l], found.height2[l]);
    }
  }
  const T *const u_left = heights + bins * L, *const u_right = u_left + L;
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    const T width = found.width[l], height = found.height[l], delta = height / width;
    const T left = delta * end_share(u_left[l]).value, right = delta * end_share(u_right[l]).value;
    const T inner0 = steffen_slope(found.width0[l], found.height0[l], width, height);
    const T inner1 = steffen_slope(width, height, found.width2[l], found.height2[l]);
    found.slope0[l] = found.index[l] == T(0) ? left : inner0;
    found.slope1[l] = found.index[l] == static_cast<T>(bins - 1) ? right : inner1;
  }
}

template <int L, class T>
PYGEN_INLINE void parameter_gradients(const CubicPieces<L, T>& found, const Pieces<L, T>& grad,
                                      const PiecewiseOptions<T>& options, T* rows) {
  const int bins = options.bins;
  T* const heights = rows + bins * L;
  T *const u_left = heights + bins * L, *const u_right = u_left + L;
  T width0[L], width1[L], width2[L], height0[L], height1[L], height2[L];
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    const T width = found.width[l], height = found.height[l], delta = height / width;
    const bool first = found.index[l] == T(0), last = found.index[l] == static_cast<T>(bins - 1);
    const EndShare<T> left = end_share(u_left[l]), right = end_share(u_right[l]);
    const T grad_left = first ? grad.slope0[l] : T(0), grad_right = last ? grad.slope1[l] : T(0);
    const auto before = steffen_gradient(found.width0[l], found.height0[l], width, height, grad.slope0[l] - grad_left);
    const auto after = steffen_gradient(width, height, found.width2[l], found.height2[l], grad.slope1[l] - grad_right);
    const T grad_delta = grad_left * left.value + grad_right * right.value;
    width0[l] = before.width0;
    height0[l] = before.height0;
    width1[l] = grad.width[l] + before.width1 + after.width0 - grad_delta * delta / width;
    height1[l] = grad.height[l] + before.height1 + after.height0 + grad_delta / width;
    width2[l] = after.width1;
    height2[l] = after.height1;
    u_left[l] = grad_left * left.slope * delta;
    u_right[l] = grad_right * right.slope * delta;
  }
  // Bins before the piece move it; the neighbours have part in its slopes too.
  const auto around = [&](int j, const T* edge, const T* before, const T* own, const T* after, T* to) {
    const T k = static_cast<T>(j);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T from_piece = k - found.index[l];
      const T beside = scalar::pick(from_piece == T(-1), before[l], scalar::pick(from_piece == T(1), after[l], T(0)));
      const T moved = scalar::pick(from_piece < T(0), edge[l], T(0));
      to[l] = moved + scalar::pick(from_piece == T(0), own[l], beside);
    }
  };
  share_gradients<L>(rows, bins, options.scale, options.widths,
                     [&](int j, T* to) { around(j, grad.x, width0, width1, width2, to); });
  share_gradients<L>(heights, bins, options.scale, options.heights,
                     [&](int j, T* to) { around(j, grad.y, height0, height1, height2, to); });
}

}  // namespace pygen
