// The discretized mixture of logistics on CUDA: one thread a pixel, neighbouring threads reading neighbouring numbers
// of the same channel. Sums over the components are kept as they are read, so a pixel needs no memory of its own; the
// backward reads the parameters twice.
#include "logistics.h"

#include "lanes.h"
#include "logistics_checks.h"
#include "simt.h"
#include "tensor.h"
#include "vector.h"

namespace pygen {
namespace {

using logistics::Interval;
using logistics::Pixel;

constexpr int kThreads = 128;
constexpr int kMostColours = 3;
constexpr int64_t kSharedBytes = 48 * 1024;

struct Channels {
  Rows pixels;  // the first channel of each, in one row
  int64_t stride = 0;

  explicit Channels(const Tensor& x) {
    const Records records(channels_last(x));
    pixels = records.elements;
    stride = records.stride;
  }
};

struct Output {
  void* data;
  ScalarType dtype;
};

template <class Stored>
struct Arguments {
  using T = typename arithmetic<Stored>::type;
  Channels parameters, x;
  int colours, mixtures;
  int64_t pixels, all;  // of a sample, and of all samples
  T half;
  T* log_prob;
  Rows grad;
  Output grad_x, grad_parameters;  // (samples, channels, pixels)
};

template <class T>
struct LogSum {
  T peak = -std::numeric_limits<T>::infinity(), total = 0;

  __device__ __forceinline__ void add(T value) {
    if (value > peak) {
      total = total * scalar::exp(peak - value) + T(1);
      peak = value;
    } else if (value != -std::numeric_limits<T>::infinity()) {
      total += scalar::exp(value - peak);
    }
  }
  __device__ __forceinline__ T log() const { return peak + scalar::log(total); }
};

template <class Stored>
__device__ __forceinline__ Pixel<Stored, typename arithmetic<Stored>::type> pixel_at(const Arguments<Stored>& all,
                                                                                     int64_t number) {
  const Rows& pixels = all.parameters.pixels;
  return {static_cast<const Stored*>(pixels.data) + pixels.event_offset(number), all.parameters.stride, all.mixtures,
          all.colours};
}

template <class Stored, class T>
__device__ __forceinline__ void load_colours(const Arguments<Stored>& all, int64_t number, T* x) {
  const Rows& pixels = all.x.pixels;
  const int64_t from = pixels.event_offset(number);
  for (int c = 0; c < all.colours; ++c)
    load_vector<1>(pixels.data, pixels.dtype, from + c * all.x.stride, 1, true, x + c);
}

// The mean of colour c, given those before.
template <class Stored, class T>
__device__ __forceinline__ T mean_given(const Pixel<Stored, T>& pixel, int c, int k, const T* x) {
  T mean = pixel.mean(c, k);
  for (int earlier = 0; earlier < c; ++earlier) {
    mean = logistics::moved(mean, pixel.coefficient(c + earlier - 1, k), x[earlier]);
  }
  return mean;
}

// log pi_k, but for a constant, + sum_c log P_kc; with kGradient also the derivatives of each colour.
template <bool kGradient, class Stored, class T>
__device__ __forceinline__ T joint(const Pixel<Stored, T>& pixel, int k, const T* x, T half, T* by_mean,
                                   T* by_log_scale) {
  T sum = pixel.logit(k);
  for (int c = 0; c < pixel.colours; ++c) {
    const Interval<T> at =
        logistics::interval<kGradient>(x[c], mean_given(pixel, c, k, x), pixel.log_scale(c, k), half);
    sum += at.far + scalar::log(at.near);
    if constexpr (kGradient) {
      by_mean[c] = at.by_mean;
      by_log_scale[c] = at.by_log_scale;
    }
  }
  return sum;
}

// The logarithms of the sums of the priors and of the joint weights.
template <class Stored, class T>
struct LogSums {
  LogSum<T> prior, joints;

