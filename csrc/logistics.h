// One pixel of the discretized mixture of logistics (Salimans et al. 2017, PixelCNN++, arXiv:1701.05517,
// section 2.1-2.2):
//
//   P(x) = sum_k pi_k prod_c P_kc,  P_kc = sigmoid(a) - sigmoid(b),  a, b = (x_c - m_kc +- h) e^{-s_kc},  h = 1 /
//   (levels - 1),
//
// where the lowest level reaches down to -inf (b) and the highest up to inf (a), and the means depend on the colours
// before: m_k1 = mu_k1 + tanh(c_k0) x_0, m_k2 = mu_k2 + tanh(c_k1) x_0 + tanh(c_k2) x_1. As sigmoid(a) - sigmoid(b) =
// sigmoid(a) sigmoid(-b) (1 - e^{b-a}), the logarithm needs no difference and is exact in both tails.
#pragma once

#include "philox.h"
#include "scalar.h"

namespace pygen::logistics {

constexpr int kMaxMixtures = 128;

// Log scales are cut off here: below as in PixelCNN++, above where a logistic is flat across all levels, and before the
// product of three probabilities leaves float's range.
constexpr double kLowestLogScale = -7, kHighestLogScale = 12;

// Values of a pixel's parameters: [M logits | for each colour M means, M log scales and, of three colours, M
// coefficients].
PYGEN_INLINE constexpr int64_t parameter_count(int colours, int64_t mixtures) {
  return mixtures * (colours == 3 ? 10 : 3);
}

// Where a colour's means begin; log scales follow, then coefficients.
PYGEN_INLINE constexpr int64_t colour_offset(int colours, int64_t mixtures, int colour) {
  return mixtures * (1 + (colours == 3 ? 3 : 2) * colour);
}

template <class T>
PYGEN_INLINE T bounded_log_scale(T log_scale) {
  return scalar::at_least(scalar::at_most(log_scale, T(kHighestLogScale)), T(kLowestLogScale));
}

// e^x and e^x - 1, each to rounding, for x in [-87, 88], where 2^n is one normal number: as scalar::exp, without the
// care that it takes outside.
template <class T>
struct Exponentials {
  T whole, minus_one;
};
PYGEN_INLINE Exponentials<float> exponentials(float x) {
  const scalar::PowerOfE power = scalar::power_of_e(x);
  const float scale = scalar::power_of_2(power.n);
  return {scale * power.rest + scale, scale * power.rest + (scale - 1.0f)};
}
PYGEN_INLINE Exponentials<double> exponentials(double x) { return {::exp(x), ::expm1(x)}; }

PYGEN_INLINE float normal_exp(float x) { return exponentials(x).whole; }
PYGEN_INLINE double normal_exp(double x) { return ::exp(x); }

// tanh x = (1 - e^{-2|x|}) / (1 + e^{-2|x|}) with the sign of x, of the coefficients.
template <class T>
PYGEN_INLINE T squash(T x) {
  const T e = exponentials(T(-2) * scalar::at_most(scalar::abs(x), T(43))).minus_one;
  return scalar::with_sign_of(-e / (T(2) + e), x);
}

// log P_kc = far + log(near), and its derivatives by the mean and by the log scale.
template <class T>
struct Interval {
  T far, near, by_mean, by_log_scale;
};

// With E = e^{-|z|} of the end z that is nearer to the mean and q = e^{-(a-b)}, sigmoid(|z|) = 1 / (1 + E), and that of
// the other end is 1 / (1 + E q), or E / (E + q) where the mean lies between the two. One function for value and
// derivatives, because a struct that is handed on keeps loops from vectorising; these are zero without kGradient.
template <bool kGradient, class T>
PYGEN_INLINE Interval<T> interval(T x, T mean, T log_scale, T half) {
  using scalar::pick;
  constexpr T kFar = T(1e30);  // an infinite end
  const T inverse_scale = normal_exp(-bounded_log_scale(log_scale)), centre = x - mean;
  const bool lowest = x<half - T(1), highest = x> T(1) - half;
  const T upper = (centre + half) * inverse_scale, lower = (centre - half) * inverse_scale;
  const T a = pick(highest, kFar, upper), b = pick(lowest, -kFar, lower);
  const bool end = lowest | highest;
  const T width = T(2) * half * inverse_scale, inner_width = pick(end, T(87), width);
  const Exponentials<T> of_width = exponentials(-scalar::at_most(inner_width, T(87)));
  const T mass = -of_width.minus_one, q = pick(end, T(0), of_width.whole);  // 1 - e^{-(a-b)} and e^{-(a-b)}
  const bool a_is_nearer = scalar::abs(a) < scalar::abs(b), between = (a > T(0)) & (b < T(0));
  // Cut off where E is nothing beside 1, and q nothing beside it.
  const T nearer = scalar::at_most(scalar::abs(a), scalar::abs(b));
  const T decay_nearer = normal_exp(-scalar::at_most(nearer, T(30)));
  const T s = pick(between, decay_nearer, T(1)), t = pick(between, q, decay_nearer * q);
  const T one_nearer = T(1) + decay_nearer, one_other = s + t;
  const T far = scalar::at_most(a, T(0)) + scalar::at_most(-b, T(0));
  if constexpr (!kGradient) return {far, mass * s / (one_nearer * one_other), T(0), T(0)};
  const T inverse = T(1) / (one_nearer * one_other * mass);
  const T of_nearer = s * (one_other * mass * inverse), other = one_nearer * mass * inverse, of_other = t * other;
  const T above_a = pick(a_is_nearer, of_nearer, of_other);  // sigmoid(-a)
  const T below_b = pick(a_is_nearer, of_other, of_nearer);  // sigmoid(b)
  const T stretch = inner_width * (q * (inverse * (one_nearer * one_other)));
  const bool inside = (log_scale >= T(kLowestLogScale)) & (log_scale <= T(kHighestLogScale));
  const T by_log_scale = (below_b * b - above_a * a) - stretch;
  return {far, mass * of_nearer * other, inverse_scale * (below_b - above_a), pick(inside, by_log_scale, T(0))};
}

// Components are taken in groups of this many, the widest vectors of float, the last group filled up with components of
// no weight.
constexpr int kGroup = 16;

PYGEN_INLINE constexpr int padded(int mixtures) { return (mixtures + kGroup - 1) / kGroup * kGroup; }

// The parameters of one pixel.
template <class Stored, class T>
struct Pixel {
  const Stored* data;
  int64_t stride;
  int mixtures, colours;

