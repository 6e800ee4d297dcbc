// An array that the kernels of these tests and their main() both reach, in either build.
#pragma once

#include <cstddef>

#include "simt.h"

template <class T>
struct Buffer {
  explicit Buffer(size_t n, T fill = T()) : size(n) {
#ifdef __CUDACC__
    STD_CUDA_CHECK(cudaMallocManaged(&data, n * sizeof(T)));
#else
    data = new T[n];
#endif
    for (size_t i = 0; i < n; ++i) data[i] = fill;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#ifdef __CUDACC__
    cudaFree(data);
#else
    delete[] data;
#endif
  }
  T& operator[](size_t i) { return data[i]; }

  T* data;
  size_t size;
};

inline void wait_for_device() {
#ifdef __CUDACC__
  STD_CUDA_CHECK(cudaDeviceSynchronize());
#endif
}