  __device__ __forceinline__ LogSums(const Pixel<Stored, T>& pixel, const T* x, T half) {
    for (int k = 0; k < pixel.mixtures; ++k) {
      prior.add(pixel.logit(k));
      joints.add(joint<false, Stored, T>(pixel, k, x, half, nullptr, nullptr));
    }
  }
};

template <class Stored>
__global__ void __launch_bounds__(kThreads) log_prob_kernel(Arguments<Stored> all) {
  using T = typename arithmetic<Stored>::type;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (number >= all.all) return;
  const Pixel<Stored, T> pixel = pixel_at(all, number);
  T x[kMostColours];
  load_colours(all, number, x);
  const LogSums<Stored, T> sums(pixel, x, all.half);
  all.log_prob[number] = sums.joints.log() - sums.prior.log();
}

template <class Stored>
__global__ void __launch_bounds__(kThreads) backward_kernel(Arguments<Stored> all) {
  using T = typename arithmetic<Stored>::type;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (number >= all.all) return;
  const Pixel<Stored, T> pixel = pixel_at(all, number);
  T x[kMostColours], grad_x[kMostColours] = {}, grad;
  load_colours(all, number, x);
  load_vector<1>(all.grad.data, all.grad.dtype, all.grad.event_offset(number), 1, true, &grad);
  const LogSums<Stored, T> sums(pixel, x, all.half);
  const T log_prior = sums.prior.log(), log_joint = sums.joints.log();
  const int64_t count = logistics::parameter_count(all.colours, all.mixtures);
  const int64_t sample = number / all.pixels, place = number % all.pixels;
  const auto write = [&](const Output& output, int64_t channels, int64_t channel, T value) {
    store_vector<1>(output.data, output.dtype, (sample * channels + channel) * all.pixels + place, 1, true, &value);
  };
  for (int k = 0; k < all.mixtures; ++k) {
    T by_mean[kMostColours], by_log_scale[kMostColours], to_mean[kMostColours];
    const T sum = joint<true>(pixel, k, x, all.half, by_mean, by_log_scale);
    const T posterior = scalar::exp(sum - log_joint), weight = grad * posterior;
    write(all.grad_parameters, count, k, grad * (posterior - scalar::exp(pixel.logit(k) - log_prior)));
    for (int c = 0; c < all.colours; ++c) {
      const int64_t offset = logistics::colour_offset(all.colours, all.mixtures, c) + k;
      to_mean[c] = weight * by_mean[c];
      grad_x[c] -= to_mean[c];
      write(all.grad_parameters, count, offset, to_mean[c]);
      write(all.grad_parameters, count, offset + all.mixtures, weight * by_log_scale[c]);
    }
    if (all.colours == 1) continue;
    for (int i = 0; i < kMostColours; ++i) {
      const int mean = i == 0 ? 1 : 2, colour = i == 2 ? 1 : 0;  // whose mean is moved by which colour
      const T coefficient = logistics::squash(pixel.coefficient(i, k));
      grad_x[colour] += coefficient * to_mean[mean];
      write(all.grad_parameters, count, logistics::colour_offset(3, all.mixtures, i) + 2 * all.mixtures + k,
            to_mean[mean] * x[colour] * (T(1) - coefficient * coefficient));
    }
  }
  for (int c = 0; c < all.colours; ++c) write(all.grad_x, all.colours, c, grad_x[c]);
}

unsigned blocks_for(int64_t pixels, int64_t threads) {
  const int64_t blocks = (pixels + threads - 1) / threads;
  check(blocks <= 0x7fffffff, "x has too many pixels for one launch: ", pixels);
  return static_cast<unsigned>(blocks);
}

template <class Stored>
Arguments<Stored> arguments_of(const Tensor& x, const Tensor& parameters, int mixtures, int64_t levels) {
  Arguments<Stored> all{
      Channels(parameters), Channels(x), static_cast<int>(x.size(1)), mixtures, 1, 0, 0, nullptr, Rows(), {}, {}};
  for (int64_t d = 2; d < x.dim(); ++d) all.pixels *= x.size(d);
  all.all = x.size(0) * all.pixels;
  all.half = static_cast<typename arithmetic<Stored>::type>(1.0 / static_cast<double>(levels - 1));
  return all;
}

Tensor discretized_logistics_forward(const Tensor& x, const Tensor& parameters, int64_t levels) {
  const int mixtures = check_logistics(x, parameters, levels);
  const std::vector<int64_t> shape = pixel_sizes(x);
  Tensor log_prob = torch::stable::new_empty(x, {shape.data(), shape.size()}, sum_dtype(parameters));
  const OnDevice device(x.get_device_index());
  for_dtype(parameters.scalar_type(), [&](auto zero) {
    using Stored = decltype(zero);
    Arguments<Stored> all = arguments_of<Stored>(x, parameters, mixtures, levels);
    all.log_prob = static_cast<typename Arguments<Stored>::T*>(log_prob.mutable_data_ptr());
    launch(log_prob_kernel<Stored>, dim3(blocks_for(all.all, kThreads)), dim3(kThreads), 0, device.stream(), all);
  });
  return log_prob;
}

std::tuple<Tensor, Tensor> discretized_logistics_backward(const Tensor& x, const Tensor& parameters, const Tensor& grad,
                                                          int64_t levels) {
  const int mixtures = check_logistics(x, parameters, levels);
  check_grad_log_prob(x, grad);
  Tensor grad_x = empty_like_shape(x, x.scalar_type());
  Tensor grad_parameters = empty_like_shape(parameters, parameters.scalar_type());
  const OnDevice device(x.get_device_index());
  for_dtype(parameters.scalar_type(), [&](auto zero) {
    using Stored = decltype(zero);
    Arguments<Stored> all = arguments_of<Stored>(x, parameters, mixtures, levels);
    all.grad = Rows(grad, grad.dim());
    all.grad_x = {grad_x.mutable_data_ptr(), grad_x.scalar_type()};
    all.grad_parameters = {grad_parameters.mutable_data_ptr(), grad_parameters.scalar_type()};
    launch(backward_kernel<Stored>, dim3(blocks_for(all.all, kThreads)), dim3(kThreads), 0, device.stream(), all);
  });
  return {grad_x, grad_parameters};
}

template <class Stored, class T>
__global__ void __launch_bounds__(kThreads) draw_kernel(Draws<Stored, T> draws, int64_t scratch_size) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < draws.rows) draws.draw(row, dynamic_shared<T>() + threadIdx.x * scratch_size);
}

