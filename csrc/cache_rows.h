// The inner loops of cached attention on the CPU: some query rows against one split of the keys.
//
// Written in GCC's vector types, as wide as the registers of each instruction set: left to itself GCC keeps neither
// 16 sums in registers nor adds up a register in fewer than a dozen steps.
#pragma once

#include <bit>

#include "cache.h"
#include "tensor.h"

namespace pygen {

constexpr int64_t kTile = 32;      // keys taken at a time: the bits of a word, and few enough for the first-level cache
constexpr int64_t kTileRows = 16;  // query rows that share one reading of the keys
constexpr int64_t kRowsTogether = 4;

// Rows of the cache that are read next, of which the loops ask for a piece at each step: pages lie anywhere, and no
// prefetcher of the machine goes from keys to values and back. A burst of requests would wait for itself.
template <class T>
constexpr const T* const* kNoRows = nullptr;

// Query rows (scaled) against the keys at positions begin .. end - 1, of which row r sees first[r] .. last[r] - 1 as
// far as the mask lets it.
template <class Compute, class Stored>
struct Split {
  const Compute* query;  // (rows, width)
  cache::Places<Stored> keys, values;
  cache::Places<float> key_scales, value_scales;  // where Stored is scaled
  cache::Mask mask;
  int64_t rows, width, begin, end;
  const int64_t *first, *last, *mask_rows;
  Compute *peak, *sum, *accumulator;  // (rows,), (rows,), (rows, width): written
  Compute* buffer;                    // (kTile, width)
};

template <class T, int kBytes>
struct Lanes {
  typedef T type __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};

// The sums of the lanes of kCount registers; of four floats together, because most of the work is to move lanes.
template <class T, int kBytes, int kCount>
PYGEN_INLINE void sum_lanes(const typename Lanes<T, kBytes>::type* lanes, T* sums) {
  if constexpr (kBytes > 16) {
    typename Lanes<T, kBytes / 2>::type folded[kCount];
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      typename Lanes<T, kBytes / 2>::type halves[2];
      memcpy(halves, &lanes[k], kBytes);
      folded[k] = halves[0] + halves[1];
    }
    sum_lanes<T, kBytes / 2, kCount>(folded, sums);
  } else if constexpr (kCount == 4 && sizeof(T) == 4) {
    using V = typename Lanes<T, 16>::type;
    const V first = __builtin_shufflevector(lanes[0], lanes[1], 0, 4, 1, 5) +
                    __builtin_shufflevector(lanes[0], lanes[1], 2, 6, 3, 7);
    const V second = __builtin_shufflevector(lanes[2], lanes[3], 0, 4, 1, 5) +
                     __builtin_shufflevector(lanes[2], lanes[3], 2, 6, 3, 7);
    const V all =
        __builtin_shufflevector(first, second, 0, 1, 4, 5) + __builtin_shufflevector(first, second, 2, 3, 6, 7);
    memcpy(sums, &all, sizeof all);
  } else {
    for (int k = 0; k < kCount; ++k) {
      sums[k] = lanes[k][0];
      for (int i = 1; i < kBytes / static_cast<int>(sizeof(T)); ++i) sums[k] += lanes[k][i];
    }
  }
}

PYGEN_INLINE float widen(float x) { return x; }
PYGEN_INLINE double widen(double x) { return x; }
PYGEN_INLINE float widen(BFloat16 x) { return scalar::float_of_bfloat16(x.x); }
PYGEN_INLINE float widen(Half x) { return scalar::float_of_half(x.x); }
PYGEN_INLINE float widen(int8_t x) { return cache::decode(x); }
// 1/256 of it, which is what its bits are as a half; the scales make up for it.
PYGEN_INLINE float widen(cache::Float8 x) { return cache::decode(x) * 0x1p-8f; }

template <class Stored>
constexpr float kUnit = std::is_same_v<Stored, cache::Float8> ? 256.0f : 1.0f;

// Conversions that are one instruction each. GCC makes dozens of those that it is asked for in its vector types, and
// its own names for the instructions are not known to a function of no level.
#if PYGEN_X86_LEVELS
#define PYGEN_CONVERT(name, instruction)                \
  template <class To, class From>                       \
  PYGEN_INLINE To name(const From& from) {              \
    To to;                                              \
    asm(instruction " %1, %0" : "=v"(to) : "vm"(from)); \
    return to;                                          \
  }
