// Rational-quadratic splines on CUDA: one thread per element. A block takes a tile of neighbouring elements, whose
// parameters it moves through shared memory 16 bytes at a time, and their gradients back. Log-determinants are added
// into fixed places (no atomics: results repeat bit for bit).
#include "spline.h"

#include <tuple>

#include "simt.h"
#include "spline_checks.h"
#include "tensor.h"
#include "vector.h"

namespace pygen {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 128;
constexpr size_t kSharedTarget = 48 * 1024;  // a tile above this leaves too few blocks on a multiprocessor
constexpr int64_t kChunk = 512;              // elements of a long row that one block takes
constexpr int kSerial = 16;                  // rows up to this width are added by one thread, longer ones by a warp
constexpr int kVector = 4;

// One of the tensors that hold parameters, (..., columns).
struct Part {
  Rows elements;   // the first parameter of each element, in one row
  int64_t stride;  // between an element's parameters
  int columns;
  bool dense;  // all parameters of all elements lie side by side
  int phase;   // elements past a whole vector at which they begin

  Part() = default;
  explicit Part(const Tensor& x)
      : elements(x, x.dim() - 1, 1),
        stride(x.stride(x.dim() - 1)),
        columns(static_cast<int>(x.size(x.dim() - 1))),
        dense(Rows(x, x.dim()).dense()),
        phase(phase_of(x)) {}

  static int phase_of(const Tensor& x) {
    return for_dtype(x.scalar_type(), [&](auto element) {
      return static_cast<int>(reinterpret_cast<uintptr_t>(x.data_ptr()) / sizeof(element) % kVector);
    });
  }
};

template <class T>
struct SplineArguments {
  Rows x;
  Part parts[3];
  int count;   // of parts
  int padded;  // numbers an element takes in shared memory: odd, so that neighbours lie in different banks
  int64_t elements, width;
  SplineOptions<T> options;
  T bounds[4], tails;
  const T* table;  // (5, columns) bounds and tails where they differ along the last dimension
  int64_t columns;

  SplineArguments(const Tensor& input, const std::vector<Tensor>& parameters, const SplineSettings& settings)
      : x(input, input.dim()),
        count(static_cast<int>(parameters.size())),
        elements(input.numel()),
        width(event_width(input, settings.event_dims)),
        options(settings.options<T>()),
        tails(static_cast<T>(settings.tails)),
        table(settings.dimensions ? static_cast<const T*>(settings.dimensions->data_ptr()) : nullptr),
        columns(settings.dimensions ? settings.dimensions->size(1) : 1) {
    for (int i = 0; i < count; ++i) parts[i] = Part(parameters[static_cast<size_t>(i)]);
    for (int i = 0; i < 4; ++i) bounds[i] = static_cast<T>(settings.bounds[static_cast<size_t>(i)]);
    padded = options.parameters() | 1;
  }

