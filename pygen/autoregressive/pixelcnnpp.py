"""PixelCNN++: a mixture of logistics for each pixel, from two streams of gated residual blocks at three resolutions.

One stream reads the rows above, the other also the pixels to the left and the first stream; both go down to a quarter
of the height and width and up again, with a skip from each block on the way down to one on the way up
(Salimans et al. 2017, arXiv:1701.05517, section 2 and figure 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pygen.autoregressive.mixture import MixtureConfig, MixtureModel
from pygen.nn.gated_residual import GatedResidual, pointwise
from pygen.nn.masked import CausalConv2d, CausalConvTranspose2d, shift_down, shift_right


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelCNNPPConfig(MixtureConfig):
    """What a PixelCNN++ is made of; the defaults are those of the paper's model of CIFAR-10.

    resolutions: how many heights and widths, each half of the one before.
    blocks: gated residual blocks of each stream at each resolution, on the way down; on the way up as many at the
        lowest, and one more at each other.
    width: channels of a stream. dropout: inside each block.
    """

    resolutions: int = 3
    blocks: int = 5
    width: int = 160
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("resolutions", "blocks", "width")
        self.require_probability("dropout")
        multiple = 2 ** (self.resolutions - 1)
        if self.shape[1] % multiple or self.shape[2] % multiple:
            raise ValueError(
                f"shape is {self.shape} with {self.resolutions} resolutions, but expected a height and width divisible "
                f"by {multiple}"
            )


class Streams(nn.Module):
    """One block of both streams.

    skips: how many times `width` channels each of the two blocks reads beside its own stream.
    """

    def __init__(self, config: PixelCNNPPConfig, skips: tuple[int, int]) -> None:
        super().__init__()
        width = config.width
        self.above = GatedResidual(
            width, above(), skip=skips[0] * width, classes=config.classes, dropout=config.dropout
        )
        self.left = GatedResidual(width, left(), skip=skips[1] * width, classes=config.classes, dropout=config.dropout)


class Rescale(nn.Module):
    """Both streams at half their height and width, or at twice."""

    def __init__(self, width: int, layer: type[CausalConv2d | CausalConvTranspose2d]) -> None:
        super().__init__()
        self.above = weight_norm(layer(width, width, (2, 3), centred=True, stride=2))
        self.left = weight_norm(layer(width, width, (2, 2), centred=False, stride=2))

    def forward(self, rows: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.above(rows), self.left(pixels)


class PixelCNNPP(MixtureModel):
    """An exact probability of discrete pictures, and samples element by element; see `AutoregressiveModel`."""

    convolutional = True
    config: PixelCNNPPConfig

    def __init__(self, config: PixelCNNPPConfig | None = None) -> None:
        config = config or PixelCNNPPConfig()
        super().__init__(config)
        width, lower = config.width, config.resolutions - 1
        inputs = config.shape[0] + 1
        self.rows_above = above()(inputs, width)
        self.row_above = weight_norm(CausalConv2d(inputs, width, (1, 3), centred=True))
        self.to_the_left = weight_norm(CausalConv2d(inputs, width, (2, 1), centred=False))
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level in range(config.resolutions):
            self.down.append(nn.ModuleList(Streams(config, (0, 1)) for _ in range(config.blocks)))
            self.up.append(nn.ModuleList(Streams(config, (1, 2)) for _ in range(config.blocks + (level > 0))))
        self.shrink = nn.ModuleList(Rescale(width, CausalConv2d) for _ in range(lower))
        self.grow = nn.ModuleList(Rescale(width, CausalConvTranspose2d) for _ in range(lower))
        self.head = pointwise(width, config.parameters)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The parameters of the mixture at each pixel; see `MixtureModel`."""
        # The ones tell the pixels from the zeros around the picture.
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
        rows = shift_down(self.rows_above(x))
        pixels = shift_down(self.row_above(x)) + shift_right(self.to_the_left(x))
        kept = [(rows, pixels)]
        for level, blocks in enumerate(self.down):
            if level:
                rows, pixels = self.shrink[level - 1](rows, pixels)
                kept.append((rows, pixels))
            for block in cast("nn.ModuleList", blocks):
                rows = cast("Streams", block).above(rows, None, condition)
                pixels = cast("Streams", block).left(pixels, rows, condition)
                kept.append((rows, pixels))
        rows, pixels = kept.pop()
        for level, blocks in enumerate(self.up):
            if level:
                rows, pixels = self.grow[level - 1](rows, pixels)
            for block in cast("nn.ModuleList", blocks):
                skip_rows, skip_pixels = kept.pop()
                rows = cast("Streams", block).above(rows, skip_rows, condition)
                pixels = cast("Streams", block).left(pixels, torch.cat((rows, skip_pixels), dim=1), condition)
        return cast("Tensor", self.head(F.elu(pixels)))


def above() -> Callable[[int, int], nn.Module]:
    """Convolutions that read the pixel's row and the one above, one column to each side."""
    return lambda incoming, outgoing: weight_norm(CausalConv2d(incoming, outgoing, (2, 3), centred=True))


def left() -> Callable[[int, int], nn.Module]:
    """Convolutions that read the pixel, the one to its left, and the two above these."""
    return lambda incoming, outgoing: weight_norm(CausalConv2d(incoming, outgoing, (2, 2), centred=False))
