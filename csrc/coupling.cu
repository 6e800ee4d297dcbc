// Affine coupling on CUDA. A warp takes a short row whole; a long row goes to blocks in fixed chunks, whose partial
// log-determinants a second kernel adds in order (no atomics: results repeat bit for bit). Either way each thread moves
// 16 bytes at a time where rows are dense and aligned, and one element at a time where not.
#include "coupling.h"

#include "coupling_checks.h"
#include "simt.h"
#include "tensor.h"
#include "vector.h"

namespace pygen {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kWarpWidth = 2048;   // rows up to this width go to a warp each
constexpr int64_t kChunk = 16 * 1024;  // elements of a longer row that one block takes

struct Output {
  void* data;
  ScalarType dtype;
};

template <class T>
struct AffineArguments {
  Rows x, raw_scale, shift;  // data is null where absent
  Output y;
  T limit, offset, epsilon;
  int64_t activation;
  bool inverse;
};

// N elements of a row from position i; N = 1 takes any strides.
template <int N, class T>
__device__ __forceinline__ void read(const Rows& rows, int64_t row, int64_t i, T* to) {
  load_vector<N>(rows.data, rows.dtype, rows.row_offset(row) + (N > 1 ? i : rows.event_offset(i)), N, true, to);
}

// Whether every row lies dense and in whole vectors of N elements.
bool vectors(const Rows& rows, int n) {
  if (!rows.data) return true;
  bool whole = rows.dense() && rows.width % n == 0 && vector_aligned(rows.data, rows.dtype, n);
  for (int d = 0; d < rows.row_dims; ++d) {
    whole = whole && vector_aligned(rows.data, rows.dtype, n, rows.row_strides[d]);
  }
  return whole;
}

// One element, with the activation chosen at run time: the branch is the same for all threads and costs nothing beside
// the memory traffic.
template <class T>
__device__ __forceinline__ T affine_element(T x, T raw, T shift, bool additive, const AffineArguments<T>& arguments,
                                            T* log_s) {
  Scale<T> scale{T(1), T(0)};
  if (!additive) {
    for_activation(arguments.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
      scale = affine_scale<kActivation>(raw + arguments.offset, arguments.limit);
    });
    if (arguments.epsilon != T(0)) scale = add_epsilon(scale, arguments.epsilon);
  }
  *log_s = scale.log;
  return arguments.inverse ? (x - shift) / scale.value : x * scale.value + shift;
}

