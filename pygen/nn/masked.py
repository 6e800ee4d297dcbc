"""Convolutions that look only at what comes before in raster order: above, and to the left.

The masks are those of van den Oord et al. 2016 (PixelRNN, arXiv:1601.06759, section 3.4), in the two stacks without a
blind spot of van den Oord et al. 2016 (Gated PixelCNN, arXiv:1606.05328, section 2.2). Taps that a mask would zero
wholesale are not stored: the kernels are cropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def shift_down(x: Tensor) -> Tensor:
    """(n, c, height, width) one row lower: row r of the result is row r - 1 of x, and row 0 is zero."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def colour_mask(out_channels: int, in_channels: int, colours: int, *, strict: bool) -> Tensor:
    """Bool (out_channels, in_channels): which inputs at the same pixel an output may read.

    Both sides are cut into `colours` groups in order. An output of group g reads the groups up to g, or with `strict`
    only those before g (masks B and A of PixelRNN).
    """
    out_group = torch.arange(out_channels) * colours // out_channels
    in_group = torch.arange(in_channels) * colours // in_channels
    return in_group < out_group[:, None] if strict else in_group <= out_group[:, None]


def shift_right(x: Tensor) -> Tensor:
    """(n, c, height, width) one column further: column j of the result is column j - 1 of x, and column 0 is zero."""
    return F.pad(x, (1, 0))[..., :-1]


class MaskedConv2d(nn.Conv2d):
    """Reads a square of kernel_size around the pixel, as far as it comes before the pixel in raster order, and the
    pixel itself colour by colour.

    Shapes are kept: (n, in_channels, height, width) -> (n, out_channels, height, width).

    strict, colours: as in `HorizontalConv2d`.
    """

    mask: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, strict: bool = False, colours: int = 1
    ) -> None:
        _check_kernel_size(kernel_size)
        _check_colours(in_channels, out_channels, colours)
        reach = kernel_size // 2
        super().__init__(in_channels, out_channels, (reach + 1, kernel_size))
        mask = torch.ones_like(self.weight, dtype=torch.bool)
        mask[:, :, -1, reach + 1 :] = False
        mask[:, :, -1, reach] = colour_mask(out_channels, in_channels, colours, strict=strict)
        # Fixed by the arguments, so not part of a checkpoint.
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        reach = self.kernel_size[1] // 2
        return F.conv2d(F.pad(x, (reach, reach, reach, 0)), self.weight * self.mask, self.bias)


class CausalConv2d(nn.Conv2d):
    """Reads the kernel's rows above the pixel and the pixel's own, and of them the columns to the left and the pixel's
    own, or if `centred` as many to each side (van den Oord et al.'s two stacks as Salimans et al. 2017 shape them,
    arXiv:1701.05517, section 2.3).

    (n, in_channels, height, width) -> (n, out_channels, height, width); with a stride s the result is that at every
    s-th row and column, from the first.

    kernel_size: (rows, columns); the columns are odd if centred.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], *, centred: bool, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.reach = _reach(kernel_size, centred)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (*self.reach, self.kernel_size[0] - 1, 0)))


class CausalConvTranspose2d(nn.ConvTranspose2d):
    """The way back from a `CausalConv2d` of the same stride: a pixel of the result reads the pixel of x that its square
    of stride x stride pixels came from, and what that one may read.

    (n, in_channels, height, width) -> (n, out_channels, stride height, stride width).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], *, centred: bool, stride: int
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.reach = _reach(kernel_size, centred)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        height, width = (size * self.stride[0] for size in x.shape[2:])
        right = self.reach[1]
        return super().forward(x)[:, :, :height, right : right + width]


class VerticalConv2d(nn.Conv2d):
    """Reads the kernel_size // 2 rows above and the pixel's own row, kernel_size // 2 columns to each side.

    Shapes are kept: (n, in_channels, height, width) -> (n, out_channels, height, width). Put `shift_down` before
    the first of a stack, and the stack sees only rows above.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        _check_kernel_size(kernel_size)
        super().__init__(in_channels, out_channels, (kernel_size // 2 + 1, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        reach = self.kernel_size[1] // 2
        return super().forward(F.pad(x, (reach, reach, reach, 0)))


class HorizontalConv2d(nn.Conv2d):
    """Reads the kernel_size // 2 pixels to the left and the pixel itself, colour by colour.

    Shapes are kept: (n, in_channels, height, width) -> (n, out_channels, height, width). No row reads another.

    strict: a colour at a pixel does not read itself there (mask A, for the first layer); otherwise it does (mask B).
    colours: both sides' channels are cut into that many groups, and group g reads the groups up to g (see
        `colour_mask`).
    """

    mask: Tensor | None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, strict: bool = False, colours: int = 1
    ) -> None:
        _check_kernel_size(kernel_size)
        _check_colours(in_channels, out_channels, colours)
        super().__init__(in_channels, out_channels, (1, kernel_size // 2 + 1))
        mask = torch.ones_like(self.weight, dtype=torch.bool)
        mask[:, :, 0, -1] = colour_mask(out_channels, in_channels, colours, strict=strict)
        # Fixed by the arguments, so not part of a checkpoint.
        self.register_buffer("mask", None if mask.all() else mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.mask is None else self.weight * self.mask
        return F.conv2d(F.pad(x, (self.kernel_size[1] - 1, 0, 0, 0)), weight, self.bias)


def _check_colours(in_channels: int, out_channels: int, colours: int) -> None:
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % colours:
            raise ValueError(f"{name} is {channels}, but expected a multiple of the {colours} colours")


def _reach(kernel_size: tuple[int, int], centred: bool) -> tuple[int, int]:
    """How many columns a kernel reads to the left and to the right."""
    columns = kernel_size[1]
    if centred and columns % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}, but expected an odd number of columns for a centred kernel")
    return (columns // 2, columns // 2) if centred else (columns - 1, 0)


def _check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}, but expected an odd positive number")
