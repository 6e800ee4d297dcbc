// Rational-quadratic splines on the CPU: the parameters of a group of elements turned into lanes, and every step a loop
// over the lanes.
#include "spline.h"

#include <tuple>

#include "lanes.h"
#include "spline_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

template <class T>
using Bounds = SplineBounds<kLanes, T>;

template <class T>
using ValueRows = void (*)(const T*, T*, const Bounds<T>&, SplineOptions<T>, T*, T*);

template <class T>
using GradientRows = void (*)(const T*, const T*, const T*, const T*, const Bounds<T>&, SplineOptions<T>, T*, T*);

template <Parametrization P, bool kInverse, class T>
PYGEN_CLONES void spline_rows(const T* value, T* parameters, const Bounds<T>& bounds, SplineOptions<T> options,
                              T* image, T* ladj) {
  spline<P, kInverse, kLanes>(value, parameters, bounds, options, image, ladj);
}

template <Parametrization P, bool kInverse, class T>
PYGEN_CLONES void spline_backward_rows(const T* value, const T* parameters, const T* grad_output, const T* grad_ladj,
                                       const Bounds<T>& bounds, SplineOptions<T> options, T* grad_input, T* gradients) {
  spline_gradient<P, kInverse, kLanes>(value, parameters, grad_output, grad_ladj, bounds, options, gradients,
                                       grad_input, gradients);
}

// What all groups read: the parameters, packed or in three tensors, and the bounds.
template <class T>
struct SplineSource {
  Rows x;
  std::vector<Records> parts;
  SplineOptions<T> options;
  T bounds[4], tails;
  const T* table = nullptr;  // (5, columns) bounds and tails where they differ along the last dimension
  int64_t columns = 0;

  SplineSource(const Tensor& input, const std::vector<Tensor>& parameters, const SplineSettings& settings)
      : x(input, input.dim()),
        parts(parameters.begin(), parameters.end()),
        options(settings.options<T>()),
        tails(static_cast<T>(settings.tails)) {
    for (int i = 0; i < 4; ++i) bounds[i] = static_cast<T>(settings.bounds[static_cast<size_t>(i)]);
    if (settings.dimensions) {
      table = static_cast<const T*>(settings.dimensions->data_ptr());
      columns = settings.dimensions->size(1);
    }
  }

  // Numbers that the lanes of a group's parameters take.
  int64_t size() const { return kLanes * options.parameters(); }

  void read(int64_t start, int64_t n, T* lanes, T* scratch) const {
    for (const Records& part : parts) {
      read_lanes(part, start, n, lanes, scratch);
      lanes += kLanes * part.count;
    }
  }

  void read_bounds(int64_t start, Bounds<T>& to) const {
    int64_t column = table ? start % columns : 0;
    for (int l = 0; l < kLanes; ++l) {
      const T* at = table ? table + column : nullptr;
      to.left[l] = at ? at[0] : bounds[0];
      to.right[l] = at ? at[columns] : bounds[1];
      to.bottom[l] = at ? at[2 * columns] : bounds[2];
      to.top[l] = at ? at[3 * columns] : bounds[3];
      to.tails[l] = at ? at[4 * columns] : tails;
      column = column + 1 < columns ? column + 1 : 0;
    }
  }
};

// Nanoseconds an element, about.
int64_t cost_of(int64_t bins) { return 4 + bins; }

template <bool kInverse, class T>
void spline_compute(const Tensor& x, const std::vector<Tensor>& parameters, const SplineSettings& settings, Tensor& y,
                    Tensor& ladj) {
  const SplineSource<T> source(x, parameters, settings);
  void* const out = y.mutable_data_ptr();
  const ScalarType out_dtype = y.scalar_type();
  ValueRows<T> group = nullptr;
  for_parametrization(settings.parametrization,
                      [&](auto tag) { group = &spline_rows<decltype(tag)::value, kInverse, T>; });
  for_lanes(ladj.numel(), Rows(x, settings.event_dims).width, cost_of(settings.bins), 2 * source.size(),
            static_cast<T*>(ladj.mutable_data_ptr()), [&](int64_t start, int64_t n, T* logarithms, T* scratch) {
              T values[kLanes], images[kLanes];
              Bounds<T> bounds;
              T* const lanes = scratch + source.size();
              read_lanes(source.x, start, n, values);
              source.read(start, n, lanes, scratch);
              source.read_bounds(start, bounds);
              group(values, lanes, bounds, source.options, images, logarithms);
              write_block(out, out_dtype, start, n, images);
            });
}

template <bool kInverse, class T>
void spline_backward_compute(const Tensor& x, const std::vector<Tensor>& parameters, const SplineSettings& settings,
                             const Tensor& grad_output, const Tensor& grad_ladj, Tensor& grad_input,
                             Tensor& grad_parameters) {
  const SplineSource<T> source(x, parameters, settings);
  const Rows grad(grad_output, grad_output.dim()), grad_rows(grad_ladj, grad_ladj.dim());
  const int64_t width = Rows(x, settings.event_dims).width;
  void* const to_input = grad_input.mutable_data_ptr();
  void* const to_parameters = grad_parameters.mutable_data_ptr();
  const ScalarType input_dtype = grad_input.scalar_type(), parameter_dtype = grad_parameters.scalar_type();
  GradientRows<T> group = nullptr;
  for_parametrization(settings.parametrization,
                      [&](auto tag) { group = &spline_backward_rows<decltype(tag)::value, kInverse, T>; });
  for_lanes(grad_ladj.numel(), width, 2 * cost_of(settings.bins), 3 * source.size(), static_cast<T*>(nullptr),
            [&](int64_t start, int64_t n, T*, T* scratch) {
              T values[kLanes], grads[kLanes], row_grads[kLanes], inputs[kLanes];
              Bounds<T> bounds;
              T* const lanes = scratch + source.size();
              T* const gradients = lanes + source.size();
              read_lanes(source.x, start, n, values);
              read_lanes(grad, start, n, grads);
              spread_lanes(grad_rows, width, start, n, row_grads);
              source.read(start, n, lanes, scratch);
              source.read_bounds(start, bounds);
              group(values, lanes, grads, row_grads, bounds, source.options, inputs, gradients);
              write_block(to_input, input_dtype, start, n, inputs);
              write_lanes(gradients, start, n, source.options.parameters(), to_parameters, parameter_dtype, scratch);
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
  auto compute =
      x.scalar_type() == ScalarType::Double ? &spline_compute<kInverse, double> : &spline_compute<kInverse, float>;
  compute(x, parameters, settings, y, ladj);
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
  auto run = [&](auto type) {
    using T = decltype(type);
    auto compute = inverse ? &spline_backward_compute<true, T> : &spline_backward_compute<false, T>;
    compute(x, parameters, settings, grad_output, grad_ladj, grad_input, grad_parameters);
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {grad_input, grad_parameters};
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("rational_quadratic_spline_forward", TORCH_BOX(&spline_values<false>));
  library.impl("rational_quadratic_spline_inverse", TORCH_BOX(&spline_values<true>));
  library.impl("rational_quadratic_spline_backward", TORCH_BOX(&spline_backward));
}

}  // namespace
}  // namespace pygen
