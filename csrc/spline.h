// Monotone rational-quadratic splines (Durkan et al. 2019, Neural Spline Flows, eq. 4-8): in bin k, with
// theta = (x - x_k) / w_k, t = theta (1 - theta), delta = h_k / w_k and D = delta (1 - 2 t) + (d_k + d_k+1) t,
//
//   y = y_k + h_k (delta theta^2 + d_k t) / D,   dy/dx = delta^2 (d_k+1 theta^2 + 2 delta t + d_k (1 - theta)^2) / D^2.
//
// A group of L elements is taken together, "row j" of it being L neighbouring numbers, one an element: the CPU's vector
// lanes. A CUDA thread, or a sweep that goes element by element, is a group of one, whose rows are its parameters as
// they lie packed: K widths, K heights, derivatives.
#pragma once

#include <bit>

#include "scalar.h"

// The lanes of a group are independent, also where results overwrite what they are computed from.
#if defined(__CUDACC__)
#define PYGEN_LANES
#else
#define PYGEN_LANES _Pragma("omp simd")
#endif

namespace pygen {

constexpr int kMinBins = 2, kMaxBins = 128;

// In the order of PARAMETRIZATIONS in pygen/ops/spline.py.
enum class Parametrization : int64_t {
  kSoftplus,  // shares least + (1 - least K) softmax(u), slopes least + softplus(beta u) / beta (nflows, normflows)
  kSoftclip   // shares softmax(u / (1 + |2 u / limit|)), slopes exp(u / (1 + |u / limit|)) (zuko)
};

// In the order of TAILS in pygen/ops/spline.py.
enum class Tails : int64_t { kNone, kLinear, kCircular, kPerDimension };

template <class T>
struct SplineOptions {
  int bins;
  Tails tails;  // decides how the derivatives are packed; what an element does outside is in its bounds
  T min_width, min_height, min_derivative;
  T sharpness;  // beta, or limit
  T boundary_slope, scale;

  PYGEN_INLINE int derivatives() const {
    return tails == Tails::kLinear ? bins - 1 : tails == Tails::kCircular ? bins : bins + 1;
  }
  PYGEN_INLINE int parameters() const { return 2 * bins + derivatives(); }
  // Derivative 0 is that of knot 0, or of knot 1 where the ends are fixed.
  PYGEN_INLINE int first_knot() const { return tails == Tails::kLinear ? 1 : 0; }
  // The row of a knot's derivative; where the tails decide it, any row.
  PYGEN_INLINE int row_of(int knot) const {
    const int row = knot - first_knot();
    if (row < 0) return 0;
    return row < derivatives() ? row : tails == Tails::kCircular ? 0 : row - 1;
  }
};

// Each element's domain, image, and Tails (one of the first three) as a number.
template <int L, class T>
struct SplineBounds {
  T left[L], right[L], bottom[L], top[L], tails[L];
};

// One bin: its edges, sizes, and the slopes at both ends.
template <class T>
struct Bin {
  T x, width, y, height, slope0, slope1;
};

// The widths or the heights of a group, and of these the bin k that was found. Its low edge is at
// low + least k + unit (e_0 + ... + e_k-1), its high edge at high - least (K - 1 - k) - unit (e_k+1 + ... + e_K-1): of
// the two the one with less to add is the more accurate.
template <int L, class T>
struct Axis {
  T low[L], high[L], least[L], unit[L], total[L];  // total of all e
  T before[L], own[L], after[L];                   // sums of the e before, of and after the bin

