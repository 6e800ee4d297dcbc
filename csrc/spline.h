// Monotone rational-quadratic splines from their unconstrained parameters: softmax of widths and heights, the bin that
// a value is in, and gradients back to the parameters. What happens in the bin is in spline_bin.h.
//
// A group of L elements is taken together, "row j" of it being L neighbouring numbers, one an element: the CPU's vector
// lanes. A CUDA thread, or a sweep that goes element by element, is a group of one, whose rows are its parameters as
// they lie packed: K widths, K heights, derivatives.
#pragma once

#include "spline_bin.h"

namespace pygen {

constexpr int kMinBins = 2, kMaxBins = 128;

// In the order of PARAMETRIZATIONS in pygen/ops/spline_reference.py.
enum class Parametrization : int64_t {
  kSoftplus,  // shares least + (1 - least K) softmax(u), slopes least + softplus(beta u) / beta (nflows, normflows)
  kSoftclip   // shares softmax(u / (1 + |2 u / limit|)), slopes exp(u / (1 + |u / limit|)) (zuko)
};

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
      axis.before[l] = scalar::pick(past, sum[l], axis.before[l]);
      axis.own[l] = scalar::pick(past, exps[k * L + l], axis.own[l]);
      axis.after[l] += scalar::pick(past, T(0), exps[k * L + l]);
      other.before[l] = scalar::pick(past, other_sum[l], other.before[l]);
      other.own[l] = scalar::pick(past, other_exps[k * L + l], other.own[l]);
      other.after[l] += scalar::pick(past, T(0), other_exps[k * L + l]);
      found.index[l] = scalar::pick(past, index, found.index[l]);
      found.u0[l] = scalar::pick(past, start[l], found.u0[l]);
      found.u1[l] = scalar::pick(past, end[l], found.u1[l]);
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
  const T slope1 = slope_of<P>(scalar::pick(last & circular, u_first, found.u1[l]), options);
  return {x.start_of_bin(l, index, options.bins),
          x.size_of_bin(l),
          y.start_of_bin(l, index, options.bins),
          y.size_of_bin(l),
          scalar::pick(linear & (index == T(0)), options.boundary_slope, slope0),
          scalar::pick(linear & last, options.boundary_slope, slope1)};
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
      const T share = scalar::pick(position < index[l], edge[l], scalar::pick(position == index[l], size[l], T(0)));
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
    slope1[l] = gradient.slope1 * slope_derivative<P>(scalar::pick(last & circular, u_first[l], found.u1[l]), options);
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
      gradients[2 * rows + j * L + l] =
          scalar::pick(row == row0[l], slope0[l], scalar::pick(row == row1[l], slope1[l], T(0)));
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
