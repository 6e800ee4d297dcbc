"""Pictures with a quarter of the positions and four times the channels: squeezing, and the Haar transform.

Of each block (a b; c d) of 2 x 2, squeezing makes the channels a, d, b, c (Dinh et al. 2017, arXiv:1605.08803, section
3.6), and the Haar transform (a+b+c+d, a-b+c-d, a+b-c-d, a-b-c+d) / 2 (Ardizzone et al. 2019, arXiv:1907.02392, section
3.2). Both are orthonormal: log-determinant 0, and the gradient goes the other way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pygen import _native


def _haar(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    top, bottom, across_top, across_bottom = a + b, c + d, a - b, c - d
    return (
        0.5 * (top + bottom),
        0.5 * (across_top + across_bottom),
        0.5 * (top - bottom),
        0.5 * (across_top - across_bottom),
    )


def _to_channels(x: Tensor, haar: bool) -> Tensor:
    n, c, height, width = x.shape
    blocks = x.reshape(n, c, height // 2, 2, width // 2, 2)
    a, b, c_, d = (blocks[:, :, :, i, :, j] for i in (0, 1) for j in (0, 1))
    return torch.cat(_haar(a, b, c_, d) if haar else (a, d, b, c_), dim=1)


def _to_picture(y: Tensor, haar: bool) -> Tensor:
    first, second, third, fourth = y.chunk(4, dim=1)
    # The matrix of the Haar transform is symmetric, and its own inverse.
    a, b, c, d = _haar(first, second, third, fourth) if haar else (first, third, fourth, second)
    rows = torch.stack((torch.stack((a, b), dim=-1), torch.stack((c, d), dim=-1)), dim=3)
    return rows.flatten(4).flatten(2, 3)


def _reference(x: Tensor, haar: bool, inverse: bool) -> Tensor:
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (_to_picture if inverse else _to_channels)(wide, haar).to(x.dtype)


def squeeze_reference(x: Tensor, *, inverse: bool = False) -> Tensor:
    """`squeeze` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    _check(x, inverse)
    return _reference(x, False, inverse)


def haar_reference(x: Tensor, *, inverse: bool = False) -> Tensor:
    """`haar` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    _check(x, inverse)
    return _reference(x, True, inverse)


@_native.register_fake("wavelet_forward")
def _wavelet_forward_fake(x: Tensor, haar: bool) -> Tensor:
    n, c, height, width = x.shape
    return x.new_empty(n, 4 * c, height // 2, width // 2)


@_native.register_fake("wavelet_inverse")
def _wavelet_inverse_fake(y: Tensor, haar: bool) -> Tensor:
    n, c, height, width = y.shape
    return y.new_empty(n, c // 4, 2 * height, 2 * width)


class _Wavelet(torch.autograd.Function):
    """Saves nothing: the transpose is the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, haar: bool, inverse: bool) -> Tensor:
        ctx.haar, ctx.inverse = haar, inverse
        return _run(x, haar, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _transform(grad, ctx.haar, not ctx.inverse), None, None


def _run(x: Tensor, haar: bool, inverse: bool) -> Tensor:
    kernels = _native.kernels_for(x)
    assert kernels is not None
    result: Tensor = (kernels.wavelet_inverse if inverse else kernels.wavelet_forward)(x, haar)
    return result


def _transform(x: Tensor, haar: bool, inverse: bool) -> Tensor:
    if _native.kernels_for(x) is None:
        return _reference(x, haar, inverse)
    if _native.wants_gradient(x):
        result: Tensor = _Wavelet.apply(x, haar, inverse)  # type: ignore[no-untyped-call]
        return result
    return _run(x, haar, inverse)


def squeeze(x: Tensor, *, inverse: bool = False) -> Tensor:
    """Make channels of the corners of each block of 2 x 2: (n, c, 2 h, 2 w) -> (n, 4 c, h, w), in one pass.

    c channels of each corner: top left, bottom right, top right, bottom left. A diagonal comes first, so that a split
    of the channels into halves is the checkerboard of the picture. (Dinh et al. 2017, arXiv:1605.08803, section 3.6)

    Args:
        x: (n, c, 2 h, 2 w), or with `inverse` (n, 4 c, h, w); float32, float64, bfloat16 or float16, any strides.
        inverse: the way back.

    Returns:
        The same numbers, contiguous, in x's dtype. The log-determinant is 0.

    Raises:
        ValueError: height or width is odd, or on the way back the channels are not four times a number.
        TypeError: for a dtype that is not floating.
    """
    _check(x, inverse)
    return _transform(x, False, inverse)


def haar(x: Tensor, *, inverse: bool = False) -> Tensor:
    """The Haar transform of each block of 2 x 2: (n, c, 2 h, 2 w) -> (n, 4 c, h, w), in one pass.

    c channels of each coefficient: twice the mean, then the differences across, down and along the diagonal. (Ardizzone
    et al. 2019, arXiv:1907.02392, section 3.2)

    Args:
        x: (n, c, 2 h, 2 w), or with `inverse` (n, 4 c, h, w); float32, float64, bfloat16 or float16, any strides.
        inverse: the way back.

    Returns:
        The coefficients, contiguous, in x's dtype; arithmetic is in float32 (float64 for float64). The transform is
        orthonormal: the log-determinant is 0.

    Raises:
        ValueError: height or width is odd, or on the way back the channels are not four times a number.
        TypeError: for a dtype that is not floating.
    """
    _check(x, inverse)
    return _transform(x, True, inverse)


def _check(x: Tensor, inverse: bool) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, but expected float32, float64, bfloat16 or float16")
    if inverse and (x.dim() != 4 or x.shape[1] % 4):
        raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, 4 c, height, width)")
    if not inverse and (x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, c, height, width) of even height and width")
