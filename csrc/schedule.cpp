// A solver step on the CPU: one pass in blocks that stay in the first-level cache, where the noise of a block is made
// and the history added, so that memory sees each tensor once. Built without contraction, as noise.cpp is.
#include "schedule.h"

#include "schedule_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

// Elements that one work item takes.
constexpr int64_t kChunk = 16 * kBlock;

template <bool kNoise, bool kDenoised, class T>
PYGEN_CLONES void step_rows(const T* __restrict x, const T* __restrict e, const T* __restrict z, T* __restrict next,
                            T* __restrict denoised, int64_t n, StepCoefficients<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T x_i = x[i], e_i = e[i];
    const T m0 = clip_denoised(unclipped_denoised(x_i, e_i, c), c);
    T sum = step_sum(m0, x_i, e_i, c);
    if constexpr (kNoise) sum = sum + c.z * z[i];
    if constexpr (kDenoised) denoised[i] = m0;
    next[i] = sum;
  }
}

template <class T>
PYGEN_CLONES void add_rows(const T* __restrict h, T* __restrict next, int64_t n, T coefficient) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) next[i] = next[i] + coefficient * h[i];
}

template <class T>
PYGEN_CLONES void step_backward_rows(const T* __restrict x, const T* __restrict e, const T* __restrict grad_next,
                                     const T* __restrict grad_denoised, T* __restrict grad_x, T* __restrict grad_e,
                                     int64_t n, StepCoefficients<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const StepGradient<T> gradient = step_gradient(x[i], e[i], grad_next[i], grad_denoised[i], c);
    grad_x[i] = gradient.x;
    grad_e[i] = gradient.e;
  }
}

template <class T>
constexpr T kZeros[kBlock] = {};

// Calls f(row, from, to) for chunks of all rows, on as many threads as the work is worth; `cost` in ns per element.
template <class F>
void for_chunks(int64_t rows, int64_t width, double cost, const F& f) {
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  const int64_t item_cost = static_cast<int64_t>(static_cast<double>(std::min(width, kChunk)) * cost) + 1;
  parallel(rows * chunks, item_cost, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t from = item % chunks * kChunk;
      f(item / chunks, from, std::min(width, from + kChunk));
    }
  });
}

// Blocks exist for the copies made in them; rows that are read and written where they lie go in one stride.
template <class T>
bool lies_ready(const Rows& rows) {
  constexpr ScalarType own = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  return rows.data == nullptr || (rows.dtype == own && rows.dense());
}

struct StepInputs {
  const Tensor &sample, &model_output;
  const std::vector<Tensor>& history;
  const std::optional<Tensor>& noise;
  const NoiseAddresses* addresses;  // null where noise is given or absent
};

template <class T>
void step_compute(const StepInputs& inputs, const StepRows& table, bool by_sample, double low, double high,
                  Tensor& next, Tensor* denoised) {
  const int64_t events = inputs.sample.dim() - (by_sample ? 1 : 0);
  const Rows x_rows(inputs.sample, events), e_rows(inputs.model_output, events);
  const Rows z_rows = inputs.noise ? Rows(*inputs.noise, events) : Rows();
  std::vector<Rows> h_rows;
  h_rows.reserve(inputs.history.size());
  for (const Tensor& h : inputs.history) h_rows.emplace_back(h, events);
  const ScalarType dtype = next.scalar_type();
  void* const next_data = next.mutable_data_ptr();
  void* const denoised_data = denoised ? denoised->mutable_data_ptr() : nullptr;

  const bool direct = lies_ready<T>(x_rows) && lies_ready<T>(e_rows) && lies_ready<T>(z_rows) && h_rows.empty();
  const double cost = inputs.addresses ? 1.0 : 0.2;
  for_chunks(x_rows.rows, x_rows.width, cost, [&](int64_t row, int64_t from, int64_t to) {
    const float* const coefficients = table.of(row);
    const auto c = StepCoefficients<T>::read(coefficients, static_cast<T>(low), static_cast<T>(high));
    const bool noisy = inputs.noise || (inputs.addresses && c.z != 0);
    auto block = denoised ? (noisy ? &step_rows<true, true, T> : &step_rows<false, true, T>)
                          : (noisy ? &step_rows<true, false, T> : &step_rows<false, false, T>);
    T x_block[kBlock], e_block[kBlock], z_block[kBlock], next_block[kBlock], denoised_block[kBlock];
    [[maybe_unused]] float normal[kBlock];
    const int64_t stride = direct && (inputs.noise || !noisy) ? kChunk : kBlock;
    for (int64_t start = from; start < to; start += stride) {
      const int64_t n = std::min(stride, to - start), at = row * x_rows.width + start;
      const T* x = read_block(x_rows, row, start, n, x_block);
      const T* e = read_block(e_rows, row, start, n, e_block);
      const T* z = z_block;
      if (inputs.noise) {
        z = read_block(z_rows, row, start, n, z_block);
      } else if (noisy) {
        if constexpr (std::is_same_v<T, float>) {
          normal_rows(*inputs.addresses, row, start, n, z_block);
        } else {
          normal_rows(*inputs.addresses, row, start, n, normal);
          copy_strided(normal, int64_t{1}, n, z_block);
        }
      }
      T* to_next = block_target(next_data, dtype, at, next_block);
      T* to_denoised = denoised ? block_target(denoised_data, dtype, at, denoised_block) : nullptr;
      block(x, e, z, to_next, to_denoised, n, c);
      for (size_t i = 0; i < h_rows.size(); ++i) {
        // x_block is free again, and what lies outside the table is NaN already.
        const T coefficient = coefficients ? static_cast<T>(coefficients[kSolverCoefficients + i]) : T(0);
        add_rows(read_block(h_rows[i], row, start, n, x_block), to_next, n, coefficient);
      }
      write_block(next_data, dtype, at, n, to_next);
      if (denoised) write_block(denoised_data, dtype, at, n, to_denoised);
    }
  });
}

