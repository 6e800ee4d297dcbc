// What every elementwise transform with a log-determinant checks and allocates. ladj has the batch dimensions of x.
#pragma once

#include <vector>

#include "tensor.h"

namespace pygen {

inline void check_grad_ladj(const Tensor& x, const Tensor& grad_ladj, int64_t event_dims) {
  check(same_device(grad_ladj, x), "grad_ladj is on another device than x");
  check(grad_ladj.dim() == x.dim() - event_dims &&
            std::equal(grad_ladj.sizes().begin(), grad_ladj.sizes().end(), x.sizes().begin()),
        "grad_ladj has shape ", shape_of(grad_ladj), ", but expected the batch dimensions of x, ", shape_of(x));
}

inline void check_gradients(const Tensor& x, const Tensor& grad_output, const Tensor& grad_ladj, int64_t event_dims) {
  check(same_shape(grad_output, x), "grad_output has shape ", shape_of(grad_output), ", but expected ", shape_of(x));
  check(is_floating(grad_output.scalar_type()), "grad_output has a dtype that is not supported");
  check(same_device(grad_output, x), "grad_output is on another device than x");
  check(is_floating(grad_ladj.scalar_type()), "grad_ladj has a dtype that is not supported");
  check_grad_ladj(x, grad_ladj, event_dims);
}

inline Tensor empty_ladj(const Tensor& x, int64_t event_dims) {
  const auto sizes = x.sizes();
  return torch::stable::new_empty(x, {sizes.data(), sizes.size() - static_cast<size_t>(event_dims)}, sum_dtype(x));
}

// One buffer (*x.shape, count) for the gradients of all parameters: in their dtype, or ladj's where theirs differ.
inline Tensor empty_parameter_gradient(const Tensor& x, const std::vector<Tensor>& parameters, int64_t count) {
  ScalarType dtype = parameters[0].scalar_type();
  for (const Tensor& part : parameters) dtype = part.scalar_type() == dtype ? dtype : sum_dtype(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.push_back(count);
  return torch::stable::new_empty(x, {sizes.data(), sizes.size()}, dtype);
}

}  // namespace pygen