  __device__ __forceinline__ SplineBounds<1, T> bounds_of(int64_t element) const {
    if (!table) return {{bounds[0]}, {bounds[1]}, {bounds[2]}, {bounds[3]}, {tails}};
    const T* at = table + element % columns;
    return {{at[0]}, {at[columns]}, {at[2 * columns]}, {at[3 * columns]}, {at[4 * columns]}};
  }
};

template <class T>
__device__ __forceinline__ T read_one(const Rows& rows, int64_t i) {
  T value;
  load_vector<1>(rows.data, rows.dtype, rows.event_offset(i), 1, true, &value);
  return value;
}

// Calls move(at, count, whole, position) for the vectors of `columns` numbers each of n elements, of which the first
// is `first` numbers into a tensor that begins `phase` numbers past a whole vector: `at` counts from that tensor's
// beginning, and position(k) is where number at + k is in shared memory.
template <class Move>
__device__ __forceinline__ void for_vectors(int64_t first, int n, int columns, int phase, int padded, int offset,
                                            const Move& move) {
  const int total = n * columns, lead = static_cast<int>((first + phase) % kVector);
  for (int from = static_cast<int>(threadIdx.x) * kVector - lead; from < total;
       from += static_cast<int>(blockDim.x) * kVector) {
    const int begin = max(from, 0), end = min(from + kVector, total);
    int element = begin / columns, column = begin % columns, positions[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      positions[k] = element * padded + offset + column;
      if (++column == columns) {
        column = 0;
        ++element;
      }
    }
    move(first + begin, end - begin, end - begin == kVector, positions);
  }
}

// The parameters of n elements into shared memory, an element's own one after another.
template <class T>
__device__ __forceinline__ void stage(const SplineArguments<T>& arguments, int64_t first, int n, T* shared) {
  int offset = 0;
  for (int i = 0; i < arguments.count; ++i) {
    const Part& part = arguments.parts[i];
    const void* data = part.elements.data;
    const ScalarType dtype = part.elements.dtype;
    if (part.dense) {
      for_vectors(first * part.columns, n, part.columns, part.phase, arguments.padded, offset,
                  [&](int64_t at, int count, bool whole, const int* positions) {
                    T values[kVector];
                    load_vector<kVector>(data, dtype, at, count, whole, values);
#pragma unroll
                    for (int k = 0; k < kVector; ++k) {
                      if (k < count) shared[positions[k]] = values[k];
                    }
                  });
    } else if (static_cast<int>(threadIdx.x) < n) {
      const int64_t from = part.elements.event_offset(first + threadIdx.x);
      T* const to = shared + static_cast<int>(threadIdx.x) * arguments.padded + offset;
      for (int j = 0; j < part.columns; ++j) load_vector<1>(data, dtype, from + j * part.stride, 1, true, to + j);
    }
    offset += part.columns;
  }
}

// How elements are dealt to blocks: tiles of whole rows where rows are short, chunks of a row where they are long.
struct Plan {
  int threads, tile;
  int64_t rows, width, chunks, chunk;  // chunks of a row, and elements of one; chunks is 0 for tiles of whole rows

  Plan(int64_t elements, int64_t row_width, int block)
      : threads(block), tile(block), rows(elements / row_width), width(row_width) {
    if (width <= block) {
      tile = static_cast<int>(block / width * width);
      chunks = 0;
      chunk = tile;
    } else {
      chunks = (width + kChunk - 1) / kChunk;
      chunk = (width + chunks - 1) / chunks;
      const int64_t tiles = (chunk + block - 1) / block;
      tile = static_cast<int>((chunk + tiles - 1) / tiles);
    }
  }

