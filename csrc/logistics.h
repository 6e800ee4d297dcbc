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

// Log scales are cut off here: below as in PixelCNN++, above where a logistic is flat across all levels.
constexpr double kLowestLogScale = -7, kHighestLogScale = 30;

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

// 1 - e^{-d} for d >= 0, to rounding however small d is.
PYGEN_INLINE float mass_within(float d) {
  float p = 1.98412698e-4f;
  p = 1.38888889e-3f - p * d;
  p = 8.33333333e-3f - p * d;
  p = 4.16666667e-2f - p * d;
  p = 1.66666667e-1f - p * d;
  p = 0.5f - p * d;
  const float small = d - d * d * p, large = 1.0f - scalar::exp(-d);
  return scalar::pick(d < 0.5f, small, large);
}
PYGEN_INLINE double mass_within(double d) { return -::expm1(-d); }

// log P_kc, and its derivatives by the mean and by the log scale.
template <class T>
struct Interval {
  T log_prob, by_mean, by_log_scale;
};

// One function for both: a struct that is handed on keeps loops from vectorising. The derivatives are zero without
// kGradient.
template <bool kGradient, class T>
PYGEN_INLINE Interval<T> interval(T x, T mean, T log_scale, T half) {
  using scalar::pick;
  const T inverse_scale = scalar::exp(-bounded_log_scale(log_scale)), centre = x - mean;
  const T a = (centre + half) * inverse_scale, b = (centre - half) * inverse_scale;
  const T width = T(2) * half * inverse_scale;
  const bool lowest = x<half - T(1), highest = x> T(1) - half;
  const T decay_a = pick(highest, T(0), scalar::exp(-scalar::abs(a)));
  const T decay_b = pick(lowest, T(0), scalar::exp(-scalar::abs(b)));
  const T mass = pick(lowest | highest, T(1), mass_within(width));
  const T upper = pick(highest, T(0), scalar::at_most(a, T(0)));
  const T lower = pick(lowest, T(0), scalar::at_most(-b, T(0)));
  T by_mean = 0, by_log_scale = 0, log_prob;
  if constexpr (kGradient) {
    const T near_a = T(1) / (T(1) + decay_a), near_b = T(1) / (T(1) + decay_b);
    const T above_a = pick(a < T(0), near_a, decay_a * near_a);  // sigmoid(-a)
    const T below_b = pick(b < T(0), decay_b * near_b, near_b);  // sigmoid(b)
    const T from_a = pick(highest, T(0), above_a), from_b = pick(lowest, T(0), below_b);
    const T between = width * ((T(1) - mass) / mass);  // zero at the ends
    const bool inside = (log_scale >= T(kLowestLogScale)) & (log_scale <= T(kHighestLogScale));
    by_mean = inverse_scale * (from_b - from_a);
    by_log_scale = pick(inside, (from_b * b - from_a * a) - between, T(0));
  }
  log_prob = (upper + lower) + scalar::log(mass / ((T(1) + decay_a) * (T(1) + decay_b)));
  return {log_prob, by_mean, by_log_scale};
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
  return mean + scalar::tanh(coefficient) * x;
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
    for (int k = 0; k < count; ++k) joint[k] += interval<false>(value, mean[k], log_scale[k], half).log_prob;
    total = weigh_components(joint, count, &peak, weight);
    const T after = peak + scalar::log(total);
    log_prob[c] = after - before;
    before = after;
  }
}

}  // namespace pygen::logistics
