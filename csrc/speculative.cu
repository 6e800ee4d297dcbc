// Speculative sampling on CUDA: one block a row, which weighs the two distributions of one draft after the other until
// one is not kept.
#include "speculative.h"

#include "block_sampler.h"
#include "speculative_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

using sampling::BlockSampler;
using sampling::RowArguments;
using sampling::Scratch;
using sampling::Whole;

template <class Stored, class T>
struct Arguments {
  Steps<Stored> draft, target;
  Grid<int64_t> drafts;
  RowArguments<Stored, T> row;  // without any filter; the logits are those of each step
  PerRow seeds, positions;
  const int64_t* sample_ids;
  int64_t id_stride, steps;
  int64_t *tokens, *accepted;  // (rows, steps), (rows,)
  T* log_probs;                // (rows, steps)
};

template <class Stored, class T>
__device__ __forceinline__ RowArguments<Stored, T> step_of(const RowArguments<Stored, T>& row,
                                                           const Steps<Stored>& logits, int64_t number, int64_t step) {
  RowArguments<Stored, T> own = row;
  own.logits = {logits.row(number, step), 0, logits.stride, row.vocabulary};
  return own;
}

// One step: writes the token and its log-probability, and says whether it was the draft. All threads call.
template <class Stored, class T>
__device__ __forceinline__ bool keep_draft(const Arguments<Stored, T>& all, int64_t number, int64_t step,
                                           Scratch<T>* scratch) {
  const int64_t n = all.row.vocabulary, id = all.sample_ids[number * all.id_stride], seed = all.seeds[number];
  const int64_t position = all.positions[number] + step;
  int64_t* const to = all.tokens + number * all.steps + step;
  T* const log_prob = all.log_probs + number * all.steps + step;
  const RowArguments<Stored, T> target_row = step_of(all.row, all.target, number, step);
  BlockSampler<Stored, T> target(target_row, 0, scratch);
  if (!target.find_peak()) return false;
  const int64_t token = step < all.drafts.columns ? all.drafts.row(number)[step * all.drafts.stride] : -1;
  if (token < 0) {  // no draft here
    target.draw(sampling::uniform(seed, id, position), [&](int64_t drawn, T own) {
      *to = drawn;
      *log_prob = own;
    });
    return false;
  }
  const RowArguments<Stored, T> draft_row = step_of(all.row, all.draft, number, step);
  BlockSampler<Stored, T> draft(draft_row, 0, scratch);
  if (!draft.find_peak() || token >= n) return false;
  const Whole target_total = target.kept_weight(), draft_total = draft.kept_weight();
  const speculative::Uniforms u = speculative::uniforms(seed, id, position);
  if (speculative::accepts(u.accept, static_cast<double>(target.kept_weight(token)), static_cast<double>(target_total),
                           static_cast<double>(draft.kept_weight(token)), static_cast<double>(draft_total))) {
    if (threadIdx.x == 0) {
      *to = token;
      *log_prob = target.log_prob(token, target_total);
    }
    return true;
  }
  const double ratio = static_cast<double>(target_total) / static_cast<double>(draft_total);
  const auto residual = [&](int64_t i) {
    return static_cast<Whole>(speculative::residual(static_cast<double>(target.kept_weight(i)),
                                                    static_cast<double>(draft.kept_weight(i)), ratio));
  };
  Whole rest = 0;
  for (int64_t i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) rest += residual(i);
  rest = block_sum(rest, scratch->sums);
  // Equal distributions have nothing left between them, and drafts are refused only by rounding.
  const auto amount = [&](int64_t i) { return rest > 0 ? residual(i) : target.kept_weight(i); };
  sampling::draw_whole(n, u.replace, amount, scratch->sums, [&](int64_t drawn, Whole) {
    *to = drawn;
    *log_prob = target.log_prob(drawn, target_total);
  });
  return false;
}

template <class Stored, class T>
__global__ void __launch_bounds__(sampling::kMostThreads) accept_kernel(Arguments<Stored, T> all) {
  SHARED(Scratch<T>, scratch, [1]);
  const int64_t number = blockIdx.x;
  for (int64_t step = threadIdx.x; step < all.steps; step += static_cast<int>(blockDim.x)) {
    all.tokens[number * all.steps + step] = -1;
    all.log_probs[number * all.steps + step] = std::numeric_limits<T>::quiet_NaN();
  }
  __syncthreads();
  int64_t step = 0;
  while (keep_draft(all, number, step, scratch)) ++step;
  if (threadIdx.x == 0) all.accepted[number] = step;
}

std::tuple<Tensor, Tensor, Tensor> speculative_accept(const Tensor& draft_tokens, const Tensor& draft_logits,
                                                      const Tensor& target_logits, const Tensor& sample_ids,
                                                      int64_t seed, std::optional<Tensor> seeds, int64_t position,
                                                      std::optional<Tensor> positions) {
  check_speculative(draft_tokens, draft_logits, target_logits, sample_ids);
  const int64_t rows = target_logits.size(0), steps = target_logits.size(1), vocabulary = target_logits.size(2);
  check(rows <= 0x7fffffff, "target_logits has too many rows for one launch: ", rows);
  Tensor tokens = torch::stable::new_empty(target_logits, {rows, steps}, ScalarType::Long);
  Tensor accepted = torch::stable::new_empty(target_logits, {rows}, ScalarType::Long);
  Tensor log_prob = torch::stable::new_empty(target_logits, {rows, steps}, sum_dtype(target_logits));
  const OnDevice device(target_logits.get_device_index());
  for_dtype(target_logits.scalar_type(), [&](auto zero) {
    using Stored = decltype(zero);
    using T = typename arithmetic<Stored>::type;
    const Arguments<Stored, T> all{Steps<Stored>(draft_logits),
                                   Steps<Stored>(target_logits),
                                   grid_of<int64_t>(draft_tokens),
                                   sampling::row_arguments<Stored, T>({}, vocabulary, sampling::Filters()),
                                   per_row("seed", seeds, seed, target_logits),
                                   per_row("position", positions, position, target_logits),
                                   static_cast<const int64_t*>(sample_ids.data_ptr()),
                                   sample_ids.stride(0),
                                   steps,
                                   static_cast<int64_t*>(tokens.data_ptr()),
                                   static_cast<int64_t*>(accepted.data_ptr()),
                                   static_cast<T*>(log_prob.data_ptr())};
    launch(accept_kernel<Stored, T>, dim3(static_cast<unsigned>(rows)), dim3(sampling::threads_for(vocabulary)), 0,
           device.stream(), all);
  });
  return {tokens, accepted, log_prob};
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("speculative_accept", TORCH_BOX(&speculative_accept));
}

}  // namespace
}  // namespace pygen