// Elements from, from + step, ... of [from, to) of one row; returns this thread's share of sum log s.
template <int N, class T>
__device__ __forceinline__ double affine_stride(const AffineArguments<T>& arguments, int64_t row, int64_t from,
                                                int64_t to, int64_t step) {
  const bool additive = arguments.raw_scale.data == nullptr;
  const bool shifted = arguments.shift.data != nullptr;
  double sum = 0;  // one addition an element beside all that traffic: exact sums for nothing
  for (int64_t i = from * N; i < to; i += step * N) {
    T x_values[N], raw_values[N] = {}, shift_values[N] = {}, y_values[N];
    read<N>(arguments.x, row, i, x_values);
    if (!additive) read<N>(arguments.raw_scale, row, i, raw_values);
    if (shifted) read<N>(arguments.shift, row, i, shift_values);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      T log_s;
      y_values[k] = affine_element(x_values[k], raw_values[k], shift_values[k], additive, arguments, &log_s);
      sum += log_s;
    }
    store_vector<N>(arguments.y.data, arguments.y.dtype, row * arguments.x.width + i, N, true, y_values);
  }
  return arguments.inverse ? -sum : sum;
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads) affine_warp_kernel(AffineArguments<T> arguments, T* ladj) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= arguments.x.rows) return;
  const double sum = warp_sum(affine_stride<N>(arguments, row, threadIdx.x % kWarp, arguments.x.width, kWarp));
  if (threadIdx.x % kWarp == 0) ladj[row] = static_cast<T>(sum);
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    affine_chunk_kernel(AffineArguments<T> arguments, int64_t chunks, double* partial) {
  SHARED(double, scratch, [32]);
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t to = min(arguments.x.width, (chunk + 1) * kChunk);
  const double sum =
      block_sum(affine_stride<N>(arguments, row, chunk * (kChunk / N) + threadIdx.x, to, kThreads), scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_chunks_kernel(const double* partial, int64_t chunks, int64_t rows, T* ladj) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[row * chunks + chunk];
  ladj[row] = static_cast<T>(sum);
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  check(blocks <= 0x7fffffff, "x has too many rows for one launch: ", items);
  return static_cast<unsigned>(blocks);
}

template <int N, class T>
void launch_affine(const AffineArguments<T>& arguments, const Tensor& x, Tensor& ladj, Stream stream) {
  const int64_t rows = arguments.x.rows, width = arguments.x.width;
  T* const sums = static_cast<T*>(ladj.mutable_data_ptr());
  if (width <= kWarpWidth) {
    launch(affine_warp_kernel<N, T>, blocks_for(rows, kThreads / kWarp), kThreads, 0, stream, arguments, sums);
    return;
  }
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  const Tensor partial = torch::stable::new_empty(x, {rows * chunks}, ScalarType::Double);
  double* const partial_sums = static_cast<double*>(partial.mutable_data_ptr());
  launch(affine_chunk_kernel<N, T>, blocks_for(rows * chunks, 1), kThreads, 0, stream, arguments, chunks, partial_sums);
  launch(add_chunks_kernel<T>, blocks_for(rows, kThreads), kThreads, 0, stream, partial_sums, chunks, rows, sums);
}

// Calls f(N) with how many elements a thread takes at once: 16 bytes of the narrowest tensor, or 1 for strided ones.
template <class F>
void for_width(const Tensor& x, bool wide, bool four, F&& f) {
  if (wide && x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::Double) {
    f(std::integral_constant<int, 8>{});
  } else if (four) {
    f(std::integral_constant<int, 4>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

std::tuple<Tensor, Tensor> affine(bool inverse, const Tensor& x, const OptionalTensor& raw_scale,
                                  const OptionalTensor& shift, int64_t activation, double limit, double offset,
                                  double epsilon, int64_t event_dims) {
  check_affine(x, raw_scale, shift, activation, event_dims);
  Tensor y = empty_like_shape(x, x.scalar_type());
  Tensor ladj = empty_ladj(x, event_dims);
  const OnDevice device(x.get_device_index());
  const Stream stream = device.stream();
  auto run = [&](auto type) {
    using T = decltype(type);
    const AffineArguments<T> arguments{Rows(x, event_dims),
                                       raw_scale ? Rows(*raw_scale, event_dims) : Rows(),
                                       shift ? Rows(*shift, event_dims) : Rows(),
                                       {y.mutable_data_ptr(), y.scalar_type()},
                                       static_cast<T>(limit),
                                       static_cast<T>(offset),
                                       static_cast<T>(epsilon),
                                       activation,
                                       inverse};
    auto all = [&](int n) {
      return vectors(arguments.x, n) && vectors(arguments.raw_scale, n) && vectors(arguments.shift, n);
    };
    for_width(x, all(8), all(4), [&](auto n) { launch_affine<decltype(n)::value>(arguments, x, ladj, stream); });
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {y, ladj};
}

std::tuple<Tensor, Tensor> affine_forward(const Tensor& x, const OptionalTensor& raw_scale, const OptionalTensor& shift,
                                          int64_t activation, double limit, double offset, double epsilon,
                                          int64_t event_dims) {
  return affine(false, x, raw_scale, shift, activation, limit, offset, epsilon, event_dims);
}

std::tuple<Tensor, Tensor> affine_inverse(const Tensor& y, const OptionalTensor& raw_scale, const OptionalTensor& shift,
                                          int64_t activation, double limit, double offset, double epsilon,
                                          int64_t event_dims) {
  return affine(true, y, raw_scale, shift, activation, limit, offset, epsilon, event_dims);
}

template <class T>
struct BackwardArguments {
  Rows x, raw_scale, grad_output, grad_ladj;
  Output grad_input, grad_raw_scale;
  T limit, offset, epsilon;
  int64_t activation;
  bool inverse;
};

// Elementwise but for grad_ladj, so a flat grid serves rows of any width; N elements lie in one row.
template <int N, class T>
__global__ void __launch_bounds__(kThreads) affine_backward_kernel(BackwardArguments<T> arguments) {
  const int64_t width = arguments.x.width, total = arguments.x.rows * width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
  for (int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; at < total; at += step) {
    const int64_t row = at / width, i = at % width;
    const T grad_ladj = static_cast<const T*>(arguments.grad_ladj.data)[arguments.grad_ladj.row_offset(row)];
    T x_values[N], raw_values[N], grad_values[N], inputs[N] = {}, raws[N] = {};
    read<N>(arguments.x, row, i, x_values);
    read<N>(arguments.raw_scale, row, i, raw_values);
    read<N>(arguments.grad_output, row, i, grad_values);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      for_activation(arguments.activation, [&](auto tag) {
        const auto scale = affine_scale_slope<decltype(tag)::value>(raw_values[k] + arguments.offset, arguments.limit,
                                                                    arguments.epsilon);
        const auto gradient = arguments.inverse ? affine_gradient<true>(x_values[k], scale, grad_values[k], grad_ladj)
                                                : affine_gradient<false>(x_values[k], scale, grad_values[k], grad_ladj);
        inputs[k] = gradient.input;
        raws[k] = gradient.raw_scale;
      });
    }
    store_vector<N>(arguments.grad_input.data, arguments.grad_input.dtype, at, N, true, inputs);
    store_vector<N>(arguments.grad_raw_scale.data, arguments.grad_raw_scale.dtype, at, N, true, raws);
  }
}

template <int N, class T>
void launch_backward(const BackwardArguments<T>& arguments, Stream stream) {
  const int64_t items = (arguments.x.rows * arguments.x.width + N - 1) / N;
  // A grid that fills any device a few times over; the kernel strides over the rest.
  const int64_t blocks = std::min<int64_t>((items + kThreads - 1) / kThreads, 1 << 16);
  launch(affine_backward_kernel<N, T>, static_cast<unsigned>(blocks), kThreads, 0, stream, arguments);
}

std::tuple<Tensor, Tensor> affine_backward(const Tensor& x, const Tensor& raw_scale, const Tensor& grad_output,
                                           const Tensor& grad_ladj, int64_t activation, double limit, double offset,
                                           double epsilon, int64_t event_dims, bool inverse) {
  check_affine(x, raw_scale, grad_output, activation, event_dims);
  check_grad_ladj(x, grad_ladj, event_dims);
  check(grad_ladj.scalar_type() == sum_dtype(x), "grad_ladj has another dtype than the log-determinant");
  Tensor grad_input = empty_like_shape(x, x.scalar_type());
  Tensor grad_raw_scale = empty_like_shape(x, raw_scale.scalar_type());
  const OnDevice device(x.get_device_index());
  const Stream stream = device.stream();
  auto run = [&](auto type) {
    using T = decltype(type);
    const BackwardArguments<T> arguments{Rows(x, event_dims),
                                         Rows(raw_scale, event_dims),
                                         Rows(grad_output, event_dims),
                                         Rows(grad_ladj, 0),
                                         {grad_input.mutable_data_ptr(), grad_input.scalar_type()},
                                         {grad_raw_scale.mutable_data_ptr(), grad_raw_scale.scalar_type()},
                                         static_cast<T>(limit),
                                         static_cast<T>(offset),
                                         static_cast<T>(epsilon),
                                         activation,
                                         inverse};
    auto all = [&](int n) {
      return vectors(arguments.x, n) && vectors(arguments.raw_scale, n) && vectors(arguments.grad_output, n);
    };
    for_width(x, all(8), all(4), [&](auto n) { launch_backward<decltype(n)::value>(arguments, stream); });
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {grad_input, grad_raw_scale};
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("affine_forward", TORCH_BOX(&affine_forward));
  library.impl("affine_inverse", TORCH_BOX(&affine_inverse));
  library.impl("affine_backward", TORCH_BOX(&affine_backward));
}

}  // namespace
}  // namespace pygen