  PYGEN_INLINE T size_of_bin(int l) const { return least[l] + unit[l] * own[l]; }
  PYGEN_INLINE T start_of_bin(int l, T index, int bins) const {
    const T from_low = low[l] + (least[l] * index + unit[l] * before[l]);
    const T from_high = high[l] - (least[l] * (static_cast<T>(bins - 1) - index) + unit[l] * after[l]);
    return before[l] > after[l] ? from_high - size_of_bin(l) : from_low;
  }
};

template <int L, class T>
struct FoundBins {
  Axis<L, T> widths, heights;
  T index[L];
  T u0[L], u1[L];  // the unconstrained derivatives at its ends
};

// first ? a : b in a loop over memory. As a conditional expression GCC makes it a branch around the loads, and the loop
// stays scalar.
#if defined(__CUDACC__)
template <class T>
PYGEN_INLINE T pick(bool first, T a, T b) {
  return first ? a : b;
}
#else
PYGEN_INLINE float pick(bool first, float a, float b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(first);
  return scalar::float_of((scalar::bits_of(a) & mask) | (scalar::bits_of(b) & ~mask));
}
PYGEN_INLINE double pick(bool first, double a, double b) {
  const uint64_t mask = uint64_t{0} - static_cast<uint64_t>(first);
  return std::bit_cast<double>((std::bit_cast<uint64_t>(a) & mask) | (std::bit_cast<uint64_t>(b) & ~mask));
}
#endif

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

// u / (1 + |u / limit|), and its derivative.
template <class T>
PYGEN_INLINE T softclip(T u, T limit) {
  return u / (T(1) + scalar::abs(u / limit));
}

template <class T>
PYGEN_INLINE T softclip_slope(T u, T limit) {
  const T d = T(1) + scalar::abs(u / limit);
  return T(1) / (d * d);
}

template <Parametrization P, class T>
PYGEN_INLINE T slope_of(T u, const SplineOptions<T>& options) {
  if constexpr (P == Parametrization::kSoftplus) {
    return options.min_derivative + scalar::softplus(options.sharpness * u) / options.sharpness;
  } else {
    return scalar::exp(softclip(u, options.sharpness));
  }
}

template <Parametrization P, class T>
PYGEN_INLINE T slope_derivative(T u, const SplineOptions<T>& options) {
  if constexpr (P == Parametrization::kSoftplus) {
    return scalar::sigmoid(options.sharpness * u);
  } else {
    return scalar::exp(softclip(u, options.sharpness)) * softclip_slope(u, options.sharpness);
  }
}

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

// Rows 0 .. K-1 of e^(v - max v), v = scale u bounded by the parametrization, and their sum. exps may be u itself.
template <Parametrization P, int L, class T>
PYGEN_INLINE void exponentials(const T* u, const SplineOptions<T>& options, T* exps, T* total) {
  T peak[L], lost[L];
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    peak[l] = -std::numeric_limits<T>::infinity();
    total[l] = lost[l] = T(0);
  }
  for (int j = 0; j < options.bins; ++j) {
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T scaled = options.scale * u[j * L + l];
      const T v = P == Parametrization::kSoftclip ? softclip(scaled, T(0.5) * options.sharpness) : scaled;
      exps[j * L + l] = v;
      peak[l] = scalar::at_least(v, peak[l]);
    }
  }
  for (int j = 0; j < options.bins; ++j) {
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T e = scalar::exp(exps[j * L + l] - peak[l]);
      exps[j * L + l] = e;
      // Kahan's compensated sum, because the total scales every knot.
      const T more = e - lost[l], sum = total[l] + more;
      lost[l] = (sum - total[l]) - more;
      total[l] = sum;
    }
  }
}

template <int L, class T>
PYGEN_INLINE void scale_axis(const T* low, const T* high, T least, int bins, Axis<L, T>& axis) {
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    const T span = high[l] - low[l];
    axis.low[l] = low[l];
    axis.high[l] = high[l];
    axis.least[l] = span * least;
    axis.unit[l] = span * (T(1) - least * static_cast<T>(bins)) / axis.total[l];
  }
}

