// The discretized mixture of logistics on the CPU: a block of pixels in lanes, one loop over the lanes for each colour
// of each component. Nothing of a component leaves the block, so the memory of a step is that of its gradient.
#include "logistics.h"

#include "lanes.h"
#include "logistics_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

using logistics::Interval;

// The parameters of kLanes pixels, an array of lanes for each, and what is made of them. The backward leaves
// derivatives in the parameters' place.
template <class T>
struct Planes {
  int colours, mixtures;
  T* parameters;  // in their order
  T* joint;       // of each component: log pi_k, but for a constant, + sum_c log P_kc
  T* to_x;        // of each component and colour, the derivative by x
  T* scratch;     // for what the tensors hold in another layout

  Planes(T* memory, int colour_count, int mixture_count)
      : colours(colour_count),
        mixtures(mixture_count),
        parameters(memory),
        joint(parameters + kLanes * count()),
        to_x(joint + kLanes * mixtures),
        scratch(to_x + kLanes * colours * mixtures) {}

  static int64_t size(int colours, int mixtures) {
    const int64_t count = logistics::parameter_count(colours, mixtures);
    return kLanes * (2 * count + mixtures * (1 + colours));
  }
  int64_t count() const { return logistics::parameter_count(colours, mixtures); }
  T* logit(int k) const { return parameters + k * kLanes; }
  T* mean(int c, int k) const { return parameters + (logistics::colour_offset(colours, mixtures, c) + k) * kLanes; }
  T* log_scale(int c, int k) const { return mean(c, k) + mixtures * kLanes; }
  T* coefficient(int i, int k) const { return mean(i, k) + 2 * mixtures * kLanes; }
  T* by_x(int c, int k) const { return to_x + (c * mixtures + k) * kLanes; }
};

// Adds the far part of one colour's log P_kc to `joint`, and multiplies `near` by the other part; with kGradient, its
// derivatives take the place of the mean and the log scale, and that by x goes to `to_x`.
template <bool kGradient, class T>
PYGEN_CLONES void colour_rows(const T* __restrict x, T* __restrict mean, T* __restrict log_scale, T half,
                              T* __restrict joint, T* __restrict near, T* __restrict to_x) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    const Interval<T> at = logistics::interval<kGradient>(x[i], mean[i], log_scale[i], half);
    joint[i] += at.far;
    near[i] *= at.near;
    if constexpr (kGradient) {
      mean[i] = at.by_mean;
      log_scale[i] = at.by_log_scale;
      to_x[i] = -at.by_mean;
    }
  }
}

template <class T>
PYGEN_CLONES void add_log_rows(const T* __restrict near, T* __restrict joint) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) joint[i] += scalar::log(near[i]);
}

// mean += tanh(coefficient) x; the coefficient's place keeps its tanh.
template <class T>
PYGEN_CLONES void shift_rows(const T* __restrict x, T* __restrict coefficient, T* __restrict mean) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    const T c = logistics::squash(coefficient[i]);
    coefficient[i] = c;
    mean[i] += c * x[i];
  }
}

// From the derivative by the mean to those by x and by the coefficient, given its tanh.
template <class T>
PYGEN_CLONES void unshift_rows(const T* __restrict x, const T* __restrict to_mean, T* __restrict coefficient,
                               T* __restrict to_x) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    const T c = coefficient[i];
    to_x[i] += c * to_mean[i];
    coefficient[i] = to_mean[i] * x[i] * (T(1) - c * c);
  }
}

// log sum_k e^{values_k}. A NaN does not become the peak: it shows in the sum.
template <class T>
PYGEN_CLONES void log_sum_exp_rows(const T* __restrict values, int mixtures, T* __restrict result) {
  T peak[kLanes], total[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    peak[i] = values[i];
    total[i] = T(0);
  }
  for (int k = 1; k < mixtures; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) peak[i] = scalar::at_least(peak[i], values[k * kLanes + i]);
  }
  for (int k = 0; k < mixtures; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) total[i] += scalar::exp(values[k * kLanes + i] - peak[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) result[i] = peak[i] + scalar::log(total[i]);
}

