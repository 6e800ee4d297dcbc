// What every device checks for the logistic mixture, before a loop or a launch.
#pragma once

#include "mixture.h"
#include "tensor.h"

namespace pygen {

// Logits, means and log scales: one packed tensor, or three. Returns the number of components.
inline int64_t check_mixture(const Tensor& x, const std::vector<Tensor>& parameters, int64_t event_dims) {
  check(is_floating(x.scalar_type()), "x has a dtype that is not supported: expected a floating dtype");
  check(event_dims >= 0 && event_dims <= x.dim(), "event_dims is ", event_dims, ", but x has ", x.dim(), " dimensions");
  check(parameters.size() == 1 || parameters.size() == 3, "parameters has ", parameters.size(),
        " tensors, but expected one or three");
  int64_t count = 0;
  for (const Tensor& part : parameters) {
    check(is_floating(part.scalar_type()), "parameters has a dtype that is not supported: expected a floating dtype");
    check(same_device(part, x), "parameters is on another device than x");
    const auto sizes = part.sizes();
    check(part.dim() == x.dim() + 1 && std::equal(x.sizes().begin(), x.sizes().end(), sizes.begin()),
          "parameters has shape ", shape_of(part), ", but expected x's ", shape_of(x), " and the components");
    check(part.size(x.dim()) == parameters[0].size(x.dim()), "parameters has ", part.size(x.dim()), " and ",
          parameters[0].size(x.dim()), " values for an element, but expected as many of each");
    count += part.size(x.dim());
  }
  check(count % 3 == 0 && count > 0 && count <= 3 * kMaxComponents, "parameters has ", count,
        " values for an element, but expected three for each of 1 to ", kMaxComponents, " components");
  return count / 3;
}

}  // namespace pygen
