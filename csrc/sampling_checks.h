// What the host checks of the sampler, and how its arguments become plain numbers and pointers.
#pragma once

#include <cmath>

#include "sampling.h"
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

// A matrix of any strides, where there is one; one row may serve all.
template <class Element>
struct Grid {
  const Element* data = nullptr;
  int64_t row_stride = 0, stride = 0, columns = 0;
  PYGEN_INLINE const Element* row(int64_t number) const { return data + number * row_stride; }
};

template <class Element>
inline Grid<Element> grid_of(const std::optional<Tensor>& values) {
  if (!values) return {};
  return {static_cast<const Element*>(values->data_ptr()), values->size(0) == 1 ? 0 : values->stride(0),
          values->stride(1), values->size(1)};
}

// What a row's scores are made from.
template <class Stored>
struct Sources {
  Grid<Stored> logits, unconditional;
  Grid<int64_t> history;
  Grid<bool> allowed;
  bool guided = false, penalized = false, masked = false;

  Sources(const Tensor& all, const std::optional<Tensor>& without, const std::optional<Tensor>& ids,
          const std::optional<Tensor>& mask, const sampling::Filters& filters)
      : logits(grid_of<Stored>(all)),
        unconditional(grid_of<Stored>(without)),
        history(grid_of<int64_t>(ids)),
        allowed(grid_of<bool>(mask)),
        guided(filters.guidance_scale != 1),
        penalized(filters.repetition_penalty != 1 && history.columns > 0),
        masked(mask.has_value()) {}

  PYGEN_INLINE bool plain() const { return !guided && !penalized && !masked; }
  // The normalization cancels in a distribution, but not where the sign of a score counts.
  PYGEN_INLINE bool normalized() const { return guided && penalized; }
};

inline void check_logits(const Tensor& logits) {
  check(logits.dim() == 2 && logits.size(1) > 0, "logits has shape ", shape_of(logits),
        ", but expected (rows, vocabulary) with a vocabulary of at least 1");
  check(logits.size(1) < (int64_t{1} << 31), "logits has a vocabulary of ", logits.size(1),
        ", but expected below 2^31");
  check(is_floating(logits.scalar_type()), "logits has a dtype that is not supported: expected a floating dtype");
}

inline void check_sample_ids(const Tensor& sample_ids, const Tensor& logits) {
  check(sample_ids.dim() == 1 && sample_ids.size(0) == logits.size(0), "sample_ids has shape ", shape_of(sample_ids),
        ", but expected (", logits.size(0), ",)");
  check(sample_ids.scalar_type() == ScalarType::Long, "sample_ids must be int64");
  check(same_device(sample_ids, logits), "sample_ids is on another device than logits");
}

inline void check_filters(const Tensor& logits, const std::optional<Tensor>& unconditional,
                          const std::optional<Tensor>& history, const std::optional<Tensor>& allowed,
                          const sampling::Filters& filters) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  check(filters.temperature >= 0 && std::isfinite(filters.temperature), "temperature is ", filters.temperature,
        ", but expected a finite number of at least 0");
  check(filters.top_k >= 1, "top_k is ", filters.top_k, ", but expected at least 1");
  check(filters.top_p > 0 && filters.top_p <= 1, "top_p is ", filters.top_p, ", but expected in (0, 1]");
  check(filters.min_p >= 0 && filters.min_p <= 1, "min_p is ", filters.min_p, ", but expected in [0, 1]");
  check(filters.typical_p > 0 && filters.typical_p <= 1, "typical_p is ", filters.typical_p,
        ", but expected in (0, 1]");
  check(filters.repetition_penalty > 0 && std::isfinite(filters.repetition_penalty), "repetition_penalty is ",
        filters.repetition_penalty, ", but expected a finite number above 0");
  check(std::isfinite(filters.guidance_scale), "guidance_scale is ", filters.guidance_scale,
        ", but expected a finite number");
  check(filters.guidance_scale == 1 || unconditional.has_value(), "guidance_scale is ", filters.guidance_scale,
        ", but there are no unconditional logits");
  if (unconditional) {
    check(same_shape(*unconditional, logits), "unconditional has shape ", shape_of(*unconditional),
          ", but expected the shape of logits, ", shape_of(logits));
    check(unconditional->scalar_type() == logits.scalar_type(), "unconditional has another dtype than logits");
    check(same_device(*unconditional, logits), "unconditional is on another device than logits");
  }
  if (history) {
    check(history->dim() == 2 && history->size(0) == rows, "history has shape ", shape_of(*history), ", but expected (",
          rows, ", length)");
    check(history->scalar_type() == ScalarType::Long, "history must be int64");
    check(same_device(*history, logits), "history is on another device than logits");
  }
  if (allowed) {
    check(allowed->dim() == 2 && (allowed->size(0) == rows || allowed->size(0) == 1) && allowed->size(1) == vocabulary,
          "allowed has shape ", shape_of(*allowed), ", but expected (", rows, ", ", vocabulary, ") or (1, ", vocabulary,
          ")");
    check(allowed->scalar_type() == ScalarType::Bool, "allowed must be bool");
    check(same_device(*allowed, logits), "allowed is on another device than logits");
  }
}

}  // namespace pygen
