// Affine coupling on CUDA. A warp takes a short row whole; a long row goes to blocks in fixed chunks, whose partial
// log-determinants a second kernel adds in order (no atomics: results repeat bit for bit). Either way each thread moves
// 16 bytes at a time where rows are dense and aligned, and one element at a time where not.
#include "coupling.h"

#include "coupling_checks.h"
#include "simt.h"
#include "tensor.h"

namespace pygen {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kWarpWidth = 2048;       // rows up to this width go to a warp each
constexpr int64_t kChunk = 16 * 1024;      // elements of a longer row that one block takes

template <class T>
struct AffineArguments {
  Rows x, raw_scale, shift;  // data is null where absent
  void* y;
  T limit, offset, epsilon;
  int64_t activation;
  bool inverse;
};

// 16 bytes of the widest of two types, so that one of them moves in whole vectors.
template <class Stored, class Parameter>
constexpr int vector_width() {
  return 16 / static_cast<int>(sizeof(Stored) > sizeof(Parameter) ? sizeof(Stored) : sizeof(Parameter));
}

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T values[N];
};

template <class T>
bool aligned(const Rows& rows, int width) {
  if (!rows.data) return true;
  if (!rows.dense()) return false;
  const int64_t bytes = std::min<int64_t>(16, static_cast<int64_t>(sizeof(T)) * width);
  if (reinterpret_cast<uintptr_t>(rows.data) % bytes) return false;
  for (int d = 0; d < rows.row_dims; ++d) {
    if (rows.row_strides[d] * static_cast<int64_t>(sizeof(T)) % bytes) return false;
  }
  return true;
}

// N elements of a row from position i, in the type of the arithmetic.
template <class Stored, class Compute, int N>
__device__ __forceinline__ void read(const Rows& rows, const Stored* row, int64_t i, Compute* to) {
  if constexpr (N > 1) {
    const auto vector = *reinterpret_cast<const Vector<Stored, N>*>(row + i);
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = static_cast<Compute>(vector.values[k]);
  } else {
    to[0] = static_cast<Compute>(row[rows.event_offset(i)]);
  }
}

template <class Stored, class Compute, int N>
__device__ __forceinline__ void write(Stored* to, const Compute* values) {
  Vector<Stored, N> vector;
#pragma unroll
  for (int k = 0; k < N; ++k) vector.values[k] = static_cast<Stored>(values[k]);
  *reinterpret_cast<Vector<Stored, N>*>(to) = vector;
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
template <int N, class Stored, class Parameter, class T>
__device__ __forceinline__ double affine_stride(const AffineArguments<T>& arguments, int64_t row, int64_t from, int64_t to,
                                           int64_t step) {
  const bool additive = arguments.raw_scale.data == nullptr;
  const bool shifted = arguments.shift.data != nullptr;
  const auto* x = static_cast<const Stored*>(arguments.x.data) + arguments.x.row_offset(row);
  const auto* raw = static_cast<const Parameter*>(arguments.raw_scale.data) +
                    (additive ? 0 : arguments.raw_scale.row_offset(row));
  const auto* shift =
      static_cast<const Parameter*>(arguments.shift.data) + (shifted ? arguments.shift.row_offset(row) : 0);
  auto* y = static_cast<Stored*>(arguments.y) + row * arguments.x.width;
  double sum = 0;  // one addition an element beside all that traffic: exact sums for nothing
  for (int64_t i = from * N; i < to; i += step * N) {
    T x_values[N], raw_values[N] = {}, shift_values[N] = {}, y_values[N];
    read<Stored, T, N>(arguments.x, x, i, x_values);
    if (!additive) read<Parameter, T, N>(arguments.raw_scale, raw, i, raw_values);
    if (shifted) read<Parameter, T, N>(arguments.shift, shift, i, shift_values);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      T log_s;
      y_values[k] =
          affine_element(x_values[k], raw_values[k], shift_values[k], additive, arguments, &log_s);
      sum += log_s;
    }
    write<Stored, T, N>(y + i, y_values);
  }
  return arguments.inverse ? -sum : sum;
}

template <int N, class Stored, class Parameter, class T>
__global__ void __launch_bounds__(kThreads) affine_warp_kernel(AffineArguments<T> arguments, T* ladj) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= arguments.x.rows) return;
  const double sum = warp_sum(affine_stride<N, Stored, Parameter>(arguments, row, threadIdx.x % kWarp,
                                                                       arguments.x.width, kWarp));
  if (threadIdx.x % kWarp == 0) ladj[row] = static_cast<T>(sum);
}

