// What the host checks and allocates for the rational-quadratic splines, before a loop or a launch.
#pragma once

#include <vector>

#include "ladj.h"
#include "spline.h"
#include "tensor.h"

namespace pygen {

// The operators' arguments beside the tensors x and parameters.
struct SplineSettings {
  std::optional<Tensor> dimensions;  // (5, C): left, right, bottom, top and tails along x's last dimension
  int64_t bins, tails;
  std::vector<double> bounds, minimums;
  int64_t parametrization;
  double sharpness, boundary_slope, scale;
  int64_t event_dims;

  template <class T>
  SplineOptions<T> options() const {
    return {static_cast<int>(bins),         static_cast<Tails>(tails),   static_cast<T>(minimums[0]),
            static_cast<T>(minimums[1]),    static_cast<T>(minimums[2]), static_cast<T>(sharpness),
            static_cast<T>(boundary_slope), static_cast<T>(scale)};
  }
};

// x: the tensor that the splines are of, or one with its dtype and device; last: the size of its last dimension.
inline void check_spline_settings(const SplineSettings& settings, const Tensor& x, int64_t last) {
  check(settings.bins >= kMinBins && settings.bins <= kMaxBins, "bins is ", settings.bins, ", but expected ", kMinBins,
        " to ", kMaxBins);
  check(settings.tails >= 0 && settings.tails <= static_cast<int64_t>(Tails::kPerDimension), "tails is ",
        settings.tails, ", but expected 0 to 3");
  check(settings.tails < static_cast<int64_t>(Tails::kPerDimension) || settings.dimensions,
        "tails is 3, one for each dimension, but dimensions is absent");
  check(settings.parametrization == 0 || settings.parametrization == 1, "parametrization is ", settings.parametrization,
        ", but expected 0 or 1");
  check(settings.bounds.size() == 4 && settings.minimums.size() == 3,
        "bounds and minimums have other than 4 and 3 numbers");
  if (settings.dimensions) {
    const Tensor& table = *settings.dimensions;
    check(table.scalar_type() == sum_dtype(x), "dimensions has another dtype than the log-determinant");
    check(table.dim() == 2 && table.size(0) == 5 && table.size(1) == last && table.is_contiguous(),
          "dimensions has shape ", shape_of(table), ", but expected (5, ", last, "), contiguous");
    check(same_device(table, x), "dimensions is on another device than x");
  }
}

inline void check_spline(const Tensor& x, const std::vector<Tensor>& parameters, const SplineSettings& settings) {
  check(is_floating(x.scalar_type()), "x has a dtype that is not supported: expected a floating dtype");
  check(settings.event_dims >= 0 && settings.event_dims <= x.dim(), "event_dims is ", settings.event_dims,
        ", but x has ", x.dim(), " dimensions");
  check_spline_settings(settings, x, x.dim() > 0 ? x.size(x.dim() - 1) : 1);
  check(parameters.size() == 1 || parameters.size() == 3, "parameters has ", parameters.size(),
        " tensors, but expected 1 or 3");
  const SplineOptions<float> options = settings.options<float>();
  const int64_t packed[1] = {options.parameters()}, apart[3] = {settings.bins, settings.bins, options.derivatives()};
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& part = parameters[i];
    const int64_t wanted = parameters.size() == 1 ? packed[0] : apart[i];
    check(is_floating(part.scalar_type()), "parameters has a dtype that is not supported");
    check(same_device(part, x), "parameters is on another device than x");
    check(part.dim() == x.dim() + 1 && std::equal(x.sizes().begin(), x.sizes().end(), part.sizes().begin()) &&
              part.size(x.dim()) == wanted,
          "parameters has shape ", shape_of(part), ", but expected that of x, ", shape_of(x), ", and ", wanted);
  }
}

}  // namespace pygen
