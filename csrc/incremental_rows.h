// Row functions of the incremental programs on the CPU: products of a panel of weights with the inputs of a few columns
// (sites, or samples), and pointwise functions of the channels of one.
#pragma once

#include <array>
#include <utility>

#include "incremental.h"

namespace pygen::incremental {

constexpr int kVectorBytes = 64;
constexpr int kMostVectors = 4, kMostColumns = 6;  // four vectors for each of six columns fill the registers of AVX-512

template <class T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

// Rows first .. first + count of a panel, which the same source feeds.
struct Piece {
  int64_t first, count;
};

// outs[s] = bias + the sum over all pieces of weights times inputs, for V vectors of output channels and S columns. The
// sums stay in registers. Every one takes its products in the order of the pieces, whatever V and S are, so that a
// sample's result does not depend on what is computed beside it.
template <int V, int S, class T>
PYGEN_CLONES void multiply_tile(const T* weights, int64_t width, const Piece* pieces, int64_t piece_count,
                                const T* const* inputs, const T* bias, T* const* outs) {
  // A vector type, because whether GCC vectorises the plain loops hangs on their bounds.
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(alignof(T))));
  Vector sums[S][V];
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[s][v] = reinterpret_cast<const Vector*>(bias)[v];
  }
  for (int64_t p = 0; p < piece_count; ++p) {
    const T* in[S];
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) in[s] = inputs[p * kMostColumns + s];
    const T* row = weights + pieces[p].first * width;
    const int64_t count = pieces[p].count;
    for (int64_t k = 0; k < count; ++k, row += width) {
      Vector weight[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) weight[v] = reinterpret_cast<const Vector*>(row)[v];
#pragma GCC unroll 16
      for (int s = 0; s < S; ++s) {
        const T value = in[s][k];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[s][v] += value * weight[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) reinterpret_cast<Vector*>(outs[s])[v] = sums[s][v];
  }
}

template <class T>
using MultiplyTile = void (*)(const T*, int64_t, const Piece*, int64_t, const T* const*, const T*, T* const*);

template <class T, int V, int... S>
constexpr std::array<MultiplyTile<T>, kMostColumns> tiles_of(std::integer_sequence<int, S...>) {
  return {&multiply_tile<V, S + 1, T>...};
}

// multiply_tile for V vectors and S columns, at [V - 1][S - 1].
template <class T>
inline MultiplyTile<T> tile_for(int64_t vectors, int64_t columns) {
  constexpr auto kColumns = std::make_integer_sequence<int, kMostColumns>{};
  static constexpr std::array<std::array<MultiplyTile<T>, kMostColumns>, kMostVectors> kTiles = {
      tiles_of<T, 1>(kColumns), tiles_of<T, 2>(kColumns), tiles_of<T, 3>(kColumns), tiles_of<T, 4>(kColumns)};
  return kTiles[static_cast<size_t>(vectors - 1)][static_cast<size_t>(columns - 1)];
}

// Whether four vectors of 64 bytes for each of six columns fit into the registers; where not, one vector does.
inline bool wide_registers() {
#if PYGEN_X86_LEVELS
  static const bool wide = __builtin_cpu_supports("x86-64-v4") != 0;
  return wide;
#else
  return false;
#endif
}

// n is a multiple of kLanes.
template <Function F, class T>
PYGEN_CLONES void apply_row(const T* a, const T* b, const T* numbers, int64_t n, T* out) {
  const T first = numbers[0], second = numbers[1];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = apply<F>(a[i], b[i], first, second);
}

template <class T>
using ApplyRow = void (*)(const T*, const T*, const T*, int64_t, T*);

template <class T, int32_t... F>
constexpr std::array<ApplyRow<T>, kFunctions> rows_of(std::integer_sequence<int32_t, F...>) {
  return {&apply_row<static_cast<Function>(F), T>...};
}

template <class T>
inline ApplyRow<T> row_for(Function function) {
  static constexpr auto kRows = rows_of<T>(std::make_integer_sequence<int32_t, kFunctions>{});
  return kRows[static_cast<size_t>(function)];
}

template <class T>
PYGEN_CLONES T sum_row(const T* x, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// x becomes x - mean; returns the sum of its squares.
template <class T>
PYGEN_CLONES T centre_row(T* x, int64_t n, T mean) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T centred = x[i] - mean;
    x[i] = centred;
    sum += centred * centred;
  }
  return sum;
}

template <class T>
PYGEN_CLONES void normalize_row(const T* x, T scale, const T* weight, const T* bias, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i] + bias[i];
}

template <class T>
PYGEN_CLONES T dot_row(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <class T>
PYGEN_CLONES void add_scaled_row(const T* x, T factor, int64_t n, T* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += factor * x[i];
}

// x becomes exp(x - peak); returns the sum.
template <class T>
PYGEN_CLONES T exp_row(T* x, int64_t n, T peak) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    x[i] = scalar::exp(x[i] - peak);
    sum += x[i];
  }
  return sum;
}

}  // namespace pygen::incremental
