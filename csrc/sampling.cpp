// Sampling from logits on the CPU: one row per work item.
#include "row_sampler.h"
#include "sampling_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

// Calls f(sampler, scores of the row, row) for each row, with the C++ type of the arithmetic.
template <class F>
void for_rows(const Tensor& logits, const std::optional<Tensor>& unconditional, const std::optional<Tensor>& history,
              const std::optional<Tensor>& allowed, const sampling::Filters& filters, const F& f) {
  check_logits(logits);
  check_filters(logits, unconditional, history, allowed, filters);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  for_dtype(logits.scalar_type(), [&](auto zero) {
    using Stored = decltype(zero);
    using T = typename arithmetic<Stored>::type;
    const Sources<Stored> sources(logits, unconditional, history, allowed, filters);
    parallel(rows, vocabulary + 200, [&](int64_t from, int64_t to) {
      sampling::RowSampler<T> sampler(vocabulary, filters);
      for (int64_t row = from; row < to; ++row) f(sampler, sampler.read(sources, row), row);
    });
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
  const PerRow all_seeds = per_row("seed", seeds, seed, logits);
  const PerRow all_positions = per_row("position", positions, position, logits);
  const int64_t rows = logits.size(0);
  Tensor token = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor log_prob = torch::stable::new_empty(logits, {rows}, sum_dtype(logits));
  const auto* ids = static_cast<const int64_t*>(sample_ids.data_ptr());
  const int64_t id_stride = sample_ids.stride(0);
  auto* const tokens = static_cast<int64_t*>(token.data_ptr());
  void* const log_probs = log_prob.data_ptr();
  for_rows(logits, unconditional, history, allowed,
           {guidance_scale, repetition_penalty, temperature, top_k, top_p, min_p, typical_p, split_ties},
           [&]<class T>(sampling::RowSampler<T>& sampler, const T* x, int64_t row) {
             const auto uniform = [&] {
               return sampling::uniform(all_seeds[row], ids[row * id_stride], all_positions[row]);
             };
             sampler.sample(x, uniform, tokens + row, static_cast<T*>(log_probs) + row);
           });
  return {token, log_prob};
}

Tensor filter_logits(Tensor logits, double temperature, int64_t top_k, double top_p, double min_p, double typical_p,
                     bool split_ties, std::optional<Tensor> unconditional, double guidance_scale,
                     std::optional<Tensor> history, double repetition_penalty, std::optional<Tensor> allowed) {
  check_logits(logits);
  Tensor log_probs = empty_like_shape(logits, sum_dtype(logits));
  void* const out = log_probs.data_ptr();
  for_rows(logits, unconditional, history, allowed,
           {guidance_scale, repetition_penalty, temperature, top_k, top_p, min_p, typical_p, split_ties},
           [&]<class T>(sampling::RowSampler<T>& sampler, const T* x, int64_t row) {
             sampler.write(x, static_cast<T*>(out) + row * logits.size(1));
           });
  return log_probs;
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("sample_logits", TORCH_BOX(&sample_logits));
  library.impl("filter_logits", TORCH_BOX(&filter_logits));
}

}  // namespace
}  // namespace pygen
