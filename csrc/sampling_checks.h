// What the host checks of the sampler, and how its arguments become plain numbers and pointers.
#pragma once

#include <cmath>

#include "tensor.h"

namespace pygen {

// An int64 per row, one for all rows, or a number.
struct PerRow {
  const int64_t* data = nullptr;
  int64_t stride = 0, number = 0;
  PYGEN_INLINE int64_t operator[](int64_t row) const { return data ? data[row * stride] : number; }
};

inline PerRow per_row(const char* name, const std::optional<Tensor>& values, int64_t number, const Tensor& logits) {
  if (!values) return {nullptr, 0, number};
  const int64_t rows = logits.size(0);
  check(values->scalar_type() == ScalarType::Long, name, " must be int64");
  check(values->dim() == 0 || (values->dim() == 1 && (values->size(0) == rows || values->size(0) == 1)), name,
        " has shape ", shape_of(*values), ", but expected () or (", rows, ",)");
  check(same_device(*values, logits), name, " is on another device than logits");
  const bool single = values->dim() == 0 || values->size(0) == 1;
  return {static_cast<const int64_t*>(values->data_ptr()), single ? 0 : values->stride(0), number};
}

inline void check_sample_logits(const Tensor& logits, const Tensor& sample_ids, double temperature, int64_t top_k,
                                double top_p) {
  check(logits.dim() == 2 && logits.size(1) > 0, "logits has shape ", shape_of(logits),
        ", but expected (rows, vocabulary) with a vocabulary of at least 1");
  check(logits.size(1) < (int64_t{1} << 31), "logits has a vocabulary of ", logits.size(1),
        ", but expected below 2^31");
  check(is_floating(logits.scalar_type()), "logits has a dtype that is not supported: expected a floating dtype");
  check(sample_ids.dim() == 1 && sample_ids.size(0) == logits.size(0), "sample_ids has shape ", shape_of(sample_ids),
        ", but expected (", logits.size(0), ",)");
  check(sample_ids.scalar_type() == ScalarType::Long, "sample_ids must be int64");
  check(same_device(sample_ids, logits), "sample_ids is on another device than logits");
  check(temperature >= 0 && std::isfinite(temperature), "temperature is ", temperature,
        ", but expected a finite number of at least 0");
  check(top_k >= 1, "top_k is ", top_k, ", but expected at least 1");
  check(top_p > 0 && top_p <= 1, "top_p is ", top_p, ", but expected in (0, 1]");
}

}  // namespace pygen