Tensor step(const Tensor& sample, const Tensor& model_output, const Tensor& coefficients, int64_t step,
            const std::optional<Tensor>& steps, const std::vector<Tensor>& history, const std::optional<Tensor>& noise,
            int64_t seed, const std::optional<Tensor>& seeds, const std::optional<Tensor>& sample_ids, double low,
            double high, Tensor* denoised) {
  const Tensor table = contiguous_table(coefficients);
  const StepRows rows = step_rows_of(sample, coefficients, table, static_cast<int64_t>(history.size()), step, steps);
  check_like_sample("model_output", model_output, sample);
  if (noise) check_like_sample("noise", *noise, sample);
  for (const Tensor& h : history) check_like_sample("history", h, sample);
  check(!noise || !sample_ids, "noise was given together with sample_ids, but expected one of the two");
  NoiseAddresses addresses;
  if (sample_ids) addresses = noise_addresses(sample, sample.size(0), *sample_ids, seed, seeds, step, steps);

  Tensor next = empty_like_shape(sample, sample.scalar_type());
  if (denoised) *denoised = empty_like_shape(sample, sample.scalar_type());
  const StepInputs inputs{sample, model_output, history, noise, sample_ids ? &addresses : nullptr};
  auto compute = sample.scalar_type() == ScalarType::Double ? &step_compute<double> : &step_compute<float>;
  compute(inputs, rows, per_sample(steps, sample_ids), low, high, next, denoised);
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

template <class T>
void step_backward_compute(const Tensor& sample, const Tensor& model_output, const StepRows& table, bool by_sample,
                           double low, double high, const Tensor& grad_next, const std::optional<Tensor>& grad_denoised,
                           Tensor& grad_sample, Tensor& grad_model_output) {
  const int64_t events = sample.dim() - (by_sample ? 1 : 0);
  const Rows x_rows(sample, events), e_rows(model_output, events), next_rows(grad_next, events);
  const Rows denoised_rows = grad_denoised ? Rows(*grad_denoised, events) : Rows();
  void* const x_data = grad_sample.mutable_data_ptr();
  void* const e_data = grad_model_output.mutable_data_ptr();
  const ScalarType x_dtype = grad_sample.scalar_type(), e_dtype = grad_model_output.scalar_type();

  for_chunks(x_rows.rows, x_rows.width, 0.5, [&](int64_t row, int64_t from, int64_t to) {
    const auto c = StepCoefficients<T>::read(table.of(row), static_cast<T>(low), static_cast<T>(high));
    T x_block[kBlock], e_block[kBlock], next_block[kBlock], denoised_block[kBlock], to_x[kBlock], to_e[kBlock];
    for (int64_t start = from; start < to; start += kBlock) {
      const int64_t n = std::min(kBlock, to - start), at = row * x_rows.width + start;
      T* grad_x = block_target(x_data, x_dtype, at, to_x);
      T* grad_e = block_target(e_data, e_dtype, at, to_e);
      step_backward_rows(read_block(x_rows, row, start, n, x_block), read_block(e_rows, row, start, n, e_block),
                         read_block(next_rows, row, start, n, next_block),
                         grad_denoised ? read_block(denoised_rows, row, start, n, denoised_block) : kZeros<T>, grad_x,
                         grad_e, n, c);
      write_block(x_data, x_dtype, at, n, grad_x);
      write_block(e_data, e_dtype, at, n, grad_e);
    }
  });
}

std::tuple<Tensor, Tensor> diffusion_step_backward(const Tensor& sample, const Tensor& model_output,
                                                   const Tensor& coefficients, int64_t index,
                                                   const std::optional<Tensor>& steps, double low, double high,
                                                   const Tensor& grad_next,
                                                   const std::optional<Tensor>& grad_denoised) {
  const Tensor table = contiguous_table(coefficients);
  const StepRows rows = step_rows_of(sample, coefficients, table, history_of(coefficients), index, steps);
  check_like_sample("model_output", model_output, sample);
  check_like_sample("grad_next", grad_next, sample);
  if (grad_denoised) check_like_sample("grad_denoised", *grad_denoised, sample);
  Tensor grad_sample = empty_like_shape(sample, sample.scalar_type());
  Tensor grad_model_output = empty_like_shape(sample, model_output.scalar_type());
  auto compute =
      sample.scalar_type() == ScalarType::Double ? &step_backward_compute<double> : &step_backward_compute<float>;
  compute(sample, model_output, rows, per_sample(steps, std::nullopt), low, high, grad_next, grad_denoised, grad_sample,
          grad_model_output);
  return {grad_sample, grad_model_output};
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("diffusion_step", TORCH_BOX(&diffusion_step));
  library.impl("diffusion_step_denoised", TORCH_BOX(&diffusion_step_denoised));
  library.impl("diffusion_step_backward", TORCH_BOX(&diffusion_step_backward));
}

}  // namespace
}  // namespace pygen