// Finds the bins of L values along one axis by one pass over the bins, picking up as it goes all that is needed of
// them: no lane branches or gathers.
template <int L, class T>
PYGEN_INLINE void find_bins(const T* value, const T* exps, const T* other_exps, const T* derivatives,
                            const SplineOptions<T>& options, Axis<L, T>& axis, Axis<L, T>& other,
                            FoundBins<L, T>& found) {
  T sum[L], other_sum[L];
  const T* first = derivatives + options.row_of(0) * L;
  const T* second = derivatives + options.row_of(1) * L;
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    sum[l] = axis.before[l] = axis.after[l] = T(0);
    other_sum[l] = other.before[l] = other.after[l] = T(0);
    found.index[l] = T(0);
    axis.own[l] = exps[l];
    other.own[l] = other_exps[l];
    found.u0[l] = first[l];
    found.u1[l] = second[l];
  }
  for (int k = 1; k < options.bins; ++k) {
    const T index = static_cast<T>(k);
    const T* start = derivatives + options.row_of(k) * L;
    const T* end = derivatives + options.row_of(k + 1) * L;
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      sum[l] += exps[(k - 1) * L + l];
      other_sum[l] += other_exps[(k - 1) * L + l];
      const bool past = value[l] >= axis.low[l] + (axis.least[l] * index + axis.unit[l] * sum[l]);
      axis.before[l] = pick(past, sum[l], axis.before[l]);
      axis.own[l] = pick(past, exps[k * L + l], axis.own[l]);
      axis.after[l] += pick(past, T(0), exps[k * L + l]);
      other.before[l] = pick(past, other_sum[l], other.before[l]);
      other.own[l] = pick(past, other_exps[k * L + l], other.own[l]);
      other.after[l] += pick(past, T(0), other_exps[k * L + l]);
      found.index[l] = pick(past, index, found.index[l]);
      found.u0[l] = pick(past, start[l], found.u0[l]);
      found.u1[l] = pick(past, end[l], found.u1[l]);
    }
  }
}

// The bins of L values: the image side's with kInverse, else the data side's. exps has room for 2 K rows, and may be
// the parameters where these are not needed again.
template <Parametrization P, bool kInverse, int L, class T>
PYGEN_INLINE void find_bins(const T* value, const T* parameters, T* exps, const SplineBounds<L, T>& bounds,
                            const SplineOptions<T>& options, FoundBins<L, T>& found) {
  const int rows = options.bins * L;
  exponentials<P, L>(parameters, options, exps, found.widths.total);
  exponentials<P, L>(parameters + rows, options, exps + rows, found.heights.total);
  scale_axis(bounds.left, bounds.right, options.min_width, options.bins, found.widths);
  scale_axis(bounds.bottom, bounds.top, options.min_height, options.bins, found.heights);
  const T* derivatives = parameters + 2 * rows;
  if constexpr (kInverse) {
    find_bins(value, exps + rows, exps, derivatives, options, found.heights, found.widths, found);
  } else {
    find_bins(value, exps, exps + rows, derivatives, options, found.widths, found.heights, found);
  }
}

template <Parametrization P, int L, class T>
PYGEN_INLINE Bin<T> bin_of(const FoundBins<L, T>& found, int l, T tails, T u_first, const SplineOptions<T>& options) {
  const Axis<L, T>&x = found.widths, &y = found.heights;
  const T index = found.index[l];
  const bool linear = tails == static_cast<T>(Tails::kLinear), circular = tails == static_cast<T>(Tails::kCircular);
  const bool last = index == static_cast<T>(options.bins - 1);
  const T slope0 = slope_of<P>(found.u0[l], options);
  const T slope1 = slope_of<P>(pick(last & circular, u_first, found.u1[l]), options);
  return {x.start_of_bin(l, index, options.bins),
          x.size_of_bin(l),
          y.start_of_bin(l, index, options.bins),
          y.size_of_bin(l),
          pick(linear & (index == T(0)), options.boundary_slope, slope0),
          pick(linear & last, options.boundary_slope, slope1)};
}

// The splines of L elements: images and each element's own ladj. The parameters are overwritten. The options come by
// value: behind a reference they would be loaded again after every store, and the loops stay scalar.
template <Parametrization P, bool kInverse, int L, class T>
PYGEN_INLINE void spline(const T* value, T* parameters, const SplineBounds<L, T>& bounds, SplineOptions<T> options,
                         T* image, T* ladj) {
  FoundBins<L, T> found;
  find_bins<P, kInverse>(value, parameters, parameters, bounds, options, found);
  const T* u_first = parameters + 2 * options.bins * L;
  const T* low = kInverse ? bounds.bottom : bounds.left;
  const T* high = kInverse ? bounds.top : bounds.right;
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    const Bin<T> bin = bin_of<P>(found, l, bounds.tails[l], u_first[l], options);
    const Range<T> range{low[l], high[l], bounds.tails[l]};
    const SplineValue<T> point = bin_value<kInverse>(bin, value[l], range);
    image[l] = point.value;
    ladj[l] = point.ladj;
  }
}

