// The sampler's loops over a row on the CPU.
#pragma once

#include <algorithm>

#include "sampling.h"

namespace pygen::sampling {

// Each file that includes this has its own: their bits hang on the options that it is compiled with.
namespace {

constexpr int64_t kBin = 64;  // elements whose maximum is kept: a bin below the threshold is skipped whole

// Writes the maximum of each bin; returns whether the row has a NaN.
template <class T>
PYGEN_CLONES bool peak_rows(const T* x, int64_t n, T* peaks) {
  bool any = false;
  for (int64_t start = 0; start < n; start += kBin) {
    const int64_t count = std::min(kBin, n - start);
    T peak = -std::numeric_limits<T>::infinity();
    int32_t bad = 0;
#pragma omp simd reduction(max : peak) reduction(| : bad)
    for (int64_t i = 0; i < count; ++i) {
      const T value = x[start + i];
      peak = value > peak ? value : peak;
      bad |= value != value;
    }
    peaks[start / kBin] = peak;
    any |= bad != 0;
  }
  return any;
}

template <class T>
PYGEN_CLONES double weigh_rows(const T* __restrict x, int64_t n, T peak, T temperature, T scale, T* __restrict weight) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const T w = weigh(x[i], peak, temperature, scale);
    weight[i] = w;
    total += static_cast<double>(w);
  }
  return total;
}

template <class T>
PYGEN_CLONES void normalize_rows(T* x, int64_t n, T peak, T log_total) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = normalize(x[i], peak, log_total);
}

template <class T>
PYGEN_CLONES void guide_rows(const T* conditional, const T* unconditional, int64_t n, T scale, T* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = guide(conditional[i], unconditional[i], scale);
}

struct Sums {
  double above, from;  // the weight of x > high, and of x >= low
};

template <class T>
PYGEN_CLONES Sums bracket_rows(const T* x, const T* weight, int64_t n, T low, T high) {
  double above = 0, from = 0;
#pragma omp simd reduction(+ : above, from)
  for (int64_t i = 0; i < n; ++i) {
    above += static_cast<double>(x[i] > high ? weight[i] : T(0));
    from += static_cast<double>(x[i] >= low ? weight[i] : T(0));
  }
  return {above, from};
}

template <class T>
PYGEN_CLONES double kept_rows(const T* x, const T* weight, int64_t n, T threshold) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(x[i] >= threshold ? weight[i] : T(0));
  return total;
}

// The sum of the weighed depths of what is kept; the weight of the rest becomes zero.
template <class T>
PYGEN_CLONES double depth_rows(const T* __restrict x, int64_t n, T threshold, T peak, T temperature,
                               T* __restrict weight) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const T w = x[i] >= threshold ? weight[i] : T(0);
    weight[i] = w;
    total += weighed_depth(w, x[i], peak, temperature);
  }
  return total;
}

template <class T>
PYGEN_CLONES void typicality_rows(const T* __restrict x, const T* __restrict weight, int64_t n, T peak, T temperature,
                                  T mean_depth, T* __restrict key) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T typicality = -atypicality(x[i], peak, temperature, mean_depth);
    key[i] = weight[i] > T(0) ? typicality : -std::numeric_limits<T>::infinity();
  }
}

enum class Part { kAbove, kBelow, kBetween };

// The elements above `high`, below `low`, or in [low, high]; `to` may be `x` itself, and to_weight `weight`.
template <Part P, class T>
int64_t gather_rows(const T* x, const T* weight, int64_t n, T low, T high, T* to, T* to_weight) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T value = x[i];
    to[count] = value;
    to_weight[count] = weight[i];
    if constexpr (P == Part::kAbove) count += value > high;
    if constexpr (P == Part::kBelow) count += value < low;
    if constexpr (P == Part::kBetween) count += (value >= low) & (value <= high);
  }
  return count;
}

}  // namespace
}  // namespace pygen::sampling
