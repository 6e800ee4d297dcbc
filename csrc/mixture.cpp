// The logistic mixture on the CPU: a block of elements in lanes, one loop over the lanes for each component.
#include "mixture.h"

#include "ladj.h"
#include "lanes.h"
#include "mixture_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

// The parameters of kLanes elements, an array of lanes for each component, and what is made of them.
template <class T>
struct Planes {
  T *logit, *mean, *log_scale;  // neighbours, in the order of the packed parameters
  T *inverse_scale, *z;         // e^{-s}, (x - mu) e^{-s}
  T *below, *above, *density;   // the terms, for the backward
  T* scratch;                   // three arrays, for what the tensors hold in another layout
  static constexpr int64_t kArrays = 11;

  Planes(T* memory, int64_t components) {
    T** const arrays[] = {&logit, &mean, &log_scale, &inverse_scale, &z, &below, &above, &density, &scratch};
    for (T** array : arrays) {
      *array = memory;
      memory += components * kLanes;
    }
  }
};

// Logits less their largest, log scales within bounds, and e^{-s}.
template <class T>
PYGEN_CLONES void prepare_rows(T* __restrict logit, T* __restrict log_scale, T* __restrict inverse_scale,
                               int64_t components) {
  T peak[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) peak[i] = logit[i];
  for (int64_t k = 1; k < components; ++k) {
    for (int64_t i = 0; i < kLanes; ++i) peak[i] = larger(peak[i], logit[k * kLanes + i]);
  }
  for (int64_t k = 0; k < components; ++k) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t at = k * kLanes + i;
      logit[at] -= peak[i];
      const T bounded = bounded_log_scale(log_scale[at]);
      log_scale[at] = bounded;
      inverse_scale[at] = scalar::exp(-bounded);
    }
  }
}

// The sums of one block, over e^peak.
template <class T>
struct Sums {
  T below_peak[kLanes], above_peak[kLanes], density_peak[kLanes];
  T below[kLanes], above[kLanes], density[kLanes];
  T over_below[kLanes], over_above[kLanes];
  T rate[kLanes], turn[kLanes];

  PYGEN_INLINE Exponents<T> peak(int64_t i) const { return {below_peak[i], above_peak[i], density_peak[i]}; }
  PYGEN_INLINE Peaks<T> peaks(int64_t i) const { return {peak(i), over_below[i], over_above[i]}; }
  PYGEN_INLINE Terms<T> terms(int64_t i) const { return {below[i], above[i], density[i]}; }
};

// kBend: also what the derivative of the log slope needs. kKeep: leave the terms in their arrays.
template <bool kBend, bool kKeep, class T>
PYGEN_CLONES void sum_rows(const T* __restrict x, const Planes<T> planes, int64_t components,
                           Sums<T>& __restrict sums) {
  const T* __restrict const logit = planes.logit;
  const T* __restrict const mean = planes.mean;
  const T* __restrict const inverse_scale = planes.inverse_scale;
  T* __restrict const z_array = planes.z;
  for (int64_t i = 0; i < kLanes; ++i) {
    sums.below_peak[i] = sums.above_peak[i] = sums.density_peak[i] = -std::numeric_limits<T>::infinity();
    sums.below[i] = sums.above[i] = sums.density[i] = sums.rate[i] = sums.turn[i] = T(0);
  }
  for (int64_t k = 0; k < components; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t at = k * kLanes + i;
      const T z = (x[i] - mean[at]) * inverse_scale[at];
      z_array[at] = z;
      const Exponents<T> own = component_exponents(logit[at], z);
      sums.below_peak[i] = larger(sums.below_peak[i], own.below);
      sums.above_peak[i] = larger(sums.above_peak[i], own.above);
      sums.density_peak[i] = larger(sums.density_peak[i], own.density);
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    sums.over_below[i] = peak_ratio(sums.density_peak[i], sums.below_peak[i]);
    sums.over_above[i] = peak_ratio(sums.density_peak[i], sums.above_peak[i]);
  }
  for (int64_t k = 0; k < components; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t at = k * kLanes + i;
      const Sigmoids<T> sigmoid = both_sigmoids(z_array[at]);
      const Terms<T> terms = component_terms(logit[at], z_array[at], inverse_scale[at], sigmoid.larger, sums.peaks(i));
      sums.below[i] += terms.below;
      sums.above[i] += terms.above;
      sums.density[i] += terms.density;
      if constexpr (kBend) {
        const T rate = terms.density * inverse_scale[at];
        sums.rate[i] += rate;
        sums.turn[i] += rate * sigmoid.difference;
      }
      if constexpr (kKeep) {
        planes.below[at] = terms.below;
        planes.above[at] = terms.above;
        planes.density[at] = terms.density;
      }
    }
  }
}