// Rows 0 .. K-1 of the gradient of the unconstrained widths or heights, from those of the bin's low edge and size.
// gradients may be exps, and where the parametrization is softplus u as well.
template <Parametrization P, int L, class T>
PYGEN_INLINE void softmax_gradient(const T* u, const T* exps, const Axis<L, T>& axis, const T* index, const T* edge,
                                   const T* size, const SplineOptions<T>& options, T* gradients) {
  T mean[L];
  PYGEN_LANES
  for (int l = 0; l < L; ++l) mean[l] = (axis.before[l] * edge[l] + axis.own[l] * size[l]) / axis.total[l];
  for (int j = 0; j < options.bins; ++j) {
    const T position = static_cast<T>(j);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T share = pick(position < index[l], edge[l], pick(position == index[l], size[l], T(0)));
      T gradient = options.scale * axis.unit[l] * exps[j * L + l] * (share - mean[l]);
      if constexpr (P == Parametrization::kSoftclip) {
        gradient *= softclip_slope(options.scale * u[j * L + l], T(0.5) * options.sharpness);
      }
      gradients[j * L + l] = gradient;
    }
  }
}

// Gradients of `spline` at L elements. exps has room for 2 K rows and may be the first rows of gradients; with softplus
// both may be the parameters.
template <Parametrization P, bool kInverse, int L, class T>
PYGEN_INLINE void spline_gradient(const T* value, const T* parameters, const T* grad_output, const T* grad_ladj,
                                  const SplineBounds<L, T>& bounds, SplineOptions<T> options, T* exps, T* grad_input,
                                  T* gradients) {
  FoundBins<L, T> found;
  find_bins<P, kInverse>(value, parameters, exps, bounds, options, found);
  const int bins = options.bins, rows = bins * L;
  const T* u_first = parameters + 2 * rows;
  const T* low = kInverse ? bounds.bottom : bounds.left;
  const T* high = kInverse ? bounds.top : bounds.right;
  T left[L], width[L], bottom[L], height[L], slope0[L], slope1[L], row0[L], row1[L];
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    const T tails = bounds.tails[l], index = found.index[l];
    const Bin<T> bin = bin_of<P>(found, l, tails, u_first[l], options);
    const Range<T> range{low[l], high[l], bounds.tails[l]};
    const BinGradient<T> gradient = bin_gradient<kInverse>(bin, value[l], range, grad_output[l], grad_ladj[l]);
    grad_input[l] = gradient.input;
    left[l] = gradient.x;
    width[l] = gradient.width;
    bottom[l] = gradient.y;
    height[l] = gradient.height;
    const bool linear = tails == static_cast<T>(Tails::kLinear), circular = tails == static_cast<T>(Tails::kCircular);
    const bool last = index == static_cast<T>(bins - 1);
    slope0[l] = gradient.slope0 * slope_derivative<P>(found.u0[l], options);
    slope1[l] = gradient.slope1 * slope_derivative<P>(pick(last & circular, u_first[l], found.u1[l]), options);
    const T row = index - static_cast<T>(options.first_knot());
    row0[l] = linear & (index == T(0)) ? T(-1) : row;
    row1[l] = last & linear ? T(-1) : last & circular ? T(0) : row + T(1);
  }
  softmax_gradient<P, L>(parameters, exps, found.widths, found.index, left, width, options, gradients);
  softmax_gradient<P, L>(parameters + rows, exps + rows, found.heights, found.index, bottom, height, options,
                         gradients + rows);
  for (int j = 0; j < options.derivatives(); ++j) {
    const T row = static_cast<T>(j);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      gradients[2 * rows + j * L + l] = pick(row == row0[l], slope0[l], pick(row == row1[l], slope1[l], T(0)));
    }
  }
}

// Calls `f(Tag{})` with the parametrization as a constant, Tag::value.
template <Parametrization P>
struct ParametrizationTag {
  static constexpr Parametrization value = P;
};

template <class F>
PYGEN_INLINE void for_parametrization(int64_t parametrization, F&& f) {
  if (static_cast<Parametrization>(parametrization) == Parametrization::kSoftplus) {
    f(ParametrizationTag<Parametrization::kSoftplus>{});
  } else {
    f(ParametrizationTag<Parametrization::kSoftclip>{});
  }
}

}  // namespace pygen
