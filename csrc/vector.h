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

template <class Element, int N, class T>
__device__ __forceinline__ void load_vector_as(const void* data, int64_t at, T* to) {
  const auto vector = *reinterpret_cast<const Vector<Element, N>*>(static_cast<const Element*>(data) + at);
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = static_cast<T>(vector.values[k]);
}

template <class Element, int N, class T>
__device__ __forceinline__ void store_vector_as(void* data, int64_t at, const T* values) {
  Vector<Element, N> vector;
#pragma unroll
  for (int k = 0; k < N; ++k) vector.values[k] = static_cast<Element>(values[k]);
  *reinterpret_cast<Vector<Element, N>*>(static_cast<Element*>(data) + at) = vector;
}

// The dtype is chosen at run time: it is the same for all threads, so the branch costs nothing beside the memory traffic,
// and a kernel is compiled once instead of once for every mixture of dtypes. N = 1 serves what is not aligned.
template <int N, class T>
__device__ __forceinline__ void load_vector(const void* data, ScalarType dtype, int64_t at, T* to) {
  switch (dtype) {
    case ScalarType::Double:
      return load_vector_as<double, N>(data, at, to);
    case ScalarType::BFloat16:
      return load_vector_as<BFloat16, N>(data, at, to);
    case ScalarType::Half:
      return load_vector_as<Half, N>(data, at, to);
    default:
      return load_vector_as<float, N>(data, at, to);
  }
}

template <int N, class T>
__device__ __forceinline__ void store_vector(void* data, ScalarType dtype, int64_t at, const T* values) {
  switch (dtype) {
    case ScalarType::Double:
      return store_vector_as<double, N>(data, at, values);
    case ScalarType::BFloat16:
      return store_vector_as<BFloat16, N>(data, at, values);
    case ScalarType::Half:
      return store_vector_as<Half, N>(data, at, values);
    default:
      return store_vector_as<float, N>(data, at, values);
  }
}

}  // namespace pygen
