// The weight of one logit, round(2^b exp((logit - peak) / temperature)), and the point u W of the inverse distribution.
//
// Weights are whole numbers whose sum over a row stays below 2^53, so that sums in float64 are exact: they come out the
// same in any order, on any number of threads or lanes, and thresholds and draws need no tolerance.
#pragma once

#include "philox.h"
#include "scalar.h"

namespace pygen::sampling {

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

// A temperature that neither makes 0/0 of the peak itself nor inf * 0 of a logit of -inf.
template <class T>
PYGEN_INLINE T usable_temperature(double temperature) {
  constexpr double low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
  return static_cast<T>(temperature < low ? low : temperature > high ? high : temperature);
}

template <class T>
PYGEN_INLINE T weigh(T logit, T peak, T temperature, T scale) {
  return round_to_integer(scalar::exp((logit - peak) / temperature) * scale);
}

// The first cumulative weight above this is the token's. Whole numbers: only rounding up could make it the total
// itself.
PYGEN_INLINE double draw_target(int64_t seed, int64_t sample_id, int64_t position, double total) {
  const double target = total * philox_uniform53(static_cast<uint64_t>(seed), static_cast<uint64_t>(sample_id),
                                                 NoiseStream::kToken, static_cast<uint64_t>(position));
  return target < total ? target : total - 1;
}

// log of the token's share of the kept weight, in nats.
template <class T>
PYGEN_INLINE double log_share(T logit, T peak, T temperature, double total, int bits) {
  return static_cast<double>((logit - peak) / temperature) - (scalar::log(total) - bits * 0.693147180559945309);
}

}  // namespace pygen::sampling