PYGEN_CONVERT(words_of_bytes, "vpmovsxbd")
PYGEN_CONVERT(halves_of_bytes, "vpmovsxbw")
PYGEN_CONVERT(floats_of_halves, "vcvtph2ps")
#undef PYGEN_CONVERT
#endif

// As many stored numbers as a register has lanes of Compute: what `widen` does, for all of them.
template <class Compute, int kBytes, class Stored>
PYGEN_INLINE typename Lanes<Compute, kBytes>::type load_lanes(const Stored* from) {
  using V = typename Lanes<Compute, kBytes>::type;
  using Words = typename Lanes<uint32_t, kBytes>::type;
  if constexpr (std::is_same_v<Compute, Stored>) {
    return *reinterpret_cast<const V*>(from);
  } else if constexpr (std::is_same_v<Stored, BFloat16>) {
    const auto halves = *reinterpret_cast<const typename Lanes<uint16_t, kBytes / 2>::type*>(from);
    return (V)(__builtin_convertvector(halves, Words) << 16);
#if PYGEN_X86_LEVELS
  } else if constexpr (kBytes > 16 && std::is_same_v<Stored, Half>) {
    return floats_of_halves<V>(*reinterpret_cast<const typename Lanes<int16_t, kBytes / 2>::type*>(from));
  } else if constexpr (kBytes > 16 && cache::kScaled<Stored>) {
    const auto& codes = *reinterpret_cast<const typename Lanes<int8_t, kBytes / 4>::type*>(from);
    if constexpr (std::is_same_v<Stored, int8_t>) {
      return __builtin_convertvector((words_of_bytes<typename Lanes<int32_t, kBytes>::type>(codes)), V);
    } else {
      // Sign, exponent and mantissa to where a half has them, whose exponent has a bias that is larger by 8.
      using Halves = typename Lanes<int16_t, kBytes / 2>::type;
      const Halves bits = (halves_of_bytes<Halves>(codes) << 7) & static_cast<int16_t>(0xbfff);
      return floats_of_halves<V>(bits);
    }
#endif
  } else {
    V wide;
    for (int i = 0; i < kBytes / static_cast<int>(sizeof(Compute)); ++i) wide[i] = widen(from[i]);
    return wide;
  }
}

// Scores of kRows rows against keys from .. to - 1, kKeys at a time: each load of a row or a key serves several.
template <int kBytes, int kRows, int kKeys, class T, class Stored>
PYGEN_INLINE void score(const T* rows, const Stored* const* keys, int64_t width, int64_t from, int64_t to,
                        T (*scores)[kTile], const Stored* const* ahead) {
  using V = typename Lanes<T, kBytes>::type;
  constexpr int kLanes = kBytes / sizeof(T);
  for (int64_t j = from; j < to; j += kKeys) {
    V sums[kRows][kKeys] = {};
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      V key[kKeys];
#pragma GCC unroll 4
      for (int k = 0; k < kKeys; ++k) {
        key[k] = load_lanes<T, kBytes>(keys[j + k] + d);
        if (ahead) __builtin_prefetch(ahead[j + k] + d);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V row = *reinterpret_cast<const V*>(rows + r * width + d);
#pragma GCC unroll 4
        for (int k = 0; k < kKeys; ++k) sums[r][k] += row * key[k];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      T* const own = scores[r] + j;
      sum_lanes<T, kBytes, kKeys>(sums[r], own);
      for (int64_t rest = d; rest < width; ++rest) {
        for (int k = 0; k < kKeys; ++k) own[k] += rows[r * width + rest] * widen(keys[j + k][rest]);
      }
    }
  }
}

// Adds the values from .. to - 1, each by its weight, to kRows accumulators, kSteps registers of each at a time: one
// alone would wait for its own last sum.
template <int kBytes, int kRows, int kSteps, class T, class Stored>
PYGEN_INLINE int64_t add_columns(const T (*weights)[kTile], const Stored* const* values, int64_t width, int64_t d,
                                 int64_t from, int64_t to, T* accumulator, const Stored* const* ahead) {
  using V = typename Lanes<T, kBytes>::type;
  constexpr int kLanes = kBytes / sizeof(T);
  for (; d + kSteps * kLanes <= width; d += kSteps * kLanes) {
    V sums[kRows][kSteps];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < kSteps; ++s) {
        sums[r][s] = *reinterpret_cast<const V*>(accumulator + r * width + d + s * kLanes);
      }
    }
    for (int64_t j = from; j < to; ++j) {
#pragma GCC unroll 8
      for (int s = 0; s < kSteps; ++s) {
        const V value = load_lanes<T, kBytes>(values[j] + d + s * kLanes);
        if (ahead) __builtin_prefetch(ahead[j] + d + s * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r][s] += weights[r][j] * value;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < kSteps; ++s) {
        *reinterpret_cast<V*>(accumulator + r * width + d + s * kLanes) = sums[r][s];
      }
    }
  }
  return d;
}

