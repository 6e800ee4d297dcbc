// The inner loops of cached attention on the CPU: some query rows against one split of the keys.
//
// Written in GCC's vector types, as wide as the registers of each instruction set: left to itself GCC keeps neither
// 16 sums in registers nor adds up a register in fewer than a dozen steps.
#pragma once

#include "cache.h"
#include "tensor.h"

namespace pygen {

constexpr int64_t kTile = 32;      // keys converted at a time, so that they stay in the first-level cache
constexpr int64_t kTileRows = 16;  // query rows that share one reading of the keys

// Query rows (scaled) against keys begin .. end - 1, of which row r may see the first seen[r].
template <class Compute, class Stored>
struct Split {
  const Compute* query;  // (rows, width)
  const Stored *keys, *values;
  int64_t key_stride, value_stride;
  int64_t rows, width, begin, end;
  const int64_t* seen;
  Compute *peak, *sum, *accumulator;  // (rows,), (rows,), (rows, width): written
  Compute* buffer;                    // (kTile, width)
};

template <class T, int kBytes>
struct Lanes {
  typedef T type __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};

template <class T, int kBytes>
PYGEN_INLINE T sum_of(const typename Lanes<T, kBytes>::type& lanes) {
  if constexpr (kBytes > 16) {
    typename Lanes<T, kBytes / 2>::type halves[2];
    memcpy(halves, &lanes, kBytes);
    const typename Lanes<T, kBytes / 2>::type sum = halves[0] + halves[1];
    return sum_of<T, kBytes / 2>(sum);
  } else {
    T sum = lanes[0];
    for (int i = 1; i < kBytes / static_cast<int>(sizeof(T)); ++i) sum += lanes[i];
    return sum;
  }
}

// Scores of kRows rows against keys from .. to - 1, kKeys at a time: each load of a row or a key serves several.
template <int kBytes, int kRows, int kKeys, class T>
PYGEN_INLINE void score(const T* rows, const T* keys, int64_t stride, int64_t width, int64_t from, int64_t to,
                        T (*scores)[kTile]) {
  using V = typename Lanes<T, kBytes>::type;
  constexpr int kLanes = kBytes / sizeof(T);
  for (int64_t j = from; j < to; j += kKeys) {
    V sums[kRows][kKeys] = {};
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      V key[kKeys];
#pragma GCC unroll 4
      for (int k = 0; k < kKeys; ++k) key[k] = *reinterpret_cast<const V*>(keys + (j + k) * stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V row = *reinterpret_cast<const V*>(rows + r * width + d);
#pragma GCC unroll 4
        for (int k = 0; k < kKeys; ++k) sums[r][k] += row * key[k];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int k = 0; k < kKeys; ++k) {
        T sum = sum_of<T, kBytes>(sums[r][k]);
        for (int64_t rest = d; rest < width; ++rest) sum += rows[r * width + rest] * keys[(j + k) * stride + rest];
        scores[r][j + k] = sum;
      }
    }
  }
}

// Adds values from .. to - 1, each by its weight, to the accumulators of kRows rows.
template <int kBytes, int kRows, class T>
PYGEN_INLINE void add(const T (*weights)[kTile], const T* values, int64_t stride, int64_t width, int64_t from,
                      int64_t to, T* accumulator) {
  using V = typename Lanes<T, kBytes>::type;
  constexpr int kLanes = kBytes / sizeof(T);
  if (from >= to) return;
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    V sums[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r] = *reinterpret_cast<const V*>(accumulator + r * width + d);
    for (int64_t j = from; j < to; ++j) {
      const V value = *reinterpret_cast<const V*>(values + j * stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r] += weights[r][j] * value;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) *reinterpret_cast<V*>(accumulator + r * width + d) = sums[r];
  }
  for (; d < width; ++d) {
    for (int r = 0; r < kRows; ++r) {
      for (int64_t j = from; j < to; ++j) accumulator[r * width + d] += weights[r][j] * values[j * stride + d];
    }
  }
}

PYGEN_INLINE float widen(BFloat16 x) { return scalar::float_of_bfloat16(x.x); }
PYGEN_INLINE float widen(Half x) { return scalar::float_of_half(x.x); }

template <class Compute, class Stored>
PYGEN_INLINE const Compute* widen_tile(const Stored* rows, int64_t stride, int64_t n, int64_t width, Compute* buffer,
                                       int64_t* out_stride) {
  if constexpr (std::is_same_v<Compute, Stored>) {
    *out_stride = stride;
    return rows;
  } else {
    for (int64_t j = 0; j < n; ++j) {
      const Stored* from = rows + j * stride;
      Compute* to = buffer + j * width;
      for (int64_t d = 0; d < width; ++d) to[d] = widen(from[d]);
    }
    *out_stride = width;
    return buffer;
  }
}

