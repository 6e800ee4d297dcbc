// What the host checks and allocates for the affine coupling, before a loop or a launch.
#pragma once

#include "coupling.h"
#include "ladj.h"
#include "tensor.h"

namespace pygen {

using OptionalTensor = std::optional<Tensor>;

inline void check_affine(const Tensor& x, const OptionalTensor& raw_scale, const OptionalTensor& shift,
                         int64_t activation, int64_t event_dims) {
  check(is_floating(x.scalar_type()), "x has a dtype that is not supported: expected a floating dtype");
  check(activation >= 0 && activation < kActivations, "activation is ", activation, ", but expected 0 to ",
        kActivations - 1);
  check(event_dims >= 0 && event_dims <= x.dim(), "event_dims is ", event_dims, ", but x has ", x.dim(), " dimensions");
  if (raw_scale) {
    check(same_shape(*raw_scale, x), "raw_scale has shape ", shape_of(*raw_scale), ", but expected ", shape_of(x));
    check(is_floating(raw_scale->scalar_type()), "raw_scale has a dtype that is not supported");
    check(same_device(*raw_scale, x), "raw_scale is on another device than x");
  }
  if (shift) {
    check(same_shape(*shift, x), "shift has shape ", shape_of(*shift), ", but expected ", shape_of(x));
    check(is_floating(shift->scalar_type()), "shift has a dtype that is not supported");
    check(same_device(*shift, x), "shift is on another device than x");
  }
}

}  // namespace pygen
