// Piecewise polynomial splines on the CPU: the parameters of a group of elements turned into lanes, and every step a
// loop over the lanes.
#include "piecewise.h"

#include <tuple>

#include "lanes.h"
#include "piecewise_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

template <class T>
using ValueRows = void (*)(const T*, T*, const PiecewiseOptions<T>&, T*, T*);

template <class T>
using GradientRows = void (*)(const T*, T*, const T*, const T*, const PiecewiseOptions<T>&, T*);

template <Degree D, bool kInverse, class T>
PYGEN_CLONES void piecewise_rows(const T* value, T* parameters, const PiecewiseOptions<T>& options, T* image, T* ladj) {
  piecewise<D, kInverse, kLanes>(value, parameters, options, image, ladj);
}

template <Degree D, bool kInverse, class T>
PYGEN_CLONES void piecewise_backward_rows(const T* x, T* parameters, const T* grad_output, const T* grad_ladj,
                                          const PiecewiseOptions<T>& options, T* grad_input) {
  piecewise_gradient<D, kInverse, kLanes>(x, parameters, grad_output, grad_ladj, options, grad_input);
}

// What all groups read: values, and parameters in one tensor or one of each kind.
template <class T>
struct PiecewiseSource {
  Rows x;
  std::vector<Records> parts;
  PiecewiseOptions<T> options;

  PiecewiseSource(const Tensor& input, const std::vector<Tensor>& parameters, const PiecewiseSettings& settings)
      : x(input, input.dim()), parts(parameters.begin(), parameters.end()), options(settings.options<T>()) {}

  // Numbers that the lanes of a group's parameters take.
  int64_t size() const { return kLanes * options.parameters(); }
  // Nanoseconds an element, about.
  int64_t cost() const { return 4 + options.parameters() / 2; }

  void read(int64_t start, int64_t n, T* lanes, T* scratch) const {
    for (const Records& part : parts) {
      read_lanes(part, start, n, lanes, scratch);
      lanes += kLanes * part.count;
    }
  }
};

template <bool kInverse, class T>
void piecewise_compute(const Tensor& x, const std::vector<Tensor>& parameters, const PiecewiseSettings& settings,
                       Tensor& y, Tensor& ladj) {
  const PiecewiseSource<T> source(x, parameters, settings);
  void* const out = y.mutable_data_ptr();
  const ScalarType out_dtype = y.scalar_type();
  ValueRows<T> group = nullptr;
  for_degree(source.options.degree, [&](auto tag) { group = &piecewise_rows<decltype(tag)::value, kInverse, T>; });
  for_lanes(ladj.numel(), Rows(x, settings.event_dims).width, source.cost(), 2 * source.size(),
            static_cast<T*>(ladj.mutable_data_ptr()), [&](int64_t start, int64_t n, T* logarithms, T* scratch) {
              T values[kLanes], images[kLanes];
              T* const lanes = scratch + source.size();
              read_lanes(source.x, start, n, values);
              source.read(start, n, lanes, scratch);
              group(values, lanes, source.options, images, logarithms);
              write_block(out, out_dtype, start, n, images);
            });
}

template <bool kInverse, class T>
void piecewise_backward_compute(const Tensor& x, const std::vector<Tensor>& parameters,
                                const PiecewiseSettings& settings, const Tensor& grad_output, const Tensor& grad_ladj,
                                Tensor& grad_input, Tensor& grad_parameters) {
  const PiecewiseSource<T> source(x, parameters, settings);
  const Rows grad(grad_output, grad_output.dim()), grad_rows(grad_ladj, grad_ladj.dim());
  const int64_t width = Rows(x, settings.event_dims).width;
  void* const to_input = grad_input.mutable_data_ptr();
  void* const to_parameters = grad_parameters.mutable_data_ptr();
  const ScalarType input_dtype = grad_input.scalar_type(), parameter_dtype = grad_parameters.scalar_type();
  GradientRows<T> group = nullptr;
  for_degree(source.options.degree,
             [&](auto tag) { group = &piecewise_backward_rows<decltype(tag)::value, kInverse, T>; });
  for_lanes(grad_ladj.numel(), width, 2 * source.cost(), 2 * source.size(), static_cast<T*>(nullptr),
            [&](int64_t start, int64_t n, T*, T* scratch) {
              T values[kLanes], grads[kLanes], row_grads[kLanes], inputs[kLanes];
              T* const lanes = scratch + source.size();
              read_lanes(source.x, start, n, values);
              read_lanes(grad, start, n, grads);
              spread_lanes(grad_rows, width, start, n, row_grads);
              source.read(start, n, lanes, scratch);
              group(values, lanes, grads, row_grads, source.options, inputs);
              write_block(to_input, input_dtype, start, n, inputs);
              write_lanes(lanes, start, n, source.options.parameters(), to_parameters, parameter_dtype, scratch);
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
  auto compute = x.scalar_type() == ScalarType::Double ? &piecewise_compute<kInverse, double>
                                                       : &piecewise_compute<kInverse, float>;
  compute(x, parameters, settings, y, ladj);
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
  auto run = [&](auto type) {
    using T = decltype(type);
    auto compute = inverse ? &piecewise_backward_compute<true, T> : &piecewise_backward_compute<false, T>;
    compute(x, parameters, settings, grad_output, grad_ladj, grad_input, grad_parameters);
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {grad_input, grad_parameters};
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("piecewise_spline_forward", TORCH_BOX(&piecewise_values<false>));
  library.impl("piecewise_spline_inverse", TORCH_BOX(&piecewise_values<true>));
  library.impl("piecewise_spline_backward", TORCH_BOX(&piecewise_backward));
}

}  // namespace
}  // namespace pygen