template <class T>
PYGEN_CLONES void curve_rows(const Sums<T>& __restrict sums, T* __restrict y, T* __restrict log_slope) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    const Curve<T> curve = mixture_curve(sums.terms(i), sums.peak(i));
    y[i] = curve.y;
    log_slope[i] = curve.log_slope;
  }
}

// A block's state of the search, in arrays.
template <class T>
struct Searches {
  T x[kLanes], low[kLanes], high[kLanes], step[kLanes], ladj[kLanes], open[kLanes];
};

// The bracket of the components' own quantiles, and their mean as the first guess.
template <class T>
PYGEN_CLONES void begin_rows(const T* __restrict target, const Planes<T> planes, int64_t components,
                             Searches<T>& __restrict searches) {
  T weights[kLanes], sum[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    searches.low[i] = std::numeric_limits<T>::infinity();
    searches.high[i] = -std::numeric_limits<T>::infinity();
    weights[i] = sum[i] = T(0);
  }
  for (int64_t k = 0; k < components; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t at = k * kLanes + i;
      const T quantile = planes.mean[at] + scalar::exp(planes.log_scale[at]) * target[i];
      const T weight = scalar::exp(planes.logit[at]);
      searches.low[i] = -larger(-searches.low[i], -quantile);
      searches.high[i] = larger(searches.high[i], quantile);
      weights[i] += weight;
      sum[i] += weight * quantile;
    }
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    searches.x[i] = scalar::at_most(scalar::at_least(sum[i] / weights[i], searches.low[i]), searches.high[i]);
    searches.step[i] = searches.high[i] - searches.low[i];
    searches.ladj[i] = T(0);
    searches.open[i] = T(1);
  }
}

// One step of every lane that is still open; whether any is left.
template <class T>
PYGEN_CLONES bool advance_rows(const T* __restrict target, const Sums<T>& __restrict sums,
                               Searches<T>& __restrict searches) {
  T open = 0;
#pragma omp simd reduction(+ : open)
  for (int64_t i = 0; i < kLanes; ++i) {
    const Curve<T> curve = mixture_curve(sums.terms(i), sums.peak(i));
    const Bend<T> bend =
        mixture_bend(curve.log_over_below, curve.log_over_above, sums.density[i], sums.rate[i], sums.turn[i]);
    const Search<T> next = advance<T>(
        {searches.x[i], searches.low[i], searches.high[i], searches.step[i], searches.ladj[i], searches.open[i]},
        target[i], curve.y, curve.log_slope, bend.derivative, bend.bound);
    searches.x[i] = next.x;
    searches.low[i] = next.low;
    searches.high[i] = next.high;
    searches.step[i] = next.step;
    searches.ladj[i] = next.ladj;
    searches.open[i] = next.open;
    open += next.open;
  }
  return open > T(0);
}

template <class T>
void solve(const T* target, const Planes<T>& planes, int64_t components, T* x, T* ladj) {
  Searches<T> searches;
  Sums<T> sums;
  begin_rows(target, planes, components, searches);
  for (int step = 0; step < kMaxSteps; ++step) {
    sum_rows<true, false>(searches.x, planes, components, sums);
    if (!advance_rows(target, sums, searches)) break;
  }
  std::copy(searches.x, searches.x + kLanes, x);
  std::copy(searches.ladj, searches.ladj + kLanes, ladj);
}

