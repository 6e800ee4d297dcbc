// Row functions of the masked sweeps on the CPU: a row is a unit's values for a tile of samples, one or two vectors of
// 64 bytes that lie together.
#pragma once

#include <array>

#include "masked.h"

namespace pygen::masked {

constexpr int kVectorBytes = 64;

// Samples in V vectors.
template <class T, int V>
constexpr int kLanes = V * kVectorBytes / static_cast<int>(sizeof(T));

// Adds to R rows of S vectors the products of R weights with each of `count` source rows, on V of the S vectors. The
// sums stay in registers. Every element takes its products in the order of the sources, whatever R and V are, so that a
// sample's result does not depend on where in a tile it is.
template <int R, int V, int S, class T>
PYGEN_CLONES void multiply_panel(const T* __restrict weights, const T* __restrict sources, int64_t count,
                                 T* __restrict rows) {
  // A vector type, because whether GCC vectorises the plain loops hangs on their bounds.
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  Vector sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[r][v] = reinterpret_cast<const Vector*>(rows)[r * S + v];
  }
  for (int64_t i = 0; i < count; ++i) {
    Vector source[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) source[v] = reinterpret_cast<const Vector*>(sources)[i * S + v];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const T weight = weights[i * R + r];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[r][v] += weight * source[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) reinterpret_cast<Vector*>(rows)[r * S + v] = sums[r][v];
  }
}

template <class T>
using MultiplyPanel = void (*)(const T*, const T*, int64_t, T*);

// multiply_panel for 1 .. kPanel rows, at [rows - 1].
template <int V, int S, class T, int... R>
constexpr std::array<MultiplyPanel<T>, kPanel> panels(std::integer_sequence<int, R...>) {
  return {&multiply_panel<R + 1, V, S, T>...};
}

// Whether two vectors of 64 bytes for each of kPanel rows fit into the registers.
inline bool wide_registers() {
#if PYGEN_X86_LEVELS
  static const bool wide = __builtin_cpu_supports("x86-64-v4") != 0;
  return wide;
#else
  return false;
#endif
}

// rows (count of them) += weights * sources. The sources are cut so that a piece stays in the first-level cache while
// all panels of rows pass over it.
template <class T, int V>
void multiply(const T* weights, const T* sources, int64_t source_count, T* rows, int64_t row_count) {
  constexpr int64_t kDepth = 256;
  constexpr auto kIndices = std::make_integer_sequence<int, kPanel>{};
  static constexpr auto kWhole = panels<V, V, T>(kIndices);
  static constexpr auto kHalf = panels<1, V, T>(kIndices);
  const bool whole = V == 1 || wide_registers();
  for (int64_t from = 0; from < source_count; from += kDepth) {
    const int64_t depth = std::min(kDepth, source_count - from);
    const T* piece = sources + from * kLanes<T, V>;
    for (int64_t row = 0; row < row_count; row += kPanel) {
      const int64_t height = std::min<int64_t>(kPanel, row_count - row);
      const T* panel = weights + row * source_count + from * height;
      T* const to = rows + row * kLanes<T, V>;
      if (whole) {
        kWhole[height - 1](panel, piece, depth, to);
      } else {
        for (int v = 0; v < V; ++v) kHalf[height - 1](panel, piece + v * kLanes<T, 1>, depth, to + v * kLanes<T, 1>);
      }
    }
  }
}

template <Unit U, int L, class T>
PYGEN_CLONES void activate_row(const T* __restrict h, T parameter, T* __restrict row) {
  for (int l = 0; l < L; ++l) row[l] = activate<U>(h[l], parameter);
}

template <int L, class T>
PYGEN_CLONES void add_row(const T* first, const T* second, T* row) {
  for (int l = 0; l < L; ++l) row[l] = first[l] + second[l];
}

template <int L, class T>
PYGEN_CLONES void multiply_row(const T* first, const T* second, T* row) {
  for (int l = 0; l < L; ++l) row[l] = first[l] * second[l];
}

// row = h scale + shift
template <int L, class T>
PYGEN_CLONES void scale_row(const T* h, T scale, T shift, T* row) {
  for (int l = 0; l < L; ++l) row[l] = h[l] * scale + shift;
}

// row += h slope
template <int L, class T>
PYGEN_CLONES void accumulate_row(const T* h, const T* slope, T* row) {
  for (int l = 0; l < L; ++l) row[l] += h[l] * slope[l];
}

}  // namespace pygen::masked
