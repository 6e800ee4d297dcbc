// Rational-quadratic splines on CUDA: one thread per element, its parameters in shared memory.
#include "spline.h"

#include <tuple>

#include "simt.h"
#include "spline_checks.h"
#include "tensor.h"
#include "tiles.h"

namespace pygen {
namespace {

// What forward, inverse and backward read alike.
template <class T>
struct SplineArguments {
  Rows x;
  tiles::Parts parameters;
  SplineOptions<T> options;
  T bounds[4], tails;
  const T* table;  // (5, columns) bounds and tails where they differ along the last dimension
  int64_t columns;

  SplineArguments(const Tensor& input, const std::vector<Tensor>& parts, const SplineSettings& settings)
      : x(input, input.dim()),
        parameters(parts),
        options(settings.options<T>()),
        tails(static_cast<T>(settings.tails)),
        table(settings.dimensions ? static_cast<const T*>(settings.dimensions->data_ptr()) : nullptr),
        columns(settings.dimensions ? settings.dimensions->size(1) : 1) {
    for (int i = 0; i < 4; ++i) bounds[i] = static_cast<T>(settings.bounds[static_cast<size_t>(i)]);
  }

  __device__ __forceinline__ SplineBounds<1, T> bounds_of(int64_t element) const {
    if (!table) return {{bounds[0]}, {bounds[1]}, {bounds[2]}, {bounds[3]}, {tails}};
    const T* at = table + element % columns;
    return {{at[0]}, {at[columns]}, {at[2 * columns]}, {at[3 * columns]}, {at[4 * columns]}};
  }
};

template <Parametrization P, bool kInverse, class T>
__global__ void __launch_bounds__(tiles::kMaxThreads)
    spline_kernel(SplineArguments<T> arguments, tiles::Plan plan, tiles::Output y, T* ladj, double* partial) {
  tiles::map_elements(arguments.parameters, plan, ladj, partial, [&](int64_t i, T* own) {
    const T value = tiles::read_one<T>(arguments.x, i);
    T image, logarithm;
    spline<P, kInverse, 1>(&value, own, arguments.bounds_of(i), arguments.options, &image, &logarithm);
    tiles::write_one(y, i, image);
    return logarithm;
  });
}

template <class T>
struct GradientArguments {
  SplineArguments<T> spline;
  Rows grad_output, grad_ladj;
  int64_t elements, width;
  tiles::Output grad_input, grad_parameters;
};

template <Parametrization P, bool kInverse, class T>
__global__ void __launch_bounds__(tiles::kMaxThreads) spline_backward_kernel(GradientArguments<T> arguments) {
  const SplineArguments<T>& spline = arguments.spline;
  // softclip's gradient needs the parameters once more, and its exponentials a place of their own.
  T* const apart = dynamic_shared<T>() + static_cast<int>(blockDim.x) * spline.parameters.padded;
  const int thread = static_cast<int>(threadIdx.x);
  tiles::replace_parameters<T>(
      spline.parameters, arguments.elements, arguments.grad_parameters, [&](int64_t i, T* own) {
        const T value = tiles::read_one<T>(spline.x, i), grad_output = tiles::read_one<T>(arguments.grad_output, i);
        const T grad_ladj = tiles::read_one<T>(arguments.grad_ladj, i / arguments.width);
        T* const exps = P == Parametrization::kSoftclip ? apart + thread * (2 * spline.options.bins + 1) : own;
        T grad_input;
        spline_gradient<P, kInverse, 1>(&value, own, &grad_output, &grad_ladj, spline.bounds_of(i), spline.options,
                                        exps, &grad_input, own);
        tiles::write_one(arguments.grad_input, i, grad_input);
      });
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
  Tensor ladj = empty_ladj(x, event_dims);
  if (x.numel() == 0) {
    torch::stable::zero_(ladj);
    return {y, ladj};
  }
  const OnDevice device(x.get_device_index());
  const Stream stream = device.stream();
  auto run = [&](auto type) {
    using T = decltype(type);
    const SplineArguments<T> arguments(x, parameters, settings);
    T* const sums = static_cast<T*>(ladj.mutable_data_ptr());
    for_parametrization(parametrization, [&](auto tag) {
      tiles::launch_rows(x, Rows(x, event_dims).width, arguments.parameters, stream, sums,
                         [&](const tiles::Plan& plan, unsigned blocks, size_t shared, double* partial) {
                           launch(spline_kernel<decltype(tag)::value, kInverse, T>, blocks, plan.threads, shared,
                                  stream, arguments, plan, tiles::Output(y), sums, partial);
                         });
    });
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
  check_gradients(x, grad_output, grad_ladj, event_dims);
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
                                         x.numel(),
                                         Rows(x, event_dims).width,
                                         tiles::Output(grad_input),
                                         tiles::Output(grad_parameters)};
    for_parametrization(parametrization, [&](auto tag) {
      constexpr Parametrization kParametrization = decltype(tag)::value;
      const int exponentials = kParametrization == Parametrization::kSoftclip ? static_cast<int>(2 * bins + 1) : 0;
      auto kernel = inverse ? spline_backward_kernel<kParametrization, true, T>
                            : spline_backward_kernel<kParametrization, false, T>;
      tiles::launch_elements<T>(kernel, arguments, x.numel(), arguments.spline.parameters.padded + exponentials,
                                stream);
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