// grad_output and grad_ladj become the gradients of y and of log dy/dx; for the inverse, grad_input is known here.
template <bool kInverse, class T>
PYGEN_CLONES void upstream_rows(const Sums<T>& __restrict sums, T* __restrict grad_output, T* __restrict grad_ladj,
                                T* __restrict y, T* __restrict grad_input) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    const Curve<T> curve = mixture_curve(sums.terms(i), sums.peak(i));
    y[i] = curve.y;
    if constexpr (kInverse) {
      const Bend<T> bend =
          mixture_bend(curve.log_over_below, curve.log_over_above, sums.density[i], sums.rate[i], sums.turn[i]);
      grad_input[i] = implicit_gradient(grad_output[i], grad_ladj[i], curve.log_slope, bend.derivative);
      grad_output[i] = -grad_input[i];
      grad_ladj[i] = -grad_ladj[i];
    } else {
      grad_input[i] = T(0);
    }
  }
}

// The gradients of the parameters, in the parameters' place.
template <bool kInverse, class T>
PYGEN_CLONES void gradient_rows(const Planes<T> planes, int64_t components, const Sums<T>& __restrict sums,
                                const T* __restrict y, const T* __restrict grad_y, const T* __restrict grad_log_slope,
                                T* __restrict grad_input) {
  T below[kLanes], above[kLanes], density[kLanes], positive[kLanes], negative[kLanes];
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    below[i] = T(1) / sums.below[i];
    above[i] = T(1) / sums.above[i];
    density[i] = T(1) / sums.density[i];
    const Sigmoids<T> sigmoid = both_sigmoids(y[i]);
    positive[i] = sigmoid.positive;
    negative[i] = sigmoid.negative;
  }
  T* __restrict const logit = planes.logit;
  T* __restrict const mean = planes.mean;
  T* __restrict const log_scale = planes.log_scale;
  const T* __restrict const inverse_scale = planes.inverse_scale;
  for (int64_t k = 0; k < components; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t at = k * kLanes + i;
      // The shares go in as they are made: a struct with a name keeps the loop from vectorising.
      const ComponentGradient<T> gradient = component_gradient<T>(
          {planes.below[at] * below[i], planes.above[at] * above[i], planes.density[at] * density[i]}, planes.z[at],
          log_scale[at], inverse_scale[at], both_sigmoids(planes.z[at]), positive[i], negative[i],
          {grad_y[i], grad_log_slope[i]});
      logit[at] = gradient.logit;
      mean[at] = gradient.mean;
      log_scale[at] = gradient.log_scale;
      if constexpr (!kInverse) grad_input[i] -= gradient.mean;
    }
  }
}

// The parameters of one call, packed or in three tensors.
class Parameters {
 public:
  Parameters(const std::vector<Tensor>& tensors, int64_t components) : components_(components) {
    for (const Tensor& tensor : tensors) parts_.emplace_back(tensor);
  }

  template <class T>
  void read(int64_t start, int64_t n, const Planes<T>& planes) const {
    T* to = planes.logit;
    for (const Records& part : parts_) {
      read_lanes(part, start, n, to, planes.scratch);
      to += part.count * kLanes;
    }
    prepare_rows(planes.logit, planes.log_scale, planes.inverse_scale, components_);
  }

 private:
  std::vector<Records> parts_;
  int64_t components_;
};

// About nanoseconds for a component of an element, once.
constexpr int64_t kComponentCost = 2;

template <bool kInverse, class T>
void mixture_compute(const Tensor& x, const std::vector<Tensor>& parameters, int64_t components, int64_t event_dims,
                     Tensor& y, Tensor& ladj) {
  const Rows shape(x, event_dims), values(x, x.dim());
  const Parameters mixture(parameters, components);
  void* const out = y.mutable_data_ptr();
  const ScalarType dtype = y.scalar_type();
  const int64_t cost = kComponentCost * components * (kInverse ? 8 : 1);
  for_lanes(shape.rows, shape.width, cost, Planes<T>::kArrays * components * kLanes,
            static_cast<T*>(ladj.mutable_data_ptr()), [&](int64_t start, int64_t n, T* slopes, T* memory) {
              const Planes<T> planes(memory, components);
              T from[kLanes], to[kLanes];
              read_lanes(values, start, n, from);
              mixture.read(start, n, planes);
              if (kInverse) {
                solve(from, planes, components, to, slopes);
              } else {
                Sums<T> sums;
                sum_rows<false, false>(from, planes, components, sums);
                curve_rows(sums, to, slopes);
              }
              write_block(out, dtype, start, n, to);
            });
}

