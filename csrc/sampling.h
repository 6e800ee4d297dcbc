// The weight of one logit, round(2^b exp((logit - peak) / temperature)), and the point u W of the inverse distribution.
//
// Weights are whole numbers whose sum over a row stays below 2^53, so that sums in float64 are exact: they come out the
// same in any order, on any number of threads or lanes, and thresholds and draws need no tolerance.
#pragma once

#include "philox.h"
#include "scalar.h"

namespace pygen::sampling {

// What happens to a row before the draw, in this order; each number at its default leaves the row as it is.
struct Filters {
  double guidance_scale = 1, repetition_penalty = 1, temperature = 1;
  int64_t top_k = int64_t{1} << 31;
  double top_p = 1, min_p = 0, typical_p = 1;
  bool split_ties = false;  // of the tokens at the edge of top-p, keep the last ones in index order, not all of them
};

// b: the sum of `vocabulary` weights of at most 2^b stays within 2^53; beyond 48 nothing is gained.
PYGEN_INLINE int weight_bits(int64_t vocabulary) {
  int bits = 53;
  for (; vocabulary > 0; vocabulary >>= 1) --bits;
  return bits < 48 ? bits : 48;
}

PYGEN_INLINE double power_of_two(int exponent) {
  double value = 1;
  for (; exponent > 0; --exponent) value *= 2;
  return value;
}

// To the nearest whole number, ties to even: adding 2^23 (2^52) leaves no room for a fraction.
PYGEN_INLINE float round_to_integer(float x) {
  constexpr float kWhole = 0x1p23f;
  return x < kWhole ? (x + kWhole) - kWhole : x;
}
PYGEN_INLINE double round_to_integer(double x) {
  constexpr double kWhole = 0x1p52;
  return x < kWhole ? (x + kWhole) - kWhole : x;
}

// Guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6; Sanchez et al. 2023, arXiv:2306.17806): scale 1 is the
// conditional score, 0 the unconditional one. What either excludes stays out, where inf - inf would be NaN.
template <class T>
PYGEN_INLINE T guide(T conditional, T unconditional, T scale) {
  constexpr T excluded = -std::numeric_limits<T>::infinity();
  const T score = unconditional + scale * (conditional - unconditional);
  return conditional == excluded || unconditional == excluded ? excluded : score;
}

// Keskar et al. 2019, arXiv:1909.05858, section 4.1, with the sign that makes every penalty above 1 lower the score.
template <class T>
PYGEN_INLINE T penalize(T score, T penalty) {
  return score < T(0) ? score * penalty : score / penalty;
}

// log-softmax, given the logarithm of the row's sum over e^peak.
template <class T>
PYGEN_INLINE T normalize(T logit, T peak, T log_total) {
  return (logit - peak) - log_total;
}

// A temperature that neither makes 0/0 of the peak itself nor inf * 0 of a logit of -inf.
template <class T>
PYGEN_INLINE T usable_temperature(double temperature) {
  constexpr double low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
  return static_cast<T>(temperature < low ? low : temperature > high ? high : temperature);
}

// How far below the peak a logit has min_p of its probability.
template <class T>
inline T min_p_margin(double temperature, double min_p) {
  constexpr double low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
  if (min_p <= 0) return -std::numeric_limits<T>::infinity();
  const double margin = (temperature < low ? low : temperature > high ? high : temperature) * std::log(min_p);
  return static_cast<T>(margin < -high ? -high : margin);
}

template <class T>
PYGEN_INLINE T weigh(T logit, T peak, T temperature, T scale) {
  return round_to_integer(scalar::exp((logit - peak) / temperature) * scale);
}

// A token's part of W E[peak - logit] / temperature, a whole number: these sums are exact too, since w d < 2^b.
template <class T>
PYGEN_INLINE double weighed_depth(T weight, T logit, T peak, T temperature) {
  const double depth = static_cast<double>((peak - logit) / temperature);
  return weight > T(0) ? round_to_integer(static_cast<double>(weight) * depth) : 0.0;
}

// How far a token's information -log p is from the entropy of its row, as the normalization cancels: |E[d] - d|.
// (Meister et al. 2022, arXiv:2202.00666, section 4)
template <class T>
PYGEN_INLINE T atypicality(T logit, T peak, T temperature, T mean_depth) {
  return scalar::abs((peak - logit) / temperature - mean_depth);
}

// The first cumulative weight above this is the token's. Whole numbers: only rounding up could make it the total
// itself.
PYGEN_INLINE double inverse_target(double u, double total) {
  const double target = total * u;
  return target < total ? target : total - 1;
}

// The number that a token is drawn with.
PYGEN_INLINE double uniform(int64_t seed, int64_t sample_id, int64_t position) {
  return philox_uniform53(static_cast<uint64_t>(seed), static_cast<uint64_t>(sample_id), NoiseStream::kToken,
                          static_cast<uint64_t>(position));
}

// log of a whole weight's sum, over e^peak.
PYGEN_INLINE double log_of_total(double total, int bits) { return scalar::log(total) - bits * 0.693147180559945309; }

// log of the token's share of the kept weight, in nats.
template <class T>
PYGEN_INLINE double log_share(T logit, T peak, T temperature, double total, int bits) {
  return static_cast<double>((logit - peak) / temperature) - log_of_total(total, bits);
}

}  // namespace pygen::sampling