template <int kBytes, int kRows, class T, class Stored>
PYGEN_INLINE void add(const T (*weights)[kTile], const Stored* const* values, int64_t width, uint32_t seen,
                      T* accumulator, const Stored* const* ahead) {
  while (seen) {
    const int64_t from = std::countr_zero(seen), to = from + std::countr_one(seen >> from);
    seen = to == kTile ? 0 : seen & (~0u << to);
    int64_t d = 0;
    if constexpr (kRows == 1)
      d = add_columns<kBytes, kRows, 8>(weights, values, width, d, from, to, accumulator, ahead);
    d = add_columns<kBytes, kRows, 4>(weights, values, width, d, from, to, accumulator, ahead);
    d = add_columns<kBytes, kRows, 1>(weights, values, width, d, from, to, accumulator, ahead);
    for (; d < width; ++d) {
      for (int r = 0; r < kRows; ++r) {
        for (int64_t j = from; j < to; ++j) accumulator[r * width + d] += weights[r][j] * widen(values[j][d]);
      }
    }
  }
}

// The keys from position `tile` on that a row sees, one bit each; what its mask adds to their scores goes to `bias`.
template <class Compute, class Stored>
inline uint32_t seen_of(const Split<Compute, Stored>& x, int64_t r, int64_t tile, int64_t n, Compute* bias) {
  const int64_t from = std::max<int64_t>(x.first[r] - tile, 0), to = std::min(x.last[r] - tile, n);
  if (from >= to) return 0;
  uint32_t seen = (to == kTile ? ~0u : (1u << to) - 1) & (~0u << from);
  if (x.mask.kind == cache::MaskKind::kNone) return seen;
  for (int64_t j = from; j < to; ++j) {
    bias[j] = x.mask.template at<Compute>(x.mask_rows[r], tile + j);
    if (bias[j] == cache::kNothing<Compute>) seen &= ~(1u << j);
  }
  return seen;
}

// Where the tokens from position `tile` on lie.
template <class T>
PYGEN_INLINE void find_rows(const cache::Places<T>& places, int64_t tile, int64_t n, const T** rows) {
  for (int64_t from = 0; from < n;) {
    const int64_t to = std::min(n, from + places.layout.run(tile + from));
    const T* const first = places.at(tile + from);
    for (int64_t j = from; j < to; ++j) rows[j] = first + (j - from) * places.stride;
    from = to;
  }
}

// Rows of a tile where they lie, or widened into the buffer where so many query rows read them that it pays.
template <int kBytes, class Compute, class Stored>
PYGEN_INLINE void widen_tile(const Stored* const* rows, int64_t n, int64_t width, Compute* buffer,
                             const Compute** widened) {
  using V = typename Lanes<Compute, kBytes>::type;
  constexpr int kLanes = kBytes / sizeof(Compute);
  for (int64_t j = 0; j < n; ++j) {
    Compute* to = buffer + j * width;
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      *reinterpret_cast<V*>(to + d) = load_lanes<Compute, kBytes>(rows[j] + d);
    }
    for (; d < width; ++d) to[d] = widen(rows[j][d]);
    widened[j] = to;
  }
}

template <int kBytes, class Compute, class Element>
PYGEN_INLINE void score_tile(const Compute* query, int64_t rows, const Element* const* keys, int64_t width, int64_t n,
                             Compute (*scores)[kTile], const Element* const* ahead) {
  constexpr int kRows = kRowsTogether, kKeys = 4;
  const int64_t whole = n / kKeys * kKeys;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    score<kBytes, kRows, kKeys>(query + r * width, keys, width, 0, whole, scores + r, ahead);
    score<kBytes, kRows, 1>(query + r * width, keys, width, whole, n, scores + r, ahead);
    ahead = kNoRows<Element>;
  }
  for (; r < rows; ++r) {
    score<kBytes, 1, kKeys>(query + r * width, keys, width, 0, whole, scores + r, ahead);
    score<kBytes, 1, 1>(query + r * width, keys, width, whole, n, scores + r, ahead);
    ahead = kNoRows<Element>;
  }
}

