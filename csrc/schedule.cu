// A solver step on CUDA: a thread takes N neighbouring elements of a sample, 16 bytes of it at a time where all tensors
// are aligned, and makes their noise itself: two blocks of Philox cost less than reading it from memory. Any mixture of
// dtypes is read as stored; tensors that are not contiguous are copied first. The table and the step stay on the
// device. Built with -fmad=false, as noise.cu is.
#include "schedule.h"

#include "noise.h"
#include "schedule_checks.h"
#include "simt.h"
#include "tensor.h"
#include "vector.h"

namespace pygen {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // fills any device a few times over; the kernel strides over the rest
constexpr int kMaxHistory = 8;

// A contiguous tensor as stored; data is null where it is absent.
struct Stored {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
};

template <int N, class T>
__device__ __forceinline__ void read(const Stored& tensor, int64_t at, int count, bool aligned, T* to) {
  load_vector<N>(tensor.data, tensor.dtype, at, count, aligned, to);
}

template <int N, class T>
__device__ __forceinline__ void write(const Stored& tensor, int64_t at, int count, bool aligned, const T* values) {
  store_vector<N>(tensor.data, tensor.dtype, at, count, aligned, values);
}

// Where the elements are: rows of one width, each in groups of N, the last group of a row perhaps shorter.
struct Extent {
  int64_t rows, width;
  bool aligned;
};

template <class T>
struct StepArguments {
  Stored sample, model_output, noise, history[kMaxHistory], next, denoised;
  int history_count;
  bool addressed;
  NoiseAddresses addresses;
  StepRows table;
  T low, high;
};

template <int N, class T>
__global__ void __launch_bounds__(kThreads) step_kernel(StepArguments<T> arguments, Extent extent) {
  const int64_t groups = (extent.width + N - 1) / N, total = extent.rows * groups;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const bool aligned = extent.aligned;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < total; item += stride) {
    const int64_t row = item / groups, start = item % groups * N, at = row * extent.width + start;
    const int count = static_cast<int>(min(static_cast<int64_t>(N), extent.width - start));
    const float* const coefficients = arguments.table.of(row);
    const auto c = StepCoefficients<T>::read(coefficients, arguments.low, arguments.high);
    T x[N], e[N], other[N], next[N], denoised[N];
    read<N>(arguments.sample, at, count, aligned, x);
    read<N>(arguments.model_output, at, count, aligned, e);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      denoised[k] = clip_denoised(unclipped_denoised(x[k], e[k], c), c);
      next[k] = step_sum(denoised[k], x[k], e[k], c);
    }
    if (arguments.noise.data) {
      read<N>(arguments.noise, at, count, aligned, other);
#pragma unroll
      for (int k = 0; k < N; ++k) next[k] = next[k] + c.z * other[k];
    } else if (arguments.addressed && c.z != T(0)) {
#pragma unroll
      for (int part = 0; part < N; part += 4) {
        float z[4];
        noise_block<NoiseStream::kNormal>(arguments.addresses.seed_of(row), arguments.addresses.sample_id_of(row),
                                          arguments.addresses.draw_of(row), static_cast<uint32_t>((start + part) / 4),
                                          z);
#pragma unroll
        for (int k = 0; k < 4; ++k) next[part + k] = next[part + k] + c.z * static_cast<T>(z[k]);
      }
    }
    for (int i = 0; i < arguments.history_count; ++i) {
      const T coefficient = coefficients ? static_cast<T>(coefficients[kSolverCoefficients + i]) : T(0);
      read<N>(arguments.history[i], at, count, aligned, other);
#pragma unroll
      for (int k = 0; k < N; ++k) next[k] = next[k] + coefficient * other[k];
    }
    write<N>(arguments.next, at, count, aligned, next);
    if (arguments.denoised.data) write<N>(arguments.denoised, at, count, aligned, denoised);
  }
}

template <class T>
struct BackwardArguments {
  Stored sample, model_output, grad_next, grad_denoised, grad_sample, grad_model_output;
  StepRows table;
  T low, high;
};

