// Neighbouring elements in vectors of 16 bytes, whatever their dtype: what memory-bound CUDA kernels load and store.
#pragma once

#include <cstdint>

#include "simt.h"
#include "tensor.h"

namespace pygen {

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T values[N];
};

// Whether N elements of a dtype from an address, or from any multiple of N elements past it, lie in whole vectors.
inline bool vector_aligned(const void* data, ScalarType dtype, int n, int64_t stride = 0) {
  return for_dtype(dtype, [&](auto element) {
    const int64_t bytes = std::min<int64_t>(16, static_cast<int64_t>(sizeof(element)) * n);
    return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0 &&
           stride * static_cast<int64_t>(sizeof(element)) % bytes == 0;
  });
}

// N elements from position `at`; where rows are not aligned or fewer than N are left, `count` of them one by one, and
// zeros for the rest.
template <class Element, int N, class T>
__device__ __forceinline__ void load_vector_as(const void* data, int64_t at, int count, bool aligned, T* to) {
  const Element* from = static_cast<const Element*>(data) + at;
  if (aligned && count == N) {
    const auto vector = *reinterpret_cast<const Vector<Element, N>*>(from);
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = static_cast<T>(vector.values[k]);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = k < count ? static_cast<T>(from[k]) : T(0);
  }
}

template <class Element, int N, class T>
__device__ __forceinline__ void store_vector_as(void* data, int64_t at, int count, bool aligned, const T* values) {
  Element* to = static_cast<Element*>(data) + at;
  if (aligned && count == N) {
    Vector<Element, N> vector;
#pragma unroll
    for (int k = 0; k < N; ++k) vector.values[k] = static_cast<Element>(values[k]);
    *reinterpret_cast<Vector<Element, N>*>(to) = vector;
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k < count) to[k] = static_cast<Element>(values[k]);
    }
  }
}

// The dtype is chosen at run time: it is the same for all threads, so the branch costs nothing beside the memory
// traffic, and a kernel is compiled once instead of once for every mixture of dtypes.
template <int N, class T>
__device__ __forceinline__ void load_vector(const void* data, ScalarType dtype, int64_t at, int count, bool aligned,
                                            T* to) {
  switch (dtype) {
    case ScalarType::Double:
      return load_vector_as<double, N>(data, at, count, aligned, to);
    case ScalarType::BFloat16:
      return load_vector_as<BFloat16, N>(data, at, count, aligned, to);
    case ScalarType::Half:
      return load_vector_as<Half, N>(data, at, count, aligned, to);
    default:
      return load_vector_as<float, N>(data, at, count, aligned, to);
  }
}

template <int N, class T>
__device__ __forceinline__ void store_vector(void* data, ScalarType dtype, int64_t at, int count, bool aligned,
                                             const T* values) {
  switch (dtype) {
    case ScalarType::Double:
      return store_vector_as<double, N>(data, at, count, aligned, values);
    case ScalarType::BFloat16:
      return store_vector_as<BFloat16, N>(data, at, count, aligned, values);
    case ScalarType::Half:
      return store_vector_as<Half, N>(data, at, count, aligned, values);
    default:
      return store_vector_as<float, N>(data, at, count, aligned, values);
  }
}

}  // namespace pygen
