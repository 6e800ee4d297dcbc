// The logistic mixture on CUDA: one thread an element. A block stages the parameters of its elements in shared memory,
// neighbouring threads reading neighbouring numbers, and the backward leaves the gradients in their place. The log
// slopes of a row are added in a fixed order by a second kernel: results repeat bit for bit.
#include "mixture.h"

#include "ladj.h"
#include "lanes.h"
#include "mixture_checks.h"
#include "simt.h"
#include "tensor.h"
#include "vector.h"

namespace pygen {
namespace {

constexpr int kWarp = 32;
constexpr int kMostElements = 128;  // of a block
constexpr int64_t kStagedBytes = 48 * 1024;
constexpr int kRowThreads = 256;
constexpr int64_t kWarpWidth = 1024;  // rows up to this width are added by a warp each

struct Output {
  void* data;
  ScalarType dtype;
};

// One packed tensor, or logits, means and log scales.
struct Parts {
  Records parts[3];
  bool planar[3];
  int count = 0, components = 0;
  int stride = 0;  // of an element in shared memory: odd, so that threads reach different banks
};

template <class T>
struct MixtureArguments {
  Parts parameters;
  Rows x;  // all elements in one row, as are those below
  int64_t elements;
  Output y;
  T* slopes;  // log dy/dx, or minus it, of each element
};

template <class T>
struct BackwardArguments {
  Parts parameters;
  Rows x, grad_output, grad_ladj;
  int64_t elements, width;
  Output grad_input, grad_parameters;
};

template <class T>
__device__ __forceinline__ T load(const Rows& rows, int64_t element) {
  T value;
  load_vector<1>(rows.data, rows.dtype, rows.event_offset(element), 1, true, &value);
  return value;
}

template <class T>
__device__ __forceinline__ void store(const Output& output, int64_t at, T value) {
  store_vector<1>(output.data, output.dtype, at, 1, true, &value);
}

// The parameters of elements first .. first + count.
template <class T>
__device__ __forceinline__ void stage(const Parts& parameters, int64_t first, int count, T* shared) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int offset = 0;
  for (int p = 0; p < parameters.count; ++p) {
    const Records& part = parameters.parts[p];
    const int values = static_cast<int>(part.count);
    // What lies side by side in memory goes to neighbouring threads: elements, or one element's parameters.
    const bool planar = parameters.planar[p];
    const int begin = planar ? thread : thread / kWarp, step = planar ? threads : threads / kWarp;
    for (int e = begin; e < count; e += step) {
      const int64_t from = part.elements.event_offset(first + e);
      T* const to = shared + e * parameters.stride + offset;
      for (int k = planar ? 0 : thread % kWarp; k < values; k += planar ? 1 : kWarp) {
        load_vector<1>(part.elements.data, part.elements.dtype, from + k * part.stride, 1, true, to + k);
      }
    }
    offset += values;
  }
  __syncthreads();
}

// One element's parameters in shared memory.
template <class T>
struct Element {
  T *logit, *mean, *log_scale;
  int components;

  __device__ __forceinline__ Element(T* at, int count)
      : logit(at), mean(at + count), log_scale(at + 2 * count), components(count) {
    T peak = logit[0];
    for (int k = 1; k < components; ++k) peak = larger(peak, logit[k]);
    for (int k = 0; k < components; ++k) {
      logit[k] -= peak;
      log_scale[k] = bounded_log_scale(log_scale[k]);
    }
  }