template <int N, class T>
__global__ void __launch_bounds__(kThreads) step_backward_kernel(BackwardArguments<T> arguments, Extent extent) {
  const int64_t groups = (extent.width + N - 1) / N, total = extent.rows * groups;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const bool aligned = extent.aligned;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < total; item += stride) {
    const int64_t row = item / groups, start = item % groups * N, at = row * extent.width + start;
    const int count = static_cast<int>(min(static_cast<int64_t>(N), extent.width - start));
    const auto c = StepCoefficients<T>::read(arguments.table.of(row), arguments.low, arguments.high);
    T x[N], e[N], grad_next[N], grad_denoised[N] = {};
    read<N>(arguments.sample, at, count, aligned, x);
    read<N>(arguments.model_output, at, count, aligned, e);
    read<N>(arguments.grad_next, at, count, aligned, grad_next);
    if (arguments.grad_denoised.data) read<N>(arguments.grad_denoised, at, count, aligned, grad_denoised);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const StepGradient<T> gradient = step_gradient(x[k], e[k], grad_next[k], grad_denoised[k], c);
      x[k] = gradient.x;
      e[k] = gradient.e;
    }
    write<N>(arguments.grad_sample, at, count, aligned, x);
    write<N>(arguments.grad_model_output, at, count, aligned, e);
  }
}

// Turns tensors into `Stored`, keeps the contiguous copies alive until the launch is queued (PyTorch's allocator hands
// memory on in stream order), and notes whether every row of every tensor starts where a vector may.
class Operands {
 public:
  Operands(int64_t rows, int64_t width, int n) : rows_(rows), width_(width), n_(n) {}

  Stored input(const Tensor& x) {
    kept_.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
    return note(kept_.back());
  }
  Stored output(Tensor& x) { return note(x); }
  Extent extent() const { return {rows_, width_, aligned_ && (rows_ == 1 || width_ % n_ == 0)}; }

 private:
  Stored note(const Tensor& x) {
    aligned_ = aligned_ && vector_aligned(x.data_ptr(), x.scalar_type(), n_);
    return {x.data_ptr(), x.scalar_type()};
  }

  int64_t rows_, width_;
  int n_;
  bool aligned_ = true;
  std::vector<Tensor> kept_;
};

template <int N>
unsigned grid_of(const Extent& extent) {
  const int64_t items = extent.rows * ((extent.width + N - 1) / N);
  return static_cast<unsigned>(std::min<int64_t>((items + kThreads - 1) / kThreads, kMaxBlocks));
}

// Calls f(T{}, N) for the arithmetic and the group of elements that suit the sample's dtype.
template <class F>
void for_sample(const Tensor& sample, F&& f) {
  if (sample.scalar_type() == ScalarType::Double) {
    f(double{}, std::integral_constant<int, 4>{});
  } else if (sample.scalar_type() == ScalarType::Float) {
    f(float{}, std::integral_constant<int, 4>{});
  } else {
    f(float{}, std::integral_constant<int, 8>{});
  }
}

Tensor step(const Tensor& sample, const Tensor& model_output, const Tensor& coefficients, int64_t step,
            const std::optional<Tensor>& steps, const std::vector<Tensor>& history, const std::optional<Tensor>& noise,
            int64_t seed, const std::optional<Tensor>& seeds, const std::optional<Tensor>& sample_ids, double low,
            double high, Tensor* denoised) {
  const Tensor table = contiguous_table(coefficients);
  const StepRows table_rows =
      step_rows_of(sample, coefficients, table, static_cast<int64_t>(history.size()), step, steps);
  check_like_sample("model_output", model_output, sample);
  if (noise) check_like_sample("noise", *noise, sample);
  for (const Tensor& h : history) check_like_sample("history", h, sample);
  check(!noise || !sample_ids, "noise was given together with sample_ids, but expected one of the two");
  check(history.size() <= kMaxHistory, "history has ", history.size(), " tensors, but expected at most ", kMaxHistory);
  NoiseAddresses addresses;
  if (sample_ids) addresses = noise_addresses(sample, sample.size(0), *sample_ids, seed, seeds, step, steps);

  Tensor next = empty_like_shape(sample, sample.scalar_type());
  if (denoised) *denoised = empty_like_shape(sample, sample.scalar_type());
  if (sample.numel() == 0) return next;
  const int64_t rows = per_sample(steps, sample_ids) ? sample.size(0) : 1;
  const OnDevice device(sample.get_device_index());
  const Stream stream = device.stream();
  for_sample(sample, [&](auto zero, auto n) {
    using T = decltype(zero);
    constexpr int N = decltype(n)::value;
    Operands operands(rows, sample.numel() / rows, N);
    StepArguments<T> arguments;
    arguments.sample = operands.input(sample);
    arguments.model_output = operands.input(model_output);
    if (noise) arguments.noise = operands.input(*noise);
    for (size_t i = 0; i < history.size(); ++i) arguments.history[i] = operands.input(history[i]);
    arguments.next = operands.output(next);
    if (denoised) arguments.denoised = operands.output(*denoised);
    arguments.history_count = static_cast<int>(history.size());
    arguments.addressed = sample_ids.has_value();
    arguments.addresses = addresses;
    arguments.table = table_rows;
    arguments.low = static_cast<T>(low);
    arguments.high = static_cast<T>(high);
    const Extent extent = operands.extent();
    launch(step_kernel<N, T>, grid_of<N>(extent), kThreads, 0, stream, arguments, extent);
  });
  return next;
}

