// What the host checks for the piecewise polynomial splines, before a loop or a launch.
#pragma once

#include <vector>

#include "ladj.h"
#include "piecewise.h"
#include "tensor.h"

namespace pygen {

// The operators' arguments beside the tensors.
struct PiecewiseSettings {
  int64_t degree, bins;
  bool tails;
  std::vector<double> bounds, minimums;
  double end_weight, scale;
  int64_t event_dims;

  template <class T>
  PiecewiseOptions<T> options() const {
    const auto shares = [&](double least, bool each) {
      return Shares<T>{static_cast<T>(least), static_cast<T>(1 - (each ? static_cast<double>(bins) * least : least))};
    };
    const bool quadratic = static_cast<Degree>(degree) == Degree::kQuadratic;
    return {static_cast<Degree>(degree), static_cast<int>(bins),    tails,
            static_cast<T>(bounds[0]),   static_cast<T>(bounds[1]), static_cast<T>(bounds[2]),
            static_cast<T>(bounds[3]),   shares(minimums[0], true), shares(minimums[1], !quadratic),
            static_cast<T>(end_weight),  static_cast<T>(scale)};
  }

  // How many parameters of each kind an element has.
  std::vector<int64_t> counts() const {
    switch (static_cast<Degree>(degree)) {
      case Degree::kLinear:
        return {bins};
      case Degree::kQuadratic:
        return {bins, tails ? bins - 1 : bins + 1};
      default:
        return {bins, bins, 1, 1};
    }
  }
};

inline void check_piecewise(const Tensor& x, const std::vector<Tensor>& parameters, const PiecewiseSettings& settings) {
  check(is_floating(x.scalar_type()), "x has a dtype that is not supported: expected a floating dtype");
  check(settings.event_dims >= 0 && settings.event_dims <= x.dim(), "event_dims is ", settings.event_dims,
        ", but x has ", x.dim(), " dimensions");
  check(settings.degree >= 1 && settings.degree <= 3, "degree is ", settings.degree, ", but expected 1 to 3");
  check(settings.bins >= kMinPieces && settings.bins <= kMaxPieces, "bins is ", settings.bins, ", but expected ",
        kMinPieces, " to ", kMaxPieces);
  check(settings.bounds.size() == 4 && settings.minimums.size() == 2,
        "bounds and minimums have other than 4 and 2 numbers");
  std::vector<int64_t> counts = settings.counts();
  if (parameters.size() == 1) counts = {settings.options<float>().parameters()};
  check(parameters.size() == counts.size(), "parameters has ", parameters.size(), " tensors, but expected 1 or ",
        counts.size());
  for (size_t i = 0; i < counts.size(); ++i) {
    const Tensor& part = parameters[i];
    check(is_floating(part.scalar_type()), "parameters has a dtype that is not supported: expected a floating dtype");
    check(same_device(part, x), "parameters is on another device than x");
    check(part.dim() == x.dim() + 1 && std::equal(x.sizes().begin(), x.sizes().end(), part.sizes().begin()) &&
              part.size(x.dim()) == counts[i],
          "parameters has shape ", shape_of(part), ", but expected that of x, ", shape_of(x), ", and ", counts[i]);
  }
}

}  // namespace pygen