  __device__ __forceinline__ T inverse_scale(int k) const { return scalar::exp(-log_scale[k]); }
};

template <class T>
struct Sum {
  Peaks<T> peak;
  Terms<T> terms;
  T rate, turn;
};

template <bool kBend, class T>
__device__ __forceinline__ Sum<T> sum_components(const Element<T>& element, T x) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  Exponents<T> peak{kLowest, kLowest, kLowest};
  for (int k = 0; k < element.components; ++k) {
    const T z = (x - element.mean[k]) * element.inverse_scale(k);
    const Exponents<T> own = component_exponents(element.logit[k], z);
    peak.below = larger(peak.below, own.below);
    peak.above = larger(peak.above, own.above);
    peak.density = larger(peak.density, own.density);
  }
  Sum<T> sum{{peak, peak_ratio(peak.density, peak.below), peak_ratio(peak.density, peak.above)},
             {T(0), T(0), T(0)},
             T(0),
             T(0)};
  for (int k = 0; k < element.components; ++k) {
    const T inverse_scale = element.inverse_scale(k), z = (x - element.mean[k]) * inverse_scale;
    const Sigmoids<T> sigmoid = both_sigmoids(z);
    const Terms<T> terms = component_terms(element.logit[k], z, inverse_scale, sigmoid.larger, sum.peak);
    sum.terms.below += terms.below;
    sum.terms.above += terms.above;
    sum.terms.density += terms.density;
    if constexpr (kBend) {
      const T rate = terms.density * inverse_scale;
      sum.rate += rate;
      sum.turn += rate * sigmoid.difference;
    }
  }
  return sum;
}

// The bracket of the components' own quantiles, and their mean as the first guess.
template <class T>
__device__ __forceinline__ Search<T> begin_search(const Element<T>& element, T target) {
  T low = std::numeric_limits<T>::infinity(), high = -low, weights = 0, mean = 0;
  for (int k = 0; k < element.components; ++k) {
    const T quantile = element.mean[k] + scalar::exp(element.log_scale[k]) * target;
    const T weight = scalar::exp(element.logit[k]);
    low = -larger(-low, -quantile);
    high = larger(high, quantile);
    weights += weight;
    mean += weight * quantile;
  }
  return {scalar::at_most(scalar::at_least(mean / weights, low), high), low, high, high - low, T(0), T(1)};
}

template <class T>
__device__ __forceinline__ Search<T> solve(const Element<T>& element, T target) {
  Search<T> search = begin_search(element, target);
  for (int step = 0; step < kMaxSteps && search.open != T(0); ++step) {
    const Sum<T> sum = sum_components<true>(element, search.x);
    const Curve<T> curve = mixture_curve(sum.terms, sum.peak.exponent);
    const Bend<T> bend =
        mixture_bend(curve.log_over_below, curve.log_over_above, sum.terms.density, sum.rate, sum.turn);
    search = advance(search, target, curve.y, curve.log_slope, bend.derivative, bend.bound);
  }
  return search;
}

template <bool kInverse, class T>
__global__ void __launch_bounds__(kMostElements) mixture_kernel(MixtureArguments<T> arguments) {
  T* const shared = dynamic_shared<T>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x, at = first + threadIdx.x;
  const Parts& parameters = arguments.parameters;
  stage(parameters, first, static_cast<int>(min(static_cast<int64_t>(blockDim.x), arguments.elements - first)), shared);
  if (at >= arguments.elements) return;
  const Element<T> element(shared + threadIdx.x * parameters.stride, parameters.components);
  const T value = load<T>(arguments.x, at);
  if constexpr (kInverse) {
    const Search<T> search = solve(element, value);
    store(arguments.y, at, search.x);
    arguments.slopes[at] = search.ladj;
  } else {
    const Sum<T> sum = sum_components<false>(element, value);
    const Curve<T> curve = mixture_curve(sum.terms, sum.peak.exponent);
    store(arguments.y, at, curve.y);
    arguments.slopes[at] = curve.log_slope;
  }
}

