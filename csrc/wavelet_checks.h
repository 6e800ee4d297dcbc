// What every device checks and allocates for squeezing and the Haar transform, before a loop or a launch.
#pragma once

#include "tensor.h"
#include "wavelet.h"

namespace pygen {

// (n, 4 c, h, w) for a picture (n, c, 2 h, 2 w).
inline Tensor empty_channels(const Tensor& x) {
  check(is_floating(x.scalar_type()), "x has a dtype that is not supported: expected a floating dtype");
  check(x.dim() == 4 && x.size(2) % 2 == 0 && x.size(3) % 2 == 0, "x has shape ", shape_of(x),
        ", but expected (n, c, height, width) of even height and width");
  return torch::stable::new_empty(x, {x.size(0), kCorners * x.size(1), x.size(2) / 2, x.size(3) / 2}, x.scalar_type());
}

// (n, c, 2 h, 2 w) for channels (n, 4 c, h, w).
inline Tensor empty_picture(const Tensor& y) {
  check(is_floating(y.scalar_type()), "y has a dtype that is not supported: expected a floating dtype");
  check(y.dim() == 4 && y.size(1) % kCorners == 0, "y has shape ", shape_of(y),
        ", but expected (n, 4 c, height, width)");
  return torch::stable::new_empty(y, {y.size(0), y.size(1) / kCorners, 2 * y.size(2), 2 * y.size(3)}, y.scalar_type());
}

}  // namespace pygen