  PYGEN_INLINE T at(int64_t i) const { return static_cast<T>(data[i * stride]); }
  PYGEN_INLINE T logit(int k) const { return at(k); }
  PYGEN_INLINE T mean(int c, int k) const { return at(colour_offset(colours, mixtures, c) + k); }
  PYGEN_INLINE T log_scale(int c, int k) const { return at(colour_offset(colours, mixtures, c) + mixtures + k); }
  PYGEN_INLINE T coefficient(int i, int k) const {
    return at(colour_offset(colours, mixtures, i) + 2 * mixtures + k);  // but for its tanh
  }
};

// The mean of a component moved by an earlier colour.
template <class T>
PYGEN_INLINE T moved(T mean, T coefficient, T x) {
  return mean + squash(coefficient) * x;
}

// A logistic number by the inverse of its distribution; the float logarithms are the same on every machine, and 53 bits
// of v reach far into both tails.
template <class T>
PYGEN_INLINE T standard_logistic(double v) {
  return scalar::log(static_cast<T>(v)) - scalar::log(static_cast<T>(1.0 - v));
}

// The nearest level, as a value in [-1, 1]. NaN stays NaN.
template <class T>
PYGEN_INLINE T to_level(T value, int levels) {
  const T bounded = scalar::at_least(scalar::at_most(value, T(1)), T(-1));
  const T level = std::rint((bounded + T(1)) * T(0.5 * (levels - 1)));
  return level * T(2.0 / (levels - 1)) - T(1);
}

// Leaves e^{joint - peak} in weight and returns their sum, taken in order, so that it is the same on every machine.
template <class T>
PYGEN_INLINE T weigh_components(const T* __restrict joint, int count, T* __restrict peak, T* __restrict weight) {
  T top = joint[0], total = 0;
  for (int k = 1; k < count; ++k) top = joint[k] > top || joint[k] != joint[k] ? joint[k] : top;
  PYGEN_LANES
  for (int k = 0; k < count; ++k) weight[k] = scalar::exp(joint[k] - top);
  for (int k = 0; k < count; ++k) total += weight[k];
  *peak = top;
  return total;
}

// Arrays of padded(mixtures) numbers that a draw needs.
constexpr int kDrawArrays = 5;

// Draws the colours of a pixel in turn, each given those before: the component by the posterior weights, then the
// value. Colour c is drawn from the two numbers of the token stream at (seed, sample_id, position + c), so that drawing
// a pixel and drawing its colours one by one are the same. known: which of x are given, or null; log_prob: of each
// colour, given or drawn, in nats. Bits are the same on every machine where a * b + c is not contracted.
template <class Stored, class T>
PYGEN_INLINE void draw_pixel(const Pixel<Stored, T>& pixel, int levels, uint64_t seed, uint64_t sample_id,
                             uint64_t position, const bool* known, T* x, T* log_prob, T* scratch) {
  const int mixtures = pixel.mixtures, count = padded(mixtures);
  const T half = T(1.0 / (levels - 1));
  T* __restrict const joint = scratch;
  T* __restrict const weight = joint + count;
  T* __restrict const mean = weight + count;
  T* __restrict const log_scale = mean + count;
  T* __restrict const coefficient = log_scale + count;
  for (int k = 0; k < count; ++k) {
    joint[k] = k < mixtures ? pixel.logit(k) : -std::numeric_limits<T>::infinity();
    mean[k] = log_scale[k] = coefficient[k] = T(0);
  }
  T peak, total = weigh_components(joint, count, &peak, weight), before = peak + scalar::log(total);
  for (int c = 0; c < pixel.colours; ++c) {
    for (int k = 0; k < mixtures; ++k) mean[k] = pixel.mean(c, k);
    for (int k = 0; k < mixtures; ++k) log_scale[k] = pixel.log_scale(c, k);
    for (int earlier = 0; earlier < c; ++earlier) {  // green by red; blue by red, then by green
      for (int k = 0; k < mixtures; ++k) coefficient[k] = pixel.coefficient(c + earlier - 1, k);
      const T value = x[earlier];
      PYGEN_LANES
      for (int k = 0; k < count; ++k) mean[k] = moved(mean[k], coefficient[k], value);
    }
    if (!known || !known[c]) {
      const PhiloxWords words = philox(seed, sample_id, NoiseStream::kToken, position + static_cast<uint64_t>(c), 0);
      const T target = static_cast<T>(uniform53_of_words(words.w0, words.w1)) * total;
      // The last component that has any weight, should rounding leave the target above their sum.
      int chosen = 0;
      T passed = 0;
      for (int k = 0; k < mixtures && !(passed > target); ++k) {
        if (weight[k] > T(0)) chosen = k;
        passed += weight[k];
      }
      const T noise = standard_logistic<T>(uniform53_of_words(words.w2, words.w3));
      const T scale = scalar::exp(bounded_log_scale(log_scale[chosen]));
      x[c] = before == before ? to_level(mean[chosen] + scale * noise, levels) : before;
    }
    const T value = x[c];
    PYGEN_LANES
    for (int k = 0; k < count; ++k) {
      const Interval<T> at = interval<false>(value, mean[k], log_scale[k], half);
      joint[k] += at.far + scalar::log(at.near);
    }
    total = weigh_components(joint, count, &peak, weight);
    const T after = peak + scalar::log(total);
    log_prob[c] = after - before;
    before = after;
  }
}

}  // namespace pygen::logistics