// One element's gradient of x; those of its parameters take their place.
template <bool kInverse, class T>
__device__ __forceinline__ T element_backward(const Element<T>& element, T x, T grad_output, T grad_ladj) {
  const Sum<T> sum = sum_components<kInverse>(element, x);
  const Curve<T> curve = mixture_curve(sum.terms, sum.peak.exponent);
  T grad_input = 0;
  Upstream<T> upstream{grad_output, grad_ladj};
  if constexpr (kInverse) {
    const Bend<T> bend =
        mixture_bend(curve.log_over_below, curve.log_over_above, sum.terms.density, sum.rate, sum.turn);
    grad_input = implicit_gradient(grad_output, grad_ladj, curve.log_slope, bend.derivative);
    upstream = {-grad_input, -grad_ladj};
  }
  const Terms<T> over{T(1) / sum.terms.below, T(1) / sum.terms.above, T(1) / sum.terms.density};
  const Sigmoids<T> sigmoid_y = both_sigmoids(curve.y);
  for (int k = 0; k < element.components; ++k) {
    const T log_scale = element.log_scale[k], inverse_scale = element.inverse_scale(k);
    const T z = (x - element.mean[k]) * inverse_scale;
    const Sigmoids<T> sigmoid = both_sigmoids(z);
    const Terms<T> terms = component_terms(element.logit[k], z, inverse_scale, sigmoid.larger, sum.peak);
    const ComponentGradient<T> gradient =
        component_gradient<T>({terms.below * over.below, terms.above * over.above, terms.density * over.density}, z,
                              log_scale, inverse_scale, sigmoid, sigmoid_y.positive, sigmoid_y.negative, upstream);
    element.logit[k] = gradient.logit;
    element.mean[k] = gradient.mean;
    element.log_scale[k] = gradient.log_scale;
    if constexpr (!kInverse) grad_input -= gradient.mean;
  }
  return grad_input;
}

template <bool kInverse, class T>
__global__ void __launch_bounds__(kMostElements) mixture_backward_kernel(BackwardArguments<T> arguments) {
  T* const shared = dynamic_shared<T>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x, at = first + threadIdx.x;
  const int count = static_cast<int>(min(static_cast<int64_t>(blockDim.x), arguments.elements - first));
  const Parts& parameters = arguments.parameters;
  stage(parameters, first, count, shared);
  if (at < arguments.elements) {
    const Element<T> element(shared + threadIdx.x * parameters.stride, parameters.components);
    const T grad_input =
        element_backward<kInverse>(element, load<T>(arguments.x, at), load<T>(arguments.grad_output, at),
                                   load<T>(arguments.grad_ladj, at / arguments.width));
    store(arguments.grad_input, at, grad_input);
  }
  __syncthreads();
  const int values = 3 * parameters.components;
  for (int e = static_cast<int>(threadIdx.x) / kWarp; e < count; e += static_cast<int>(blockDim.x) / kWarp) {
    for (int k = static_cast<int>(threadIdx.x) % kWarp; k < values; k += kWarp) {
      store(arguments.grad_parameters, (first + e) * values + k, shared[e * parameters.stride + k]);
    }
  }
}

// A row by `threads` neighbouring threads: a warp, or the block.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    add_rows_kernel(const T* slopes, int64_t rows, int64_t width, int threads, T* ladj) {
  SHARED(double, scratch, [32]);
  const int per_block = kRowThreads / threads, rank = static_cast<int>(threadIdx.x) % threads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * per_block + threadIdx.x / threads;
  double sum = 0;
  if (row < rows) {
    for (int64_t i = rank; i < width; i += threads) sum += slopes[row * width + i];
  }
  sum = threads == kWarp ? warp_sum(sum) : block_sum(sum, scratch);
  if (row < rows && rank == 0) ladj[row] = static_cast<T>(sum);
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  check(blocks <= 0x7fffffff, "x has too many elements for one launch: ", items);
  return static_cast<unsigned>(blocks);
}

Parts parts_of(const std::vector<Tensor>& parameters, int64_t components) {
  Parts all;
  for (const Tensor& part : parameters) {
    all.parts[all.count] = Records(part);
    all.planar[all.count] = all.parts[all.count].planar();
    ++all.count;
  }
  all.components = static_cast<int>(components);
  all.stride = static_cast<int>(3 * components) | 1;
  return all;
}