// The weight of a component's derivatives, its posterior times the gradient; the logit's derivative takes its place.
template <class T>
PYGEN_CLONES void weigh_rows(const T* __restrict joint, const T* __restrict log_joint, const T* __restrict log_prior,
                             const T* __restrict grad, T* __restrict logit, T* __restrict weight) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    const T posterior = scalar::exp(joint[i] - log_joint[i]), prior = scalar::exp(logit[i] - log_prior[i]);
    weight[i] = grad[i] * posterior;
    logit[i] = grad[i] * (posterior - prior);
  }
}

// Multiplies `count` arrays, `apart` from one to the next.
template <class T>
PYGEN_CLONES void scale_rows(const T* __restrict weight, int count, int64_t apart, T* __restrict values) {
  for (int k = 0; k < count; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) values[k * apart + i] *= weight[i];
  }
}

// Adds as many to `count` sums that lie together.
template <class T>
PYGEN_CLONES void add_rows(const T* __restrict weight, const T* __restrict values, int count, int64_t apart,
                           T* __restrict sums) {
  for (int k = 0; k < count; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) sums[k * kLanes + i] += weight[i] * values[k * apart + i];
  }
}

template <bool kGradient, class T>
void join_components(const T* x, const Planes<T>& planes, T half) {
  T near[kLanes];
  for (int k = 0; k < planes.mixtures; ++k) {
    T* const joint = planes.joint + k * kLanes;
    std::copy(planes.logit(k), planes.logit(k) + kLanes, joint);
    std::fill(near, near + kLanes, T(1));
    for (int c = 0; c < planes.colours; ++c) {
      T* const mean = planes.mean(c, k);
      if (c >= 1) shift_rows(x, planes.coefficient(c == 1 ? 0 : 1, k), mean);
      if (c == 2) shift_rows(x + kLanes, planes.coefficient(2, k), mean);
      colour_rows<kGradient>(x + c * kLanes, mean, planes.log_scale(c, k), half, joint, near, planes.by_x(c, k));
      if constexpr (kGradient) {
        if (c >= 1) unshift_rows(x, mean, planes.coefficient(c == 1 ? 0 : 1, k), planes.by_x(0, k));
        if (c == 2) unshift_rows(x + kLanes, mean, planes.coefficient(2, k), planes.by_x(1, k));
      }
    }
    add_log_rows(near, joint);
  }
}

// Weighs the derivatives of each component, in the parameters' place, and adds those of x.
template <class T>
void weigh_components(const Planes<T>& planes, const T* log_joint, const T* log_prior, const T* grad, T* grad_x) {
  T weight[kLanes];
  std::fill(grad_x, grad_x + planes.colours * kLanes, T(0));
  for (int k = 0; k < planes.mixtures; ++k) {
    weigh_rows(planes.joint + k * kLanes, log_joint, log_prior, grad, planes.logit(k), weight);
    const int64_t apart = planes.mixtures * kLanes;
    add_rows(weight, planes.by_x(0, k), planes.colours, apart, grad_x);
    // All that is left of a component: its parameters of one kind are as far apart as those of the next.
    scale_rows(weight, static_cast<int>(planes.count() / planes.mixtures) - 1, apart, planes.mean(0, k));
  }
}

// Lanes to pixels start .. start + n of a dense tensor (samples, count, pixels of a sample).
template <class T>
void write_planes(const T* lanes, int64_t start, int64_t n, int64_t count, int64_t pixels, void* data,
                  ScalarType dtype) {
  for (int64_t done = 0; done < n;) {
    const int64_t sample = (start + done) / pixels, pixel = (start + done) % pixels;
    const int64_t run = std::min(n - done, pixels - pixel);
    for (int64_t k = 0; k < count; ++k) {
      write_block(data, dtype, (sample * count + k) * pixels + pixel, run, lanes + k * kLanes + done);
    }
    done += run;
  }
}

// About nanoseconds for a colour of a component of a pixel.
constexpr int64_t kColourCost = 3;

struct Sizes {
  int colours, mixtures;
  int64_t pixels, all;  // of a sample, and of all samples

  Sizes(const Tensor& x, int mixture_count) : colours(static_cast<int>(x.size(1))), mixtures(mixture_count) {
    pixels = 1;
    for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
    all = x.size(0) * pixels;
  }
};