std::tuple<Tensor, Tensor> discretized_logistics_sample(const Tensor& parameters, const Tensor& sample_ids,
                                                        int64_t seed, std::optional<Tensor> seeds, int64_t position,
                                                        std::optional<Tensor> positions, int64_t colours,
                                                        int64_t levels, std::optional<Tensor> x,
                                                        std::optional<Tensor> known) {
  const OnDevice device(parameters.get_device_index());
  return draw_pixels(parameters, sample_ids, seed, seeds, position, positions, colours, levels, x, known,
                     [&]<class Stored, class T>(const Draws<Stored, T>& draws) {
                       const int64_t bytes = draws.scratch_size() * static_cast<int64_t>(sizeof(T));
                       int64_t threads = kThreads;
                       while (threads > 1 && threads * bytes > kSharedBytes) threads /= 2;
                       launch(draw_kernel<Stored, T>, dim3(blocks_for(draws.rows, threads)),
                              dim3(static_cast<unsigned>(threads)), static_cast<size_t>(threads * bytes),
                              device.stream(), draws, draws.scratch_size());
                     });
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("discretized_logistics_forward", TORCH_BOX(&discretized_logistics_forward));
  library.impl("discretized_logistics_backward", TORCH_BOX(&discretized_logistics_backward));
  library.impl("discretized_logistics_sample", TORCH_BOX(&discretized_logistics_sample));
}

}  // namespace
}  // namespace pygen