// As many elements to a block as leave room for several blocks on a multiprocessor.
template <class T, class Arguments>
void launch_elements(void (*kernel)(Arguments), const Arguments& arguments, Stream stream) {
  const int64_t bytes = arguments.parameters.stride * static_cast<int64_t>(sizeof(T));
  int elements = kMostElements;
  while (elements > kWarp && elements * bytes > kStagedBytes) elements /= 2;
  launch(kernel, blocks_for(arguments.elements, elements), elements, static_cast<size_t>(elements * bytes), stream,
         arguments);
}

std::tuple<Tensor, Tensor> mixture(bool inverse, const Tensor& x, const std::vector<Tensor>& parameters,
                                   int64_t event_dims) {
  const int64_t components = check_mixture(x, parameters, event_dims);
  Tensor y = empty_like_shape(x, x.scalar_type());
  Tensor ladj = empty_ladj(x, event_dims);
  const OnDevice device(x.get_device_index());
  const Rows shape(x, event_dims);
  // With one element to a row its log slope is the row's.
  const Tensor slopes = shape.width == 1 ? ladj : empty_like_shape(x, sum_dtype(x));
  auto run = [&](auto type) {
    using T = decltype(type);
    const MixtureArguments<T> arguments{parts_of(parameters, components),
                                        Rows(x, x.dim()),
                                        shape.rows * shape.width,
                                        {y.mutable_data_ptr(), y.scalar_type()},
                                        static_cast<T*>(slopes.mutable_data_ptr())};
    launch_elements<T>(inverse ? &mixture_kernel<true, T> : &mixture_kernel<false, T>, arguments, device.stream());
    if (shape.width == 1) return;
    const int threads = shape.width > kWarpWidth ? kRowThreads : kWarp;
    launch(add_rows_kernel<T>, blocks_for(shape.rows, kRowThreads / threads), kRowThreads, 0, device.stream(),
           arguments.slopes, shape.rows, shape.width, threads, static_cast<T*>(ladj.mutable_data_ptr()));
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {y, ladj};
}

std::tuple<Tensor, Tensor> logistic_mixture_forward(const Tensor& x, const std::vector<Tensor>& parameters,
                                                    int64_t event_dims) {
  return mixture(false, x, parameters, event_dims);
}

std::tuple<Tensor, Tensor> logistic_mixture_inverse(const Tensor& y, const std::vector<Tensor>& parameters,
                                                    int64_t event_dims) {
  return mixture(true, y, parameters, event_dims);
}

std::tuple<Tensor, Tensor> logistic_mixture_backward(const Tensor& x, const std::vector<Tensor>& parameters,
                                                     const Tensor& grad_output, const Tensor& grad_ladj,
                                                     int64_t event_dims, bool inverse) {
  const int64_t components = check_mixture(x, parameters, event_dims);
  check_gradients(x, grad_output, grad_ladj, event_dims);
  Tensor grad_input = empty_like_shape(x, x.scalar_type());
  Tensor grad_parameters = empty_parameter_gradient(x, parameters, 3 * components);
  const OnDevice device(x.get_device_index());
  const Rows shape(x, event_dims);
  auto run = [&](auto type) {
    using T = decltype(type);
    const BackwardArguments<T> arguments{parts_of(parameters, components),
                                         Rows(x, x.dim()),
                                         Rows(grad_output, x.dim()),
                                         Rows(grad_ladj, grad_ladj.dim()),
                                         shape.rows * shape.width,
                                         shape.width,
                                         {grad_input.mutable_data_ptr(), grad_input.scalar_type()},
                                         {grad_parameters.mutable_data_ptr(), grad_parameters.scalar_type()}};
    launch_elements<T>(inverse ? &mixture_backward_kernel<true, T> : &mixture_backward_kernel<false, T>, arguments,
                       device.stream());
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {grad_input, grad_parameters};
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("logistic_mixture_forward", TORCH_BOX(&logistic_mixture_forward));
  library.impl("logistic_mixture_inverse", TORCH_BOX(&logistic_mixture_inverse));
  library.impl("logistic_mixture_backward", TORCH_BOX(&logistic_mixture_backward));
}

}  // namespace
}  // namespace pygen
