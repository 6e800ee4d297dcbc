"""Space to channels and back: squeezing, Haar wavelets, flattening; all of log-determinant 0.

The Haar transform of a 2x2 block (a b; c d) is orthonormal: (a+b+c+d, a-b+c-d, a+b-c-d, a-b-c+d) / 2, the mean and the
differences across, down and along the diagonal (Ardizzone et al. 2019, arXiv:1907.02392, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pygen.flows.transform import Reshape

# The corners of a block in the order in which they become channels: a diagonal first, so that a split of the channels
# into halves is the checkerboard of the picture.
_CORNERS = ((0, 0), (1, 1), (0, 1), (1, 0))


class Squeeze(Reshape):
    """(n, c, 2 h, 2 w) -> (n, 4 c, h, w): each 2x2 block becomes channels, its diagonal in the first half.

    ValueError: height or width is odd, or on the way back the channels are not four times a number.
    """

    def arrange(self, x: Tensor) -> Tensor:
        blocks = _blocks(x)
        return torch.cat([blocks[:, :, :, i, :, j] for i, j in _CORNERS], dim=1)

    def lay_out(self, y: Tensor) -> Tensor:
        a, d, b, c = _quarters(y)
        return _from_corners(a, b, c, d)


class Haar(Reshape):
    """(n, c, 2 h, 2 w) -> (n, 4 c, h, w): means of the 2x2 blocks first, then differences across, down and along the
    diagonal, c channels of each.

    ValueError: as for `Squeeze`.
    """

    def arrange(self, x: Tensor) -> Tensor:
        blocks = _blocks(x)
        return torch.cat(_haar(*(blocks[:, :, :, i, :, j] for i in (0, 1) for j in (0, 1))), dim=1)

    def lay_out(self, y: Tensor) -> Tensor:
        # The matrix is symmetric, and its own inverse.
        return _from_corners(*_haar(*_quarters(y)))


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


def _haar(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    top, bottom, across_top, across_bottom = a + b, c + d, a - b, c - d
    return (
        0.5 * (top + bottom),
        0.5 * (across_top + across_bottom),
        0.5 * (top - bottom),
        0.5 * (across_top - across_bottom),
    )


def _blocks(x: Tensor) -> Tensor:
    """(n, c, h, 2, w, 2), a view."""
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, c, height, width) of even height and width")
    n, c, height, width = x.shape
    return x.reshape(n, c, height // 2, 2, width // 2, 2)


def _quarters(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if y.dim() != 4 or y.shape[1] % 4:
        raise ValueError(f"y has shape {tuple(y.shape)}, but expected (n, 4 c, height, width)")
    a, b, c, d = y.chunk(4, dim=1)
    return a, b, c, d


def _from_corners(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Blocks (a b; c d), each (n, channels, h, w), as a picture (n, channels, 2 h, 2 w)."""
    rows = torch.stack((torch.stack((a, b), dim=-1), torch.stack((c, d), dim=-1)), dim=3)
    return rows.flatten(4).flatten(2, 3)
