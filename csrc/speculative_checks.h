// What the host checks of a speculative step.
#pragma once

#include "sampling_checks.h"

namespace pygen {

// (rows, steps, vocabulary) logits of any strides; row() gives those of one token.
template <class Stored>
struct Steps {
  const Stored* data;
  int64_t row_stride, step_stride, stride;

  explicit Steps(const Tensor& x)
      : data(static_cast<const Stored*>(x.data_ptr())),
        row_stride(x.stride(0)),
        step_stride(x.stride(1)),
        stride(x.stride(2)) {}

  PYGEN_INLINE const Stored* row(int64_t number, int64_t step) const {
    return data + number * row_stride + step * step_stride;
  }
};

inline void check_speculative(const Tensor& draft_tokens, const Tensor& draft_logits, const Tensor& target_logits,
                              const Tensor& sample_ids) {
  check(target_logits.dim() == 3 && target_logits.size(1) > 0 && target_logits.size(2) > 0, "target_logits has shape ",
        shape_of(target_logits), ", but expected (rows, drafts + 1, vocabulary)");
  const int64_t rows = target_logits.size(0), drafts = target_logits.size(1) - 1, vocabulary = target_logits.size(2);
  check(vocabulary < (int64_t{1} << 31), "target_logits has a vocabulary of ", vocabulary, ", but expected below 2^31");
  check(is_floating(target_logits.scalar_type()), "target_logits has a dtype that is not supported");
  check(draft_logits.dim() == 3 && draft_logits.size(0) == rows && draft_logits.size(1) == drafts &&
            draft_logits.size(2) == vocabulary,
        "draft_logits has shape ", shape_of(draft_logits), ", but expected (", rows, ", ", drafts, ", ", vocabulary,
        ")");
  check(draft_logits.scalar_type() == target_logits.scalar_type(), "draft_logits has another dtype than target_logits");
  check(same_device(draft_logits, target_logits), "draft_logits is on another device than target_logits");
  check(draft_tokens.dim() == 2 && draft_tokens.size(0) == rows && draft_tokens.size(1) == drafts,
        "draft_tokens has shape ", shape_of(draft_tokens), ", but expected (", rows, ", ", drafts, ")");
  check(draft_tokens.scalar_type() == ScalarType::Long, "draft_tokens must be int64");
  check(same_device(draft_tokens, target_logits), "draft_tokens is on another device than target_logits");
  check_sample_ids(sample_ids, target_logits);
}

}  // namespace pygen