// What a row does not see is not added by a weight of zero: it can be infinite.
template <int kBytes, class Compute, class Element>
PYGEN_INLINE void add_tile(const Compute (*weights)[kTile], const uint32_t* seen, int64_t rows,
                           const Element* const* values, int64_t width, Compute* accumulator,
                           const Element* const* ahead) {
  constexpr int kRows = kRowsTogether;
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t end = std::min(first + kRows, rows);
    uint32_t shared = end - first == kRows ? ~0u : 0;  // what four rows see together
    for (int64_t r = first; r < end; ++r) shared &= seen[r];
    if (shared) add<kBytes, kRows>(weights + first, values, width, shared, accumulator + first * width, ahead);
    for (int64_t r = first; r < end; ++r) {
      const uint32_t own = seen[r] & ~shared;
      if (own) add<kBytes, 1>(weights + r, values, width, own, accumulator + r * width, ahead);
      ahead = kNoRows<Element>;
    }
  }
}

template <int kBytes, class Compute, class Stored>
PYGEN_INLINE void attend_rows_by(const Split<Compute, Stored>& x) {
  const int64_t width = x.width;
  for (int64_t r = 0; r < x.rows; ++r) {
    x.peak[r] = cache::kNothing<Compute>;
    x.sum[r] = 0;
    for (int64_t d = 0; d < width; ++d) x.accumulator[r * width + d] = 0;
  }
  const bool widened = !std::is_same_v<Compute, Stored> && x.rows > kRowsTogether;
  Compute scores[kTileRows][kTile], bias[kTileRows][kTile], key_scales[kTile] = {}, value_scales[kTile] = {};
  const Stored *keys[kTile], *values[kTile];
  const Compute* wide_rows[kTile];
  uint32_t seen[kTileRows];
  for (int64_t tile = x.begin; tile < x.end; tile += kTile) {
    const int64_t n = std::min(kTile, x.end - tile);
    uint32_t any = 0;
    for (int64_t r = 0; r < x.rows; ++r) any |= seen[r] = seen_of(x, r, tile, n, bias[r]);
    if (!any) continue;
    find_rows(x.keys, tile, n, keys);
    find_rows(x.values, tile, n, values);
    if constexpr (cache::kScaled<Stored>) {
      const float* scales[kTile];
      find_rows(x.key_scales, tile, n, scales);
      for (int64_t j = 0; j < n; ++j) key_scales[j] = *scales[j] * kUnit<Stored>;
      find_rows(x.value_scales, tile, n, scales);
      for (int64_t j = 0; j < n; ++j) value_scales[j] = *scales[j] * kUnit<Stored>;
    }
    if (widened) {
      widen_tile<kBytes>(keys, n, width, x.buffer, wide_rows);
      score_tile<kBytes>(x.query, x.rows, wide_rows, width, n, scores, kNoRows<Compute>);
    } else {
      score_tile<kBytes>(x.query, x.rows, keys, width, n, scores, values);
    }
    for (int64_t r = 0; r < x.rows; ++r) {
      if (!seen[r]) continue;
      Compute* s = scores[r];
      if constexpr (cache::kScaled<Stored>) {
        for (int64_t j = 0; j < kTile; ++j) s[j] *= key_scales[j];
      }
      if (x.mask.kind != cache::MaskKind::kNone) {
        for (int64_t j = 0; j < kTile; ++j) {
          s[j] += bias[r][j];
          // A sum of large numbers can come to minus infinity too.
          if (s[j] == cache::kNothing<Compute>) seen[r] &= ~(1u << j);
        }
        if (!seen[r]) continue;
      }
      if (seen[r] != ~0u) {
        for (int64_t j = 0; j < kTile; ++j) s[j] = seen[r] >> j & 1 ? s[j] : cache::kNothing<Compute>;
      }
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
      if constexpr (cache::kScaled<Stored>) {
        for (int64_t j = 0; j < kTile; ++j) s[j] *= value_scales[j];
      }
    }
    const int64_t rest = x.end - tile - kTile;
    if (rest > 0) {
      find_rows(x.keys, tile + kTile, std::min(kTile, rest), keys);
      std::fill(keys + std::min(kTile, rest), keys + kTile, keys[0]);
    }
    if (widened) {
      widen_tile<kBytes>(values, n, width, x.buffer, wide_rows);
      add_tile<kBytes>(scores, seen, x.rows, wide_rows, width, x.accumulator, kNoRows<Compute>);
    } else {
      add_tile<kBytes>(scores, seen, x.rows, values, width, x.accumulator, rest > 0 ? keys : kNoRows<Stored>);
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
