// Sampling from logits on CUDA: one block per row, no sorting of the vocabulary. Guided, penalized or masked scores are
// written once, by a kernel of their own; the filters and the draw read scores, or plain logits, where they lie.
#include "block_sampler.h"
#include "sampling_checks.h"
#include "simt.h"
#include "tensor.h"

namespace pygen {
namespace {

using sampling::Whole;

template <class Stored, class T>
struct ScoreArguments {
  Sources<Stored> sources;
  int64_t vocabulary;
  T guidance, penalty, scale;
  int bits;
  T* scores;  // (rows, vocabulary)
};

// The peak of a row and the logarithm of its sum over e^peak. All threads call and all get the answer.
template <class Stored, class T>
__device__ __forceinline__ void find_total(const Stored* data, int64_t stride, const ScoreArguments<Stored, T>& all,
                                           T* scratch, Whole* sums, T* peak, T* log_total) {
  T top = -std::numeric_limits<T>::infinity();
  for (int64_t i = threadIdx.x; i < all.vocabulary; i += static_cast<int>(blockDim.x)) {
    const T x = static_cast<T>(data[i * stride]);
    if (x > top || x != x) top = x;
    if (top != top) break;
  }
  *peak = top = block_max(top, scratch);
  Whole total = 0;
  if (top - top == T(0)) {
    for (int64_t i = threadIdx.x; i < all.vocabulary; i += static_cast<int>(blockDim.x)) {
      total += static_cast<Whole>(sampling::weigh(static_cast<T>(data[i * stride]), top, T(1), all.scale));
    }
  }
  total = block_sum(total, sums);
  *log_total = top - top == T(0) ? static_cast<T>(sampling::log_of_total(static_cast<double>(total), all.bits))
                                 : std::numeric_limits<T>::quiet_NaN();
}

__device__ __forceinline__ void exchange(float* to, float value) {
  atomicExch(reinterpret_cast<unsigned*>(to), __float_as_uint(value));
}
__device__ __forceinline__ void exchange(double* to, double value) {
  atomicExch(reinterpret_cast<Whole*>(to), static_cast<Whole>(__double_as_longlong(value)));
}

template <class Stored, class T>
__global__ void __launch_bounds__(sampling::kMostThreads) score_kernel(ScoreArguments<Stored, T> all) {
  SHARED(T, scratch, [32]);
  SHARED(Whole, sums, [32]);
  const Sources<Stored>& sources = all.sources;
  const int64_t number = blockIdx.x, n = all.vocabulary;
  const Stored* const logits = sources.logits.row(number);
  const Stored* const without = sources.unconditional.row(number);
  T peak = 0, log_total = 0, peak_without = 0, log_total_without = 0;
  if (sources.normalized()) {
    find_total(logits, sources.logits.stride, all, scratch, sums, &peak, &log_total);
    find_total(without, sources.unconditional.stride, all, scratch, sums, &peak_without, &log_total_without);
  }
  const auto score = [&](int64_t i) {
    const T c = static_cast<T>(logits[i * sources.logits.stride]);
    if (!sources.guided) return c;
    const T u = static_cast<T>(without[i * sources.unconditional.stride]);
    return sampling::guide(sampling::normalize(c, peak, log_total),
                           sampling::normalize(u, peak_without, log_total_without), all.guidance);
  };
  const auto allowed = [&](int64_t i) {
    return !sources.masked || sources.allowed.row(number)[i * sources.allowed.stride];
  };
  T* const scores = all.scores + number * n;
  for (int64_t i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) {
    scores[i] = allowed(i) ? score(i) : -std::numeric_limits<T>::infinity();
  }
  if (!sources.penalized) return;
  __syncthreads();
  const int64_t* const ids = sources.history.row(number);
  for (int64_t i = threadIdx.x; i < sources.history.columns; i += static_cast<int>(blockDim.x)) {
    const int64_t id = ids[i * sources.history.stride];
    // An id that comes twice is written twice, and the same both times: it is made from the logits.
    if (id >= 0 && id < n && allowed(id)) exchange(scores + id, sampling::penalize(score(id), all.penalty));
  }
}

template <class Stored, class T>
struct SampleArguments {
  sampling::RowArguments<Stored, T> row;
  PerRow seeds, positions;
  const int64_t* sample_ids;
  int64_t id_stride;
  int64_t* token;
  T* log_prob;
};

template <class Stored, class T>
__global__ void __launch_bounds__(sampling::kMostThreads) sample_kernel(SampleArguments<Stored, T> all) {
  SHARED(sampling::Scratch<T>, scratch, [1]);
  const int64_t number = blockIdx.x;
  sampling::BlockSampler<Stored, T> sampler(all.row, number, scratch);
  if (!sampler.find_peak()) {
    if (threadIdx.x == 0) {
      all.token[number] = -1;
      all.log_prob[number] = std::numeric_limits<T>::quiet_NaN();
    }
    return;
  }
  if (all.row.greedy) {
    const int64_t token = sampler.first_of_peak();
    if (threadIdx.x == 0) {
      all.token[number] = token;
      all.log_prob[number] = 0;
    }
    return;
  }
  sampler.filter();
  const double u = sampling::uniform(all.seeds[number], all.sample_ids[number * all.id_stride], all.positions[number]);
  sampler.draw(u, [&](int64_t token, T log_prob) {
    all.token[number] = token;
    all.log_prob[number] = log_prob;
  });
}

template <class Stored, class T>
struct FilterArguments {
  sampling::RowArguments<Stored, T> row;
  T* log_probs;  // (rows, vocabulary)
};

template <class Stored, class T>
__global__ void __launch_bounds__(sampling::kMostThreads) filter_kernel(FilterArguments<Stored, T> all) {
  SHARED(sampling::Scratch<T>, scratch, [1]);
  const int64_t number = blockIdx.x, n = all.row.vocabulary;
  T* const log_probs = all.log_probs + number * n;
  sampling::BlockSampler<Stored, T> sampler(all.row, number, scratch);
  const bool valid = sampler.find_peak();
  if (!valid || all.row.greedy) {
    const int64_t token = valid ? sampler.first_of_peak() : -1;
    constexpr T kNone = -std::numeric_limits<T>::infinity(), kInvalid = std::numeric_limits<T>::quiet_NaN();
    for (int64_t i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) {
      log_probs[i] = !valid ? kInvalid : i == token ? T(0) : kNone;
    }
    return;
  }
  sampler.filter();
  sampler.write(log_probs);
}

// Calls f(arguments of the rows) with the scores of all rows, after writing them where they are not the logits.
template <class F>
void with_scores(const Tensor& logits, const std::optional<Tensor>& unconditional, const std::optional<Tensor>& history,
                 const std::optional<Tensor>& allowed, const sampling::Filters& filters, Stream stream, const F& f) {
  check_filters(logits, unconditional, history, allowed, filters);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  check(rows <= 0x7fffffff, "logits has too many rows for one launch: ", rows);
  for_dtype(logits.scalar_type(), [&](auto zero) {
    using Stored = decltype(zero);
    using T = typename arithmetic<Stored>::type;
    const Sources<Stored> sources(logits, unconditional, history, allowed, filters);
    if (sources.plain()) {
      f(sampling::row_arguments<Stored, T>(sources.logits, vocabulary, filters));
      return;
    }
    const Tensor scores = empty_like_shape(logits, sum_dtype(logits));
    ScoreArguments<Stored, T> all{sources,
                                  vocabulary,
                                  static_cast<T>(filters.guidance_scale),
                                  static_cast<T>(filters.repetition_penalty),
                                  T(0),
                                  sampling::weight_bits(vocabulary),
                                  static_cast<T*>(scores.data_ptr())};
    all.scale = static_cast<T>(sampling::power_of_two(all.bits));
    launch(score_kernel<Stored, T>, dim3(static_cast<unsigned>(rows)), dim3(sampling::threads_for(vocabulary)), 0,
           stream, all);
    f(sampling::row_arguments<T, T>(grid_of<T>(scores), vocabulary, filters));
  });
}

std::tuple<Tensor, Tensor> sample_logits(Tensor logits, Tensor sample_ids, int64_t seed, std::optional<Tensor> seeds,
                                         int64_t position, std::optional<Tensor> positions, double temperature,
                                         int64_t top_k, double top_p, double min_p, double typical_p, bool split_ties,
                                         std::optional<Tensor> unconditional, double guidance_scale,
                                         std::optional<Tensor> history, double repetition_penalty,
                                         std::optional<Tensor> allowed) {
  check_logits(logits);
  check_sample_ids(sample_ids, logits);
  const int64_t rows = logits.size(0);
  const PerRow all_seeds = per_row("seed", seeds, seed, logits);
  const PerRow all_positions = per_row("position", positions, position, logits);
  Tensor token = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor log_prob = torch::stable::new_empty(logits, {rows}, sum_dtype(logits));
  const OnDevice device(logits.get_device_index());
  with_scores(logits, unconditional, history, allowed,
              {guidance_scale, repetition_penalty, temperature, top_k, top_p, min_p, typical_p, split_ties},
              device.stream(), [&]<class Stored, class T>(const sampling::RowArguments<Stored, T>& row) {
                const SampleArguments<Stored, T> all{row,
                                                     all_seeds,
                                                     all_positions,
                                                     static_cast<const int64_t*>(sample_ids.data_ptr()),
                                                     sample_ids.stride(0),
                                                     static_cast<int64_t*>(token.data_ptr()),
                                                     static_cast<T*>(log_prob.data_ptr())};
                launch(sample_kernel<Stored, T>, dim3(static_cast<unsigned>(rows)),
                       dim3(sampling::threads_for(row.vocabulary)), 0, device.stream(), all);
              });
  return {token, log_prob};
}

Tensor filter_logits(Tensor logits, double temperature, int64_t top_k, double top_p, double min_p, double typical_p,
                     bool split_ties, std::optional<Tensor> unconditional, double guidance_scale,
                     std::optional<Tensor> history, double repetition_penalty, std::optional<Tensor> allowed) {
  check_logits(logits);
  Tensor log_probs = empty_like_shape(logits, sum_dtype(logits));
  const OnDevice device(logits.get_device_index());
  with_scores(logits, unconditional, history, allowed,
              {guidance_scale, repetition_penalty, temperature, top_k, top_p, min_p, typical_p, split_ties},
              device.stream(), [&]<class Stored, class T>(const sampling::RowArguments<Stored, T>& row) {
                const FilterArguments<Stored, T> all{row, static_cast<T*>(log_probs.data_ptr())};
                launch(filter_kernel<Stored, T>, dim3(static_cast<unsigned>(logits.size(0))),
                       dim3(sampling::threads_for(row.vocabulary)), 0, device.stream(), all);
              });
  return log_probs;
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("sample_logits", TORCH_BOX(&sample_logits));
  library.impl("filter_logits", TORCH_BOX(&filter_logits));
}

}  // namespace
}  // namespace pygen
