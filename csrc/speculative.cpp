// Speculative sampling on the CPU: one row per work item, which weighs the two distributions of one draft after the
// other until one is not kept.
#include "speculative.h"

#include "row_sampler.h"
#include "speculative_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

template <class T>
PYGEN_CLONES double residual_rows(const T* __restrict target, const T* __restrict draft, int64_t n, double ratio,
                                  double* __restrict residual) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const double rest = speculative::residual(static_cast<double>(target[i]), static_cast<double>(draft[i]), ratio);
    residual[i] = rest;
    total += rest;
  }
  return total;
}

// The first index whose cumulative weight exceeds u times the whole.
template <class T>
int64_t draw_whole(const T* weight, double total, double u) {
  const double target = sampling::inverse_target(u, total);
  double passed = 0;
  int64_t i = 0;
  while (!((passed += static_cast<double>(weight[i])) > target)) ++i;
  return i;
}

struct Addresses {
  PerRow seeds, positions;
  const int64_t* sample_ids;
  int64_t id_stride;
};

template <class Stored, class T>
class RowVerifier {
 public:
  RowVerifier(const Steps<Stored>& draft, const Steps<Stored>& target, int64_t vocabulary)
      : draft_(draft),
        target_(target),
        vocabulary_(vocabulary),
        bits_(sampling::weight_bits(vocabulary)),
        sampler_(vocabulary, sampling::Filters()),
        weights_(std::make_unique_for_overwrite<T[]>(2 * static_cast<size_t>(vocabulary))),
        residual_(std::make_unique_for_overwrite<double[]>(static_cast<size_t>(vocabulary))) {}

  // Returns how many drafts are kept; the token after them is written, and the rest is as it was.
  int64_t verify(int64_t row, const Grid<int64_t>& drafts, const Addresses& at, int64_t* tokens, T* log_probs) {
    const int64_t id = at.sample_ids[row * at.id_stride];
    const int64_t* const drafted = drafts.row(row);
    for (int64_t step = 0;; ++step) {
      const int64_t position = at.positions[row] + step;
      const T* const x = sampler_.read(target_.row(row, step), target_.stride);
      const int64_t token = step < drafts.columns ? drafted[step * drafts.stride] : -1;
      if (token < 0) {  // no draft here
        sampler_.sample(
            x, [&] { return sampling::uniform(at.seeds[row], id, position); }, tokens + step, log_probs + step);
        return step;
      }
      T* const p = weights_.get();
      T* const q = p + vocabulary_;
      T peak;
      const double target_total = sampler_.weigh(x, p, &peak);
      const auto log_prob = [&](int64_t chosen) {
        const T logit = static_cast<T>(target_.row(row, step)[chosen * target_.stride]);
        return static_cast<T>(sampling::log_share(logit, peak, T(1), target_total, bits_));
      };
      T draft_peak;
      const T* const y = sampler_.read(draft_.row(row, step), draft_.stride);
      const double draft_total = sampler_.weigh(y, q, &draft_peak);
      if (target_total == 0 || draft_total == 0 || token >= vocabulary_) return step;
      const speculative::Uniforms u = speculative::uniforms(at.seeds[row], id, position);
      if (speculative::accepts(u.accept, static_cast<double>(p[token]), target_total, static_cast<double>(q[token]),
                               draft_total)) {
        tokens[step] = token;
        log_probs[step] = log_prob(token);
        continue;
      }
      const double rest = residual_rows(p, q, vocabulary_, target_total / draft_total, residual_.get());
      // Equal distributions have nothing left between them, and drafts are refused only by rounding.
      tokens[step] = rest > 0 ? draw_whole(residual_.get(), rest, u.replace) : draw_whole(p, target_total, u.replace);
      log_probs[step] = log_prob(tokens[step]);
      return step;
    }
  }

 private:
  Steps<Stored> draft_, target_;
  int64_t vocabulary_;
  int bits_;
  sampling::RowSampler<T> sampler_;
  std::unique_ptr<T[]> weights_;
  std::unique_ptr<double[]> residual_;
};

std::tuple<Tensor, Tensor, Tensor> speculative_accept(const Tensor& draft_tokens, const Tensor& draft_logits,
                                                      const Tensor& target_logits, const Tensor& sample_ids,
                                                      int64_t seed, std::optional<Tensor> seeds, int64_t position,
                                                      std::optional<Tensor> positions) {
  check_speculative(draft_tokens, draft_logits, target_logits, sample_ids);
  const int64_t rows = target_logits.size(0), steps = target_logits.size(1), vocabulary = target_logits.size(2);
  Tensor tokens = torch::stable::new_empty(target_logits, {rows, steps}, ScalarType::Long);
  Tensor accepted = torch::stable::new_empty(target_logits, {rows}, ScalarType::Long);
  Tensor log_prob = torch::stable::new_empty(target_logits, {rows, steps}, sum_dtype(target_logits));
  const Addresses addresses{per_row("seed", seeds, seed, target_logits),
                            per_row("position", positions, position, target_logits),
                            static_cast<const int64_t*>(sample_ids.data_ptr()), sample_ids.stride(0)};
  const Grid<int64_t> drafts = grid_of<int64_t>(draft_tokens);
  for_dtype(target_logits.scalar_type(), [&](auto zero) {
    using Stored = decltype(zero);
    using T = typename arithmetic<Stored>::type;
    parallel(rows, 2 * steps * vocabulary, [&](int64_t from, int64_t to) {
      RowVerifier<Stored, T> verifier(Steps<Stored>(draft_logits), Steps<Stored>(target_logits), vocabulary);
      for (int64_t row = from; row < to; ++row) {
        int64_t* const own = static_cast<int64_t*>(tokens.data_ptr()) + row * steps;
        T* const log_probs = static_cast<T*>(log_prob.data_ptr()) + row * steps;
        std::fill(own, own + steps, -1);
        std::fill(log_probs, log_probs + steps, std::numeric_limits<T>::quiet_NaN());
        static_cast<int64_t*>(accepted.data_ptr())[row] = verifier.verify(row, drafts, addresses, own, log_probs);
      }
    });
  });
  return {tokens, accepted, log_prob};
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) { library.impl("speculative_accept", TORCH_BOX(&speculative_accept)); }

}  // namespace
}  // namespace pygen