Tensor diffusion_step(const Tensor& sample, const Tensor& model_output, const Tensor& coefficients, int64_t index,
                      const std::optional<Tensor>& steps, const std::vector<Tensor>& history,
                      const std::optional<Tensor>& noise, int64_t seed, const std::optional<Tensor>& seeds,
                      const std::optional<Tensor>& sample_ids, double low, double high) {
  return step(sample, model_output, coefficients, index, steps, history, noise, seed, seeds, sample_ids, low, high,
              nullptr);
}

std::tuple<Tensor, Tensor> diffusion_step_denoised(const Tensor& sample, const Tensor& model_output,
                                                   const Tensor& coefficients, int64_t index,
                                                   const std::optional<Tensor>& steps,
                                                   const std::vector<Tensor>& history,
                                                   const std::optional<Tensor>& noise, int64_t seed,
                                                   const std::optional<Tensor>& seeds,
                                                   const std::optional<Tensor>& sample_ids, double low, double high) {
  Tensor denoised;
  Tensor next = step(sample, model_output, coefficients, index, steps, history, noise, seed, seeds, sample_ids, low,
                     high, &denoised);
  return {next, denoised};
}

std::tuple<Tensor, Tensor> diffusion_step_backward(const Tensor& sample, const Tensor& model_output,
                                                   const Tensor& coefficients, int64_t index,
                                                   const std::optional<Tensor>& steps, double low, double high,
                                                   const Tensor& grad_next,
                                                   const std::optional<Tensor>& grad_denoised) {
  const Tensor table = contiguous_table(coefficients);
  const StepRows table_rows = step_rows_of(sample, coefficients, table, history_of(coefficients), index, steps);
  check_like_sample("model_output", model_output, sample);
  check_like_sample("grad_next", grad_next, sample);
  if (grad_denoised) check_like_sample("grad_denoised", *grad_denoised, sample);
  Tensor grad_sample = empty_like_shape(sample, sample.scalar_type());
  Tensor grad_model_output = empty_like_shape(sample, model_output.scalar_type());
  if (sample.numel() == 0) return {grad_sample, grad_model_output};
  const int64_t rows = per_sample(steps, std::nullopt) ? sample.size(0) : 1;
  const OnDevice device(sample.get_device_index());
  const Stream stream = device.stream();
  for_sample(sample, [&](auto zero, auto n) {
    using T = decltype(zero);
    constexpr int N = decltype(n)::value;
    Operands operands(rows, sample.numel() / rows, N);
    BackwardArguments<T> arguments;
    arguments.sample = operands.input(sample);
    arguments.model_output = operands.input(model_output);
    arguments.grad_next = operands.input(grad_next);
    if (grad_denoised) arguments.grad_denoised = operands.input(*grad_denoised);
    arguments.grad_sample = operands.output(grad_sample);
    arguments.grad_model_output = operands.output(grad_model_output);
    arguments.table = table_rows;
    arguments.low = static_cast<T>(low);
    arguments.high = static_cast<T>(high);
    const Extent extent = operands.extent();
    launch(step_backward_kernel<N, T>, grid_of<N>(extent), kThreads, 0, stream, arguments, extent);
  });
  return {grad_sample, grad_model_output};
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("diffusion_step", TORCH_BOX(&diffusion_step));
  library.impl("diffusion_step_denoised", TORCH_BOX(&diffusion_step_denoised));
  library.impl("diffusion_step_backward", TORCH_BOX(&diffusion_step_backward));
}

}  // namespace
}  // namespace pygen