template <int kBytes, class Compute, class Stored>
PYGEN_INLINE void attend_rows_by(const Split<Compute, Stored>& x) {
  constexpr int64_t kRows = 4, kKeys = 4;
  const int64_t width = x.width;
  for (int64_t r = 0; r < x.rows; ++r) {
    x.peak[r] = cache::kNothing<Compute>;
    x.sum[r] = 0;
    for (int64_t d = 0; d < width; ++d) x.accumulator[r * width + d] = 0;
  }
  Compute scores[kTileRows][kTile];
  for (int64_t tile = x.begin; tile < x.end; tile += kTile) {
    const int64_t n = std::min(kTile, x.end - tile);
    int64_t visible[kTileRows];
    for (int64_t r = 0; r < x.rows; ++r) visible[r] = std::max<int64_t>(0, std::min(n, x.seen[r] - tile));
    int64_t stride;
    const Compute* keys = widen_tile(x.keys + tile * x.key_stride, x.key_stride, n, width, x.buffer, &stride);
    for (int64_t first = 0; first < x.rows; first += kRows) {
      const int64_t end = std::min(first + kRows, x.rows);
      int64_t shared = 0;  // keys that four rows meet together
      if (end - first == kRows) shared = *std::min_element(visible + first, visible + end) / kKeys * kKeys;
      score<kBytes, kRows, kKeys>(x.query + first * width, keys, stride, width, 0, shared, scores + first);
      for (int64_t r = first; r < end; ++r) {
        const int64_t whole = visible[r] / kKeys * kKeys;
        score<kBytes, 1, kKeys>(x.query + r * width, keys, stride, width, shared, whole, scores + r);
        score<kBytes, 1, 1>(x.query + r * width, keys, stride, width, whole, visible[r], scores + r);
      }
    }
    for (int64_t r = 0; r < x.rows; ++r) {
      if (visible[r] == 0) continue;
      Compute* s = scores[r];
      for (int64_t j = visible[r]; j < kTile; ++j) s[j] = cache::kNothing<Compute>;
      Compute peak = x.peak[r];
      for (int64_t j = 0; j < kTile; ++j) peak = cache::higher(s[j], peak);
      Compute weight = 0;
      for (int64_t j = 0; j < kTile; ++j) s[j] = scalar::exp(s[j] - peak);
#pragma omp simd reduction(+ : weight)
      for (int64_t j = 0; j < kTile; ++j) weight += s[j];
      const Compute shrink = cache::shrinkage(x.peak[r], peak);
      x.sum[r] = x.sum[r] * shrink + weight;
      x.peak[r] = peak;
      if (shrink != 1) {
        for (int64_t d = 0; d < width; ++d) x.accumulator[r * width + d] *= shrink;
      }
    }
    const Compute* values = widen_tile(x.values + tile * x.value_stride, x.value_stride, n, width, x.buffer, &stride);
    for (int64_t first = 0; first < x.rows; first += kRows) {
      const int64_t end = std::min(first + kRows, x.rows);
      const int64_t shared = end - first == kRows ? *std::min_element(visible + first, visible + end) : 0;
      add<kBytes, kRows>(scores + first, values, stride, width, 0, shared, x.accumulator + first * width);
      for (int64_t r = first; r < end; ++r) {
        // Not by a weight of zero: what a row may not see can be infinite.
        add<kBytes, 1>(scores + r, values, stride, width, shared, visible[r], x.accumulator + r * width);
      }
    }
  }
}

// target_clones would give all instruction sets the same vector type; here each has a function of its own.
#if PYGEN_X86_LEVELS
template <class Compute, class Stored>
__attribute__((target("arch=x86-64-v4"))) void attend_rows_v4(const Split<Compute, Stored>& x) {
  attend_rows_by<64>(x);
}

template <class Compute, class Stored>
__attribute__((target("arch=x86-64-v3"))) void attend_rows_v3(const Split<Compute, Stored>& x) {
  attend_rows_by<32>(x);
}
#endif

template <class Compute, class Stored>
void attend_rows(const Split<Compute, Stored>& x) {
#if PYGEN_X86_LEVELS
  static const int level = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
  if (level == 4) return attend_rows_v4(x);
  if (level == 3) return attend_rows_v3(x);
#endif
  attend_rows_by<16>(x);
}

}  // namespace pygen