template <int N, class Stored, class Parameter, class T>
__global__ void __launch_bounds__(kThreads)
    affine_chunk_kernel(AffineArguments<T> arguments, int64_t chunks, double* partial) {
  SHARED(double, scratch, [32]);
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t to = min(arguments.x.width, (chunk + 1) * kChunk);
  const double sum = block_sum(affine_stride<N, Stored, Parameter>(
                              arguments, row, chunk * (kChunk / N) + threadIdx.x, to, kThreads),
                          scratch);
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

template <int N, class Stored, class Parameter, class T>
void launch_affine(const AffineArguments<T>& arguments, const Tensor& x, Tensor& ladj, Stream stream) {
  const int64_t rows = arguments.x.rows, width = arguments.x.width;
  T* const sums = static_cast<T*>(ladj.mutable_data_ptr());
  if (width <= kWarpWidth) {
    launch(affine_warp_kernel<N, Stored, Parameter, T>, blocks_for(rows, kThreads / kWarp), kThreads, 0,
           stream, arguments, sums);
    return;
  }
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  const Tensor partial = torch::stable::new_empty(x, {rows * chunks}, ScalarType::Double);
  double* const partial_sums = static_cast<double*>(partial.mutable_data_ptr());
  launch(affine_chunk_kernel<N, Stored, Parameter, T>, blocks_for(rows * chunks, 1), kThreads, 0, stream,
         arguments, chunks, partial_sums);
  launch(add_chunks_kernel<T>, blocks_for(rows, kThreads), kThreads, 0, stream, partial_sums, chunks, rows, sums);
}

// Calls f(Stored{}, Parameter{}) for the dtypes of data and parameters; double only with double.
template <class F>
void for_dtypes(ScalarType stored, ScalarType parameter, F&& f) {
  if (stored == ScalarType::Double || parameter == ScalarType::Double) {
    check(stored == parameter, "x and its parameters mix float64 with another dtype, which CUDA does not take");
    f(double{}, double{});
    return;
  }
  for_dtype(stored, [&](auto s) {
    for_dtype(parameter, [&](auto p) {
      if constexpr (!std::is_same_v<decltype(s), double> && !std::is_same_v<decltype(p), double>) f(s, p);
    });
  });
}

std::tuple<Tensor, Tensor> affine(bool inverse, const Tensor& x, const OptionalTensor& raw_scale, const OptionalTensor& shift,
                                  int64_t activation, double limit, double offset, double epsilon,
                                  int64_t event_dims) {
  check_affine(x, raw_scale, shift, activation, event_dims);
  check(!raw_scale || !shift || raw_scale->scalar_type() == shift->scalar_type(),
        "raw_scale and shift have different dtypes, which CUDA does not take");
  Tensor y = empty_like_shape(x, x.scalar_type());
  Tensor ladj = empty_ladj(x, event_dims);
  const ScalarType parameter = raw_scale ? raw_scale->scalar_type() : shift ? shift->scalar_type() : x.scalar_type();
  const Stream stream = current_stream(x.get_device_index());
  for_dtypes(x.scalar_type(), parameter, [&](auto s, auto p) {
    using Stored = decltype(s);
    using Parameter = decltype(p);
    using T = typename arithmetic<Stored>::type;
    constexpr int N = vector_width<Stored, Parameter>();
    AffineArguments<T> arguments{Rows(x, event_dims),
                                 raw_scale ? Rows(*raw_scale, event_dims) : Rows(),
                                 shift ? Rows(*shift, event_dims) : Rows(),
                                 y.mutable_data_ptr(),
                                 static_cast<T>(limit),
                                 static_cast<T>(offset),
                                 static_cast<T>(epsilon),
                                 activation,
                                 inverse};
    const bool wide = arguments.x.width % N == 0 && aligned<Stored>(arguments.x, N) &&
                      aligned<Parameter>(arguments.raw_scale, N) && aligned<Parameter>(arguments.shift, N);
    if (wide) {
      launch_affine<N, Stored, Parameter>(arguments, x, ladj, stream);
    } else {
      launch_affine<1, Stored, Parameter>(arguments, x, ladj, stream);
    }
  });
  return {y, ladj};
}

std::tuple<Tensor, Tensor> affine_forward(const Tensor& x, const OptionalTensor& raw_scale,
                                          const OptionalTensor& shift, int64_t activation, double limit, double offset,
                                          double epsilon, int64_t event_dims) {
  return affine(false, x, raw_scale, shift, activation, limit, offset, epsilon, event_dims);
}

std::tuple<Tensor, Tensor> affine_inverse(const Tensor& y, const OptionalTensor& raw_scale,
                                          const OptionalTensor& shift, int64_t activation, double limit, double offset,
                                          double epsilon, int64_t event_dims) {
  return affine(true, y, raw_scale, shift, activation, limit, offset, epsilon, event_dims);
}

template <class T>
struct BackwardArguments {
  Rows x, raw_scale, grad_output, grad_ladj;
  void *grad_input, *grad_raw_scale;
  T limit, offset, epsilon;
  int64_t activation;
  bool inverse;
};

// Elementwise but for grad_ladj, so a flat grid serves rows of any width; N elements lie in one row.
template <int N, class Stored, class Parameter, class T>
__global__ void __launch_bounds__(kThreads) affine_backward_kernel(BackwardArguments<T> arguments) {
  const int64_t width = arguments.x.width, total = arguments.x.rows * width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
  for (int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; at < total; at += step) {
    const int64_t row = at / width, i = at % width;
    const auto* x = static_cast<const Stored*>(arguments.x.data) + arguments.x.row_offset(row);
    const auto* raw = static_cast<const Parameter*>(arguments.raw_scale.data) + arguments.raw_scale.row_offset(row);
    const auto* grad = static_cast<const Stored*>(arguments.grad_output.data) + arguments.grad_output.row_offset(row);
    const T grad_ladj = static_cast<const T*>(arguments.grad_ladj.data)[arguments.grad_ladj.row_offset(row)];
    T x_values[N], raw_values[N], grad_values[N], inputs[N] = {}, raws[N] = {};
    read<Stored, T, N>(arguments.x, x, i, x_values);
    read<Parameter, T, N>(arguments.raw_scale, raw, i, raw_values);
    read<Stored, T, N>(arguments.grad_output, grad, i, grad_values);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      for_activation(arguments.activation, [&](auto tag) {
        const auto scale = affine_scale_slope<decltype(tag)::value>(raw_values[k] + arguments.offset,
                                                                    arguments.limit, arguments.epsilon);
        const auto gradient = arguments.inverse
                                  ? affine_gradient<true>(x_values[k], scale, grad_values[k], grad_ladj)
                                  : affine_gradient<false>(x_values[k], scale, grad_values[k], grad_ladj);
        inputs[k] = gradient.input;
        raws[k] = gradient.raw_scale;
      });
    }
    write<Stored, T, N>(static_cast<Stored*>(arguments.grad_input) + at, inputs);
    write<Parameter, T, N>(static_cast<Parameter*>(arguments.grad_raw_scale) + at, raws);
  }
}

