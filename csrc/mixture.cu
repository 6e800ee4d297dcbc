// The logistic mixture on CUDA: one thread per element, its parameters in shared memory.
#include "mixture.h"

#include "ladj.h"
#include "mixture_checks.h"
#include "simt.h"
#include "tensor.h"
#include "tiles.h"

namespace pygen {
namespace {

template <class T>
struct MixtureArguments {
  tiles::Parts parameters;
  Rows x;  // all elements in one row, as are those below
  tiles::Output y;
  T* ladj;
};

template <class T>
struct BackwardArguments {
  tiles::Parts parameters;
  Rows x, grad_output, grad_ladj;
  int64_t elements, width;
  tiles::Output grad_input, grad_parameters;
};

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
__global__ void __launch_bounds__(tiles::kMaxThreads)
    mixture_kernel(MixtureArguments<T> arguments, tiles::Plan plan, double* partial) {
  tiles::map_elements(arguments.parameters, plan, arguments.ladj, partial, [&](int64_t i, T* own) {
    const Element<T> element(own, arguments.parameters.columns / 3);
    const T value = tiles::read_one<T>(arguments.x, i);
    if constexpr (kInverse) {
      const Search<T> search = solve(element, value);
      tiles::write_one(arguments.y, i, search.x);
      return search.ladj;
    } else {
      const Sum<T> sum = sum_components<false>(element, value);
      const Curve<T> curve = mixture_curve(sum.terms, sum.peak.exponent);
      tiles::write_one(arguments.y, i, curve.y);
      return curve.log_slope;
    }
  });
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
__global__ void __launch_bounds__(tiles::kMaxThreads) mixture_backward_kernel(BackwardArguments<T> arguments) {
  tiles::replace_parameters<T>(
      arguments.parameters, arguments.elements, arguments.grad_parameters, [&](int64_t i, T* own) {
        const Element<T> element(own, arguments.parameters.columns / 3);
        const T x = tiles::read_one<T>(arguments.x, i), grad_output = tiles::read_one<T>(arguments.grad_output, i);
        const T grad_ladj = tiles::read_one<T>(arguments.grad_ladj, i / arguments.width);
        tiles::write_one(arguments.grad_input, i, element_backward<kInverse>(element, x, grad_output, grad_ladj));
      });
}

std::tuple<Tensor, Tensor> mixture(bool inverse, const Tensor& x, const std::vector<Tensor>& parameters,
                                   int64_t event_dims) {
  check_mixture(x, parameters, event_dims);
  Tensor y = empty_like_shape(x, x.scalar_type());
  Tensor ladj = empty_ladj(x, event_dims);
  if (x.numel() == 0) {
    torch::stable::zero_(ladj);
    return {y, ladj};
  }
  const OnDevice device(x.get_device_index());
  auto run = [&](auto type) {
    using T = decltype(type);
    const MixtureArguments<T> arguments{tiles::Parts(parameters), Rows(x, x.dim()), tiles::Output(y),
                                        static_cast<T*>(ladj.mutable_data_ptr())};
    auto kernel = inverse ? mixture_kernel<true, T> : mixture_kernel<false, T>;
    tiles::launch_rows(x, Rows(x, event_dims).width, arguments.parameters, device.stream(), arguments.ladj,
                       [&](const tiles::Plan& plan, unsigned blocks, size_t shared, double* partial) {
                         launch(kernel, blocks, plan.threads, shared, device.stream(), arguments, plan, partial);
                       });
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
  if (x.numel() == 0) return {grad_input, grad_parameters};
  const OnDevice device(x.get_device_index());
  auto run = [&](auto type) {
    using T = decltype(type);
    const BackwardArguments<T> arguments{tiles::Parts(parameters),
                                         Rows(x, x.dim()),
                                         Rows(grad_output, x.dim()),
                                         Rows(grad_ladj, grad_ladj.dim()),
                                         x.numel(),
                                         Rows(x, event_dims).width,
                                         tiles::Output(grad_input),
                                         tiles::Output(grad_parameters)};
    auto kernel = inverse ? mixture_backward_kernel<true, T> : mixture_backward_kernel<false, T>;
    tiles::launch_elements<T>(kernel, arguments, x.numel(), arguments.parameters.padded, device.stream());
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