template <class T>
void log_prob_compute(const Tensor& x, const Tensor& parameters, const Sizes& sizes, T half, Tensor& log_prob) {
  const Records values(channels_last(x)), records(channels_last(parameters));
  T* const out = static_cast<T*>(log_prob.mutable_data_ptr());
  for_lanes<T>(1, sizes.all, kColourCost * sizes.colours * sizes.mixtures,
               Planes<T>::size(sizes.colours, sizes.mixtures), nullptr, [&](int64_t start, int64_t n, T*, T* memory) {
                 const Planes<T> planes(memory, sizes.colours, sizes.mixtures);
                 T from[3 * kLanes], log_joint[kLanes], log_prior[kLanes];
                 read_lanes(values, start, n, from, planes.scratch);
                 read_lanes(records, start, n, planes.parameters, planes.scratch);
                 log_sum_exp_rows(planes.logit(0), sizes.mixtures, log_prior);
                 join_components<false>(from, planes, half);
                 log_sum_exp_rows(planes.joint, sizes.mixtures, log_joint);
                 for (int64_t i = 0; i < n; ++i) out[start + i] = log_joint[i] - log_prior[i];
               });
}

Tensor discretized_logistics_forward(const Tensor& x, const Tensor& parameters, int64_t levels) {
  const Sizes sizes(x, check_logistics(x, parameters, levels));
  const std::vector<int64_t> shape = pixel_sizes(x);
  Tensor log_prob = torch::stable::new_empty(x, {shape.data(), shape.size()}, sum_dtype(parameters));
  const double half = 1.0 / static_cast<double>(levels - 1);
  if (parameters.scalar_type() == ScalarType::Double) {
    log_prob_compute<double>(x, parameters, sizes, half, log_prob);
  } else {
    log_prob_compute<float>(x, parameters, sizes, static_cast<float>(half), log_prob);
  }
  return log_prob;
}

template <class T>
void backward_compute(const Tensor& x, const Tensor& parameters, const Tensor& grad, const Sizes& sizes, T half,
                      Tensor& grad_x, Tensor& grad_parameters) {
  const Records values(channels_last(x)), records(channels_last(parameters));
  const Rows grads(grad, grad.dim());
  for_lanes<T>(1, sizes.all, 3 * kColourCost * sizes.colours * sizes.mixtures,
               Planes<T>::size(sizes.colours, sizes.mixtures), nullptr, [&](int64_t start, int64_t n, T*, T* memory) {
                 const Planes<T> planes(memory, sizes.colours, sizes.mixtures);
                 T from[3 * kLanes], to[3 * kLanes], above[kLanes], log_joint[kLanes], log_prior[kLanes];
                 read_lanes(values, start, n, from, planes.scratch);
                 read_lanes(records, start, n, planes.parameters, planes.scratch);
                 read_lanes(grads, start, n, above);
                 log_sum_exp_rows(planes.logit(0), sizes.mixtures, log_prior);
                 join_components<true>(from, planes, half);
                 log_sum_exp_rows(planes.joint, sizes.mixtures, log_joint);
                 weigh_components(planes, log_joint, log_prior, above, to);
                 write_planes(to, start, n, sizes.colours, sizes.pixels, grad_x.mutable_data_ptr(),
                              grad_x.scalar_type());
                 write_planes(planes.parameters, start, n, planes.count(), sizes.pixels,
                              grad_parameters.mutable_data_ptr(), grad_parameters.scalar_type());
               });
}

std::tuple<Tensor, Tensor> discretized_logistics_backward(const Tensor& x, const Tensor& parameters, const Tensor& grad,
                                                          int64_t levels) {
  const Sizes sizes(x, check_logistics(x, parameters, levels));
  check_grad_log_prob(x, grad);
  Tensor grad_x = empty_like_shape(x, x.scalar_type());
  Tensor grad_parameters = empty_like_shape(parameters, parameters.scalar_type());
  const double half = 1.0 / static_cast<double>(levels - 1);
  if (parameters.scalar_type() == ScalarType::Double) {
    backward_compute<double>(x, parameters, grad, sizes, half, grad_x, grad_parameters);
  } else {
    backward_compute<float>(x, parameters, grad, sizes, static_cast<float>(half), grad_x, grad_parameters);
  }
  return {grad_x, grad_parameters};
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("discretized_logistics_forward", TORCH_BOX(&discretized_logistics_forward));
  library.impl("discretized_logistics_backward", TORCH_BOX(&discretized_logistics_backward));
}

}  // namespace
}  // namespace pygen
