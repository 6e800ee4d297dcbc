// The one header through which CUDA code launches, synchronises and shuffles: CUDA under nvcc,
// fibers on the CPU (simt_fibers.h) under the host compiler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace pygen {

// Shared memory of a block in bytes: in all, on every GPU of a wheel; in static arrays; and what is there unasked.
constexpr size_t kMostShared = 99 * 1024, kMostStaticShared = 32 * 1024, kSharedUnasked = 48 * 1024;

}  // namespace pygen

#ifdef __CUDACC__

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

// STABLE_TORCH_LIBRARY_IMPL and _FRAGMENT expand these two; STABLE_TORCH_LIBRARY would not.
#define PYGEN_CUDA_NAMESPACE pygen
#define PYGEN_CUDA_KEY CUDA

// SHARED(float, tile, [16][17]); The extents are variadic so that a scalar is SHARED(int, last, ).
#define SHARED(T, name, ...) __shared__ T name __VA_ARGS__

namespace pygen {

using Stream = cudaStream_t;

// Makes a tensor's device the current one for as long as it lives, and knows PyTorch's stream there.
class OnDevice {
 public:
  explicit OnDevice(int32_t device_index) : guard_(device_index) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device_index, &stream) != 0) {
      throw std::runtime_error("PyTorch gave no current CUDA stream for the device");
    }
    stream_ = static_cast<Stream>(stream);
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  // One untyped symbol: two instantiations that declared it with two types would not link.
  extern __shared__ __align__(16) unsigned char pygen_dynamic_shared[];
  return reinterpret_cast<T*>(pygen_dynamic_shared);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "launch: one argument for each parameter of the kernel");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > kSharedUnasked - kMostStaticShared) {
    // What a kernel may have without asking counts its static arrays too. It asks for the same whatever it needs:
    // another thread may be between this line and its own launch.
    const void* const function = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes facts;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&facts, function));
    if (shared_bytes + facts.sharedSizeBytes > kSharedUnasked) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(kMostShared - facts.sharedSizeBytes)));
    }
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace pygen

#else

#include "simt_fibers.h"

#define PYGEN_CUDA_NAMESPACE pygen_simt
#define PYGEN_CUDA_KEY CPU

#define SHARED(T, name, ...)                                    \
  using name##_shared_type = T __VA_ARGS__;                     \
  static char name##_shared_key;                                \
  name##_shared_type& name = *static_cast<name##_shared_type*>( \
      ::pygen::simt::static_shared(&name##_shared_key, sizeof(name##_shared_type), alignof(name##_shared_type)))

namespace pygen {

struct Stream {};

struct OnDevice {
  explicit OnDevice(int32_t) {}
  Stream stream() const { return {}; }
};

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared_memory());
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "launch: one argument for each parameter of the kernel");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  simt::run_grid([](void* body) { (*static_cast<decltype(call)*>(body))(); }, &call, grid, block, shared_bytes);
}

}  // namespace pygen

#endif

namespace pygen {

// Butterflies: every lane ends with the same bits, and the order of the sum is the same each run.
// All 32 lanes of the warp must take part.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// A NaN in any lane is the result, as it is in torch.max.
template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(~0u, value, offset);
    if (other > value || other != other) value = other;
  }
  return value;
}

__device__ __forceinline__ int thread_rank() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

__device__ __forceinline__ int block_size() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

// The block is a multiple of 32 threads, all of which call; scratch is 32 elements of shared
// memory, and may be that of an earlier call. Every thread gets the result, bit for bit the same.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  const int lane = thread_rank() % 32, warp = thread_rank() / 32, warps = block_size() / 32;
  value = warp_sum(value);
  __syncthreads();  // a slower warp may still read the scratch of the call before
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : T(0));
}

template <class T>
__device__ __forceinline__ T block_max(T value, T* scratch) {
  const int lane = thread_rank() % 32, warp = thread_rank() / 32, warps = block_size() / 32;
  value = warp_max(value);
  __syncthreads();
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_max(scratch[lane < warps ? lane : 0]);
}

}  // namespace pygen