template <bool kInverse>
std::tuple<Tensor, Tensor> mixture(const Tensor& x, const std::vector<Tensor>& parameters, int64_t event_dims) {
  const int64_t components = check_mixture(x, parameters, event_dims);
  Tensor y = empty_like_shape(x, x.scalar_type());
  Tensor ladj = empty_ladj(x, event_dims);
  if (x.scalar_type() == ScalarType::Double) {
    mixture_compute<kInverse, double>(x, parameters, components, event_dims, y, ladj);
  } else {
    mixture_compute<kInverse, float>(x, parameters, components, event_dims, y, ladj);
  }
  return {y, ladj};
}

std::tuple<Tensor, Tensor> logistic_mixture_forward(const Tensor& x, const std::vector<Tensor>& parameters,
                                                    int64_t event_dims) {
  return mixture<false>(x, parameters, event_dims);
}

std::tuple<Tensor, Tensor> logistic_mixture_inverse(const Tensor& y, const std::vector<Tensor>& parameters,
                                                    int64_t event_dims) {
  return mixture<true>(y, parameters, event_dims);
}

template <bool kInverse, class T>
void mixture_backward_compute(const Tensor& x, const std::vector<Tensor>& parameters, const Tensor& grad_output,
                              const Tensor& grad_ladj, int64_t components, int64_t event_dims, Tensor& grad_input,
                              Tensor& grad_parameters) {
  const Rows shape(x, event_dims), values(x, x.dim()), grads(grad_output, x.dim());
  const Rows ladj(grad_ladj, grad_ladj.dim());
  const Parameters mixture(parameters, components);
  void* const to_input = grad_input.mutable_data_ptr();
  void* const to_parameters = grad_parameters.mutable_data_ptr();
  for_lanes<T>(shape.rows, shape.width, 3 * kComponentCost * components, Planes<T>::kArrays * components * kLanes,
               nullptr, [&](int64_t start, int64_t n, T*, T* memory) {
                 const Planes<T> planes(memory, components);
                 T from[kLanes], y[kLanes], grad_y[kLanes], grad_log_slope[kLanes], inputs[kLanes];
                 read_lanes(values, start, n, from);
                 read_lanes(grads, start, n, grad_y);
                 spread_lanes(ladj, shape.width, start, n, grad_log_slope);
                 mixture.read(start, n, planes);
                 Sums<T> sums;
                 sum_rows<kInverse, true>(from, planes, components, sums);
                 upstream_rows<kInverse>(sums, grad_y, grad_log_slope, y, inputs);
                 gradient_rows<kInverse>(planes, components, sums, y, grad_y, grad_log_slope, inputs);
                 write_block(to_input, grad_input.scalar_type(), start, n, inputs);
                 write_lanes(planes.logit, start, n, 3 * components, to_parameters, grad_parameters.scalar_type(),
                             planes.scratch);
               });
}

std::tuple<Tensor, Tensor> logistic_mixture_backward(const Tensor& x, const std::vector<Tensor>& parameters,
                                                     const Tensor& grad_output, const Tensor& grad_ladj,
                                                     int64_t event_dims, bool inverse) {
  const int64_t components = check_mixture(x, parameters, event_dims);
  check_gradients(x, grad_output, grad_ladj, event_dims);
  Tensor grad_input = empty_like_shape(x, x.scalar_type());
  Tensor grad_parameters = empty_parameter_gradient(x, parameters, 3 * components);
  auto run = [&](auto type) {
    using T = decltype(type);
    auto compute = inverse ? &mixture_backward_compute<true, T> : &mixture_backward_compute<false, T>;
    compute(x, parameters, grad_output, grad_ladj, components, event_dims, grad_input, grad_parameters);
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {grad_input, grad_parameters};
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("logistic_mixture_forward", TORCH_BOX(&logistic_mixture_forward));
  library.impl("logistic_mixture_inverse", TORCH_BOX(&logistic_mixture_inverse));
  library.impl("logistic_mixture_backward", TORCH_BOX(&logistic_mixture_backward));
}

}  // namespace
}  // namespace pygen
