"""Space to channels and back: squeezing, Haar wavelets, flattening; all of log-determinant 0.

Squeezing is that of Dinh et al. 2017 (arXiv:1605.08803, section 3.6), the Haar transform that of Ardizzone et al. 2019
(arXiv:1907.02392, section 3.2); see `pygen.ops.squeeze` and `pygen.ops.haar`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pygen import ops
from pygen.flows.transform import Reshape


class Squeeze(Reshape):
    """(n, c, 2 h, 2 w) -> (n, 4 c, h, w): each 2x2 block becomes channels, a diagonal of it in the first half, so that
    a split of the channels into halves is the checkerboard of the picture.

    ValueError: height or width is odd, or on the way back the channels are not four times a number.
    """

    def arrange(self, x: Tensor) -> Tensor:
        return ops.squeeze(x)

    def lay_out(self, y: Tensor) -> Tensor:
        return ops.squeeze(y, inverse=True)


class Haar(Reshape):
    """(n, c, 2 h, 2 w) -> (n, 4 c, h, w): twice the means of the 2x2 blocks first, then the differences across, down
    and along the diagonal, c channels of each.

    ValueError: as for `Squeeze`.
    """

    def arrange(self, x: Tensor) -> Tensor:
        return ops.haar(x)

    def lay_out(self, y: Tensor) -> Tensor:
        return ops.haar(y, inverse=True)


class Flatten(Reshape):
    """(n, *shape) -> (n, d), a view."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def arrange(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, {', '.join(map(str, self.shape))})")
        return x.flatten(1)

    def lay_out(self, y: Tensor) -> Tensor:
        return y.reshape(len(y), *self.shape)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"
