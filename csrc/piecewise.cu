// Piecewise polynomial splines on CUDA: one thread per element, its parameters in shared memory.
#include "piecewise.h"

#include <tuple>

#include "piecewise_checks.h"
#include "simt.h"
#include "tensor.h"
#include "tiles.h"

namespace pygen {
namespace {

template <class T>
struct ValueArguments {
  Rows x;
  tiles::Parts parameters;
  PiecewiseOptions<T> options;
  tiles::Output y;
  T* ladj;
};

template <Degree D, bool kInverse, class T>
__global__ void __launch_bounds__(tiles::kMaxThreads)
    piecewise_kernel(ValueArguments<T> arguments, tiles::Plan plan, double* partial) {
  tiles::map_elements(arguments.parameters, plan, arguments.ladj, partial, [&](int64_t i, T* own) {
    const T value = tiles::read_one<T>(arguments.x, i);
    T image, logarithm;
    piecewise<D, kInverse, 1>(&value, own, arguments.options, &image, &logarithm);
    tiles::write_one(arguments.y, i, image);
    return logarithm;
  });
}

template <class T>
struct GradientArguments {
  Rows x, grad_output, grad_ladj;
  tiles::Parts parameters;
  PiecewiseOptions<T> options;
  int64_t elements, width;
  tiles::Output grad_input, grad_parameters;
};

template <Degree D, bool kInverse, class T>
__global__ void __launch_bounds__(tiles::kMaxThreads) piecewise_backward_kernel(GradientArguments<T> arguments) {
  tiles::replace_parameters<T>(
      arguments.parameters, arguments.elements, arguments.grad_parameters, [&](int64_t i, T* own) {
        const T x = tiles::read_one<T>(arguments.x, i), grad_output = tiles::read_one<T>(arguments.grad_output, i);
        const T grad_ladj = tiles::read_one<T>(arguments.grad_ladj, i / arguments.width);
        T grad_input;
        piecewise_gradient<D, kInverse, 1>(&x, own, &grad_output, &grad_ladj, arguments.options, &grad_input);
        tiles::write_one(arguments.grad_input, i, grad_input);
      });
}

template <bool kInverse>
std::tuple<Tensor, Tensor> piecewise_values(const Tensor& x, const std::vector<Tensor>& parameters, int64_t degree,
                                            int64_t bins, bool tails, std::vector<double> bounds,
                                            std::vector<double> minimums, double end_weight, double scale,
                                            int64_t event_dims) {
  const PiecewiseSettings settings{degree, bins, tails, bounds, minimums, end_weight, scale, event_dims};
  check_piecewise(x, parameters, settings);
  Tensor y = empty_like_shape(x, x.scalar_type());
  Tensor ladj = empty_ladj(x, event_dims);
  if (x.numel() == 0) {
    torch::stable::zero_(ladj);
    return {y, ladj};
  }
  const OnDevice device(x.get_device_index());
  const Stream stream = device.stream();
  auto run = [&](auto type) {
    using T = decltype(type);
    const ValueArguments<T> arguments{Rows(x, x.dim()), tiles::Parts(parameters), settings.options<T>(),
                                      tiles::Output(y), static_cast<T*>(ladj.mutable_data_ptr())};
    for_degree(arguments.options.degree, [&](auto tag) {
      tiles::launch_rows(x, Rows(x, event_dims).width, arguments.parameters, stream, arguments.ladj,
                         [&](const tiles::Plan& plan, unsigned blocks, size_t shared, double* partial) {
                           launch(piecewise_kernel<decltype(tag)::value, kInverse, T>, blocks, plan.threads, shared,
                                  stream, arguments, plan, partial);
                         });
    });
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {y, ladj};
}

std::tuple<Tensor, Tensor> piecewise_backward(const Tensor& x, const std::vector<Tensor>& parameters,
                                              const Tensor& grad_output, const Tensor& grad_ladj, int64_t degree,
                                              int64_t bins, bool tails, std::vector<double> bounds,
                                              std::vector<double> minimums, double end_weight, double scale,
                                              int64_t event_dims, bool inverse) {
  const PiecewiseSettings settings{degree, bins, tails, bounds, minimums, end_weight, scale, event_dims};
  check_piecewise(x, parameters, settings);
  check_gradients(x, grad_output, grad_ladj, event_dims);
  Tensor grad_input = empty_like_shape(x, x.scalar_type());
  Tensor grad_parameters = empty_parameter_gradient(x, parameters, settings.options<float>().parameters());
  if (x.numel() == 0) return {grad_input, grad_parameters};
  const OnDevice device(x.get_device_index());
  const Stream stream = device.stream();
  auto run = [&](auto type) {
    using T = decltype(type);
    const GradientArguments<T> arguments{
        Rows(x, x.dim()),          Rows(grad_output, x.dim()), Rows(grad_ladj, grad_ladj.dim()),
        tiles::Parts(parameters),  settings.options<T>(),      x.numel(),
        Rows(x, event_dims).width, tiles::Output(grad_input),  tiles::Output(grad_parameters)};
    for_degree(arguments.options.degree, [&](auto tag) {
      auto kernel = inverse ? piecewise_backward_kernel<decltype(tag)::value, true, T>
                            : piecewise_backward_kernel<decltype(tag)::value, false, T>;
      tiles::launch_elements<T>(kernel, arguments, x.numel(), arguments.parameters.padded, stream);
    });
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {grad_input, grad_parameters};
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("piecewise_spline_forward", TORCH_BOX(&piecewise_values<false>));
  library.impl("piecewise_spline_inverse", TORCH_BOX(&piecewise_values<true>));
  library.impl("piecewise_spline_backward", TORCH_BOX(&piecewise_backward));
}

}  // namespace
}  // namespace pygen
