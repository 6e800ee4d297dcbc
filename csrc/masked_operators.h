// The operators of the masked family, up to the sweep itself, which is the backend's: checks, outputs, the type of the
// arithmetic, and the elementwise map.
#pragma once

#include <tuple>
#include <vector>

#include "masked_checks.h"
#include "masked_maps.h"
#include "spline_checks.h"
#include "tensor.h"

namespace pygen {

template <class T>
SplineMap<T> spline_map(const SplineSettings& settings, int64_t features) {
  SplineMap<T> map{settings.options<T>(), settings.parametrization, {}, nullptr, features};
  for (size_t i = 0; i < 4; ++i) map.shared[i] = static_cast<T>(settings.bounds[i]);
  map.shared[4] = static_cast<T>(settings.tails);
  if (settings.dimensions) map.table = static_cast<const T*>(settings.dimensions->data_ptr());
  return map;
}

// Backend::sweep<T>(program, inputs, map, out, ladj) runs a checked program; ladj is nullptr where it has none.
template <class Backend>
struct MaskedOperators {
  static std::tuple<Tensor, Tensor> affine_inverse(const Tensor& samples, const Tensor& weights,
                                                   const Tensor& constants, const Tensor& program,
                                                   const Tensor& device_program, int64_t features, int64_t activation,
                                                   double limit, double offset, double epsilon) {
    const SweepInputs inputs{samples, weights, &constants, program, device_program};
    check(activation >= 0 && activation < kActivations, "activation is ", activation, ", but expected 0 to ",
          kActivations - 1);
    return inverse(inputs, features, 2, [&](auto type) {
      using T = decltype(type);
      return AffineMap<T>{activation, static_cast<T>(limit), static_cast<T>(offset), static_cast<T>(epsilon)};
    });
  }

  static std::tuple<Tensor, Tensor> spline_inverse(const Tensor& samples, const Tensor& weights,
                                                   const Tensor& constants, const Tensor& program,
                                                   const Tensor& device_program, int64_t features,
                                                   const std::optional<Tensor>& dimensions, int64_t bins, int64_t tails,
                                                   const std::vector<double>& bounds,
                                                   const std::vector<double>& minimums, int64_t parametrization,
                                                   double sharpness, double boundary_slope, double scale) {
    const SweepInputs inputs{samples, weights, &constants, program, device_program};
    const SplineSettings settings{dimensions,      bins,      tails,          bounds, minimums,
                                  parametrization, sharpness, boundary_slope, scale,  1};
    check_spline_settings(settings, samples, features);
    return inverse(inputs, features, settings.options<float>().parameters(),
                   [&](auto type) { return spline_map<decltype(type)>(settings, features); });
  }

  static Tensor backward(const Tensor& samples, const Tensor& weights, const Tensor& program,
                         const Tensor& device_program, int64_t outputs) {
    const SweepInputs inputs{samples, weights, nullptr, program, device_program};
    const masked::Program checked = checked_program(inputs, outputs, 0);
    Tensor out = torch::stable::new_empty(samples, {samples.size(0), outputs});
    auto run = [&](auto type) {
      Backend::template sweep<decltype(type)>(checked, inputs, NoMap{}, out, static_cast<Tensor*>(nullptr));
    };
    samples.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
    return out;
  }

 private:
  template <class MakeMap>
  static std::tuple<Tensor, Tensor> inverse(const SweepInputs& inputs, int64_t features, int64_t per_input,
                                            const MakeMap& make_map) {
    const masked::Program checked = checked_program(inputs, features, per_input);
    Tensor x = torch::stable::new_empty(inputs.samples, {inputs.samples.size(0), features});
    Tensor ladj = torch::stable::new_empty(inputs.samples, {inputs.samples.size(0)});
    auto run = [&](auto type) { Backend::template sweep<decltype(type)>(checked, inputs, make_map(type), x, &ladj); };
    inputs.samples.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
    return {x, ladj};
  }
};

}  // namespace pygen