  int64_t blocks() const { return chunks ? rows * chunks : (rows * width + tile - 1) / tile; }
};

template <Parametrization P, bool kInverse, class T>
__global__ void __launch_bounds__(kMaxThreads)
    spline_kernel(SplineArguments<T> arguments, Plan plan, void* y, ScalarType y_dtype, T* ladj, double* partial) {
  T* const shared = dynamic_shared<T>();
  SHARED(double, scratch, [32]);
  SHARED(T, logarithms, [kMaxThreads]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x;
  int64_t first = block * plan.chunk, last = min(first + plan.chunk, arguments.elements);
  if (plan.chunks) {
    const int64_t row = block / plan.chunks;
    first = row * plan.width + block % plan.chunks * plan.chunk;
    last = min(first + plan.chunk, (row + 1) * plan.width);
  }
  double sum = 0;
  T logarithm = T(0);
  for (int64_t from = first; from < last; from += plan.tile) {
    const int n = static_cast<int>(min(static_cast<int64_t>(plan.tile), last - from));
    __syncthreads();  // the tile before may still be in use
    stage(arguments, from, n, shared);
    __syncthreads();
    if (thread < n) {
      const T value = read_one<T>(arguments.x, from + thread);
      const SplineBounds<1, T> bounds = arguments.bounds_of(from + thread);
      T image;
      spline<P, kInverse, 1>(&value, shared + thread * arguments.padded, bounds, arguments.options, &image, &logarithm);
      store_vector<1>(y, y_dtype, from + thread, 1, true, &image);
      sum += static_cast<double>(logarithm);
    }
  }
  if (plan.chunks) {
    sum = block_sum(sum, scratch);
    if (thread == 0 && plan.chunks == 1) ladj[block] = static_cast<T>(sum);
    if (thread == 0 && plan.chunks > 1) partial[block] = sum;
    return;
  }
  logarithms[thread] = logarithm;
  __syncthreads();
  const int width = static_cast<int>(plan.width), rows = static_cast<int>((last - first) / plan.width);
  const int64_t first_row = first / plan.width;
  if (width <= kSerial) {
    for (int row = thread; row < rows; row += plan.threads) {
      double row_sum = 0;
      for (int i = 0; i < width; ++i) row_sum += static_cast<double>(logarithms[row * width + i]);
      ladj[first_row + row] = static_cast<T>(row_sum);
    }
    return;
  }
  for (int row = thread / kWarp; row < rows; row += plan.threads / kWarp) {
    double row_sum = 0;
    for (int i = thread % kWarp; i < width; i += kWarp) row_sum += static_cast<double>(logarithms[row * width + i]);
    row_sum = warp_sum(row_sum);
    if (thread % kWarp == 0) ladj[first_row + row] = static_cast<T>(row_sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) spline_ladj_kernel(const double* partial, int64_t chunks, T* ladj) {
  SHARED(double, scratch, [32]);
  const int64_t row = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += blockDim.x) sum += partial[row * chunks + i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) ladj[row] = static_cast<T>(sum);
}

template <class T>
struct GradientArguments {
  SplineArguments<T> spline;
  Rows grad_output, grad_ladj;
  void *grad_input, *grad_parameters;
  ScalarType input_dtype, parameter_dtype;
};

template <Parametrization P, bool kInverse, class T>
__global__ void __launch_bounds__(kMaxThreads) spline_backward_kernel(GradientArguments<T> arguments) {
  const SplineArguments<T>& spline = arguments.spline;
  T* const shared = dynamic_shared<T>();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * threads, i = first + thread;
  const int n = static_cast<int>(min(static_cast<int64_t>(threads), spline.elements - first));
  stage(spline, first, n, shared);
  __syncthreads();
  if (thread < n) {
    const T x = read_one<T>(spline.x, i), grad_output = read_one<T>(arguments.grad_output, i);
    const T grad_ladj = read_one<T>(arguments.grad_ladj, i / spline.width);
    T* const own = shared + thread * spline.padded;
    // softclip's gradient needs the parameters once more.
    const int exponentials = 2 * spline.options.bins;
    T* const exps =
        P == Parametrization::kSoftclip ? shared + threads * spline.padded + thread * (exponentials | 1) : own;
    T grad_input;
    spline_gradient<P, kInverse, 1>(&x, own, &grad_output, &grad_ladj, spline.bounds_of(i), spline.options, exps,
                                    &grad_input, own);
    store_vector<1>(arguments.grad_input, arguments.input_dtype, i, 1, true, &grad_input);
  }
  __syncthreads();
  const int columns = spline.options.parameters();
  for_vectors(first * columns, n, columns, 0, spline.padded, 0,
              [&](int64_t at, int count, bool whole, const int* positions) {
                T values[kVector];
#pragma unroll
                for (int k = 0; k < kVector; ++k) values[k] = k < count ? shared[positions[k]] : T(0);
                store_vector<kVector>(arguments.grad_parameters, arguments.parameter_dtype, at, count, whole, values);
              });
}

unsigned grid_of(int64_t blocks) {
  check(blocks <= 0x7fffffff, "x has too many elements for one launch: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

// Threads of a block, each with `numbers` of its own in shared memory.
template <class T>
int threads_for(int numbers) {
  int threads = kMaxThreads;
  while (threads > kWarp && sizeof(T) * static_cast<size_t>(numbers * threads) > kSharedTarget) threads /= 2;
  return threads;
}

template <bool kInverse>
std::tuple<Tensor, Tensor> spline_values(const Tensor& x, const std::vector<Tensor>& parameters,
                                         const std::optional<Tensor>& dimensions, int64_t bins, int64_t tails,
                                         std::vector<double> bounds, std::vector<double> minimums,
                                         int64_t parametrization, double sharpness, double boundary_slope, double scale,
                                         int64_t event_dims) {
  const SplineSettings settings{dimensions,      bins,      tails,          bounds, minimums,
                                parametrization, sharpness, boundary_slope, scale,  event_dims};
  check_spline(x, parameters, settings);
  Tensor y = empty_like_shape(x, x.scalar_type());
  Tensor ladj = empty_spline_ladj(x, event_dims);
  if (x.numel() == 0) {
    torch::stable::zero_(ladj);
    return {y, ladj};
  }
  const OnDevice device(x.get_device_index());
  const Stream stream = device.stream();
  auto run = [&](auto type) {
    using T = decltype(type);
    const SplineArguments<T> arguments(x, parameters, settings);
    const Plan plan(arguments.elements, arguments.width, threads_for<T>(arguments.padded));
    const size_t shared = sizeof(T) * static_cast<size_t>(plan.threads * arguments.padded);
    T* const sums = static_cast<T*>(ladj.mutable_data_ptr());
    Tensor parts = torch::stable::new_empty(x, {plan.chunks > 1 ? plan.blocks() : 0}, ScalarType::Double);
    double* const partial = static_cast<double*>(parts.mutable_data_ptr());
    for_parametrization(parametrization, [&](auto tag) {
      launch(spline_kernel<decltype(tag)::value, kInverse, T>, grid_of(plan.blocks()), plan.threads, shared, stream,
             arguments, plan, y.mutable_data_ptr(), y.scalar_type(), sums, partial);
    });
    if (plan.chunks > 1) {
      launch(spline_ladj_kernel<T>, grid_of(plan.rows), kMaxThreads, 0, stream, partial, plan.chunks, sums);
    }
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {y, ladj};
}

std::tuple<Tensor, Tensor> spline_backward(const Tensor& x, const std::vector<Tensor>& parameters,
                                           const std::optional<Tensor>& dimensions, const Tensor& grad_output,
                                           const Tensor& grad_ladj, int64_t bins, int64_t tails,
                                           std::vector<double> bounds, std::vector<double> minimums,
                                           int64_t parametrization, double sharpness, double boundary_slope,
                                           double scale, int64_t event_dims, bool inverse) {
  const SplineSettings settings{dimensions,      bins,      tails,          bounds, minimums,
                                parametrization, sharpness, boundary_slope, scale,  event_dims};
  check_spline(x, parameters, settings);
  check_spline_gradients(x, grad_output, grad_ladj, settings);
  Tensor grad_input = empty_like_shape(x, x.scalar_type());
  Tensor grad_parameters = empty_parameter_gradient(x, parameters, settings.options<float>().parameters());
  if (x.numel() == 0) return {grad_input, grad_parameters};
  const OnDevice device(x.get_device_index());
  const Stream stream = device.stream();
  auto run = [&](auto type) {
    using T = decltype(type);
    const GradientArguments<T> arguments{SplineArguments<T>(x, parameters, settings),
                                         Rows(grad_output, x.dim()),
                                         Rows(grad_ladj, grad_ladj.dim()),
                                         grad_input.mutable_data_ptr(),
                                         grad_parameters.mutable_data_ptr(),
                                         grad_input.scalar_type(),
                                         grad_parameters.scalar_type()};
    const int64_t elements = arguments.spline.elements;
    for_parametrization(parametrization, [&](auto tag) {
      constexpr Parametrization kParametrization = decltype(tag)::value;
      const int exponentials = kParametrization == Parametrization::kSoftclip ? static_cast<int>(2 * bins) | 1 : 0;
      const int numbers = arguments.spline.padded + exponentials;
      const int threads = threads_for<T>(numbers);
      const unsigned blocks = grid_of((elements + threads - 1) / threads);
      const size_t shared = sizeof(T) * static_cast<size_t>(threads * numbers);
      auto kernel = inverse ? spline_backward_kernel<kParametrization, true, T>
                            : spline_backward_kernel<kParametrization, false, T>;
      launch(kernel, blocks, threads, shared, stream, arguments);
    });
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {grad_input, grad_parameters};
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("rational_quadratic_spline_forward", TORCH_BOX(&spline_values<false>));
  library.impl("rational_quadratic_spline_inverse", TORCH_BOX(&spline_values<true>));
  library.impl("rational_quadratic_spline_backward", TORCH_BOX(&spline_backward));
}

}  // namespace
}  // namespace pygen
