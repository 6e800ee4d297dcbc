// What the host checks and allocates for a solver step, before a loop or a launch.
#pragma once

#include "noise_checks.h"
#include "schedule.h"
#include "tensor.h"

namespace pygen {

inline void check_like_sample(const char* name, const Tensor& value, const Tensor& sample) {
  check(is_floating(value.scalar_type()), name, " has a dtype that is not supported");
  check(same_shape(value, sample), name, " has shape ", shape_of(value), ", but expected ", shape_of(sample),
        ", as sample");
  check(same_device(value, sample), name, " is on another device than sample");
}

// `table` is coefficients, or a contiguous copy that the caller keeps alive.
inline StepRows step_rows_of(const Tensor& sample, const Tensor& coefficients, const Tensor& table, int64_t history,
                             int64_t step, const std::optional<Tensor>& steps) {
  check(sample.dim() > 0, "sample has shape (), but expected (n, ...)");
  check(is_floating(sample.scalar_type()), "sample has a dtype that is not supported");
  check(coefficients.scalar_type() == ScalarType::Float, "coefficients has another dtype than float32");
  check(coefficients.dim() == 2 && coefficients.size(0) > 0 && coefficients.size(1) == kSolverCoefficients + history,
        "coefficients has shape ", shape_of(coefficients), ", but expected (steps, ", kSolverCoefficients + history,
        "), for ", history, " tensors of history");
  check(same_device(coefficients, sample), "coefficients is on another device than sample");
  StepRows rows{
      static_cast<const float*>(table.data_ptr()), coefficients.size(0), coefficients.size(1), nullptr, 0, step};
  if (steps) {
    check_per_row("step", *steps, sample, sample.size(0));
    rows.indices = static_cast<const int64_t*>(steps->data_ptr());
    rows.index_stride = row_stride(*steps);
  } else {
    check(step >= 0 && step < rows.steps, "step is ", step, ", but expected a row of the table, 0 .. ", rows.steps - 1);
  }
  return rows;
}

inline Tensor contiguous_table(const Tensor& coefficients) {
  return coefficients.is_contiguous() ? coefficients : torch::stable::contiguous(coefficients);
}

// Columns of the table beyond the six.
inline int64_t history_of(const Tensor& coefficients) {
  check(coefficients.dim() == 2 && coefficients.size(1) >= kSolverCoefficients, "coefficients has shape ",
        shape_of(coefficients), ", but expected (steps, ", kSolverCoefficients, " + history)");
  return coefficients.size(1) - kSolverCoefficients;
}

// Samples differ in their coefficients or their noise; otherwise the whole tensor is one long row.
inline bool per_sample(const std::optional<Tensor>& steps, const std::optional<Tensor>& sample_ids) {
  return sample_ids || (steps && steps->dim() == 1);
}

}  // namespace pygen