template <int N, class Stored, class Parameter, class T>
void launch_backward(const BackwardArguments<T>& arguments, Stream stream) {
  const int64_t items = (arguments.x.rows * arguments.x.width + N - 1) / N;
  // A grid that fills any device a few times over; the kernel strides over the rest.
  const int64_t blocks = std::min<int64_t>((items + kThreads - 1) / kThreads, 1 << 16);
  launch(affine_backward_kernel<N, Stored, Parameter, T>, static_cast<unsigned>(blocks), kThreads, 0, stream,
         arguments);
}

std::tuple<Tensor, Tensor> affine_backward(const Tensor& x, const Tensor& raw_scale, const Tensor& grad_output,
                                           const Tensor& grad_ladj, int64_t activation, double limit, double offset,
                                           double epsilon, int64_t event_dims, bool inverse) {
  check_affine(x, raw_scale, grad_output, activation, event_dims);
  check_grad_ladj(x, grad_ladj, event_dims);
  check(grad_output.scalar_type() == x.scalar_type(), "grad_output has another dtype than x");
  check(grad_ladj.scalar_type() == sum_dtype(x), "grad_ladj has another dtype than the log-determinant");
  Tensor grad_input = empty_like_shape(x, x.scalar_type());
  Tensor grad_raw_scale = empty_like_shape(x, raw_scale.scalar_type());
  const Stream stream = current_stream(x.get_device_index());
  for_dtypes(x.scalar_type(), raw_scale.scalar_type(), [&](auto s, auto p) {
    using Stored = decltype(s);
    using Parameter = decltype(p);
    using T = typename arithmetic<Stored>::type;
    constexpr int N = vector_width<Stored, Parameter>();
    const BackwardArguments<T> arguments{Rows(x, event_dims),
                                         Rows(raw_scale, event_dims),
                                         Rows(grad_output, event_dims),
                                         Rows(grad_ladj, 0),
                                         grad_input.mutable_data_ptr(),
                                         grad_raw_scale.mutable_data_ptr(),
                                         static_cast<T>(limit),
                                         static_cast<T>(offset),
                                         static_cast<T>(epsilon),
                                         activation,
                                 inverse};
    const bool wide = arguments.x.width % N == 0 && aligned<Stored>(arguments.x, N) &&
                      aligned<Parameter>(arguments.raw_scale, N) && aligned<Stored>(arguments.grad_output, N);
    if (wide) {
      launch_backward<N, Stored, Parameter>(arguments, stream);
    } else {
      launch_backward<1, Stored, Parameter>(arguments, stream);
    }
  });
  return {grad_input, grad_raw_scale};
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("affine_forward", TORCH_BOX(&affine_forward));
  library.impl("affine_inverse", TORCH_BOX(&affine_inverse));
  library.impl("affine_backward", TORCH_BOX(&affine_backward));
}

}  // namespace
}  // namespace pygen
