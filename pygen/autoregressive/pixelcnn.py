"""PixelCNN: p(x) = prod_i p(x_i | x_1 .. x_{i-1}), in raster order, the colours of a pixel in turn, by one stack of
masked convolutions (van den Oord et al. 2016, Pixel Recurrent Neural Networks, arXiv:1601.06759, sections 3.4-3.5).

A block adds conv_1x1(relu(conv_3x3(relu(conv_1x1(relu(h)))))) to h, 2 width channels, of which it narrows to width in
between (figure 5). Square kernels that are masked have a blind spot: see `GatedPixelCNN`, which has none.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from pygen.autoregressive.config import AutoregressiveConfig
from pygen.autoregressive.model import AutoregressiveModel
from pygen.nn.masked import HorizontalConv2d, MaskedConv2d


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelCNNConfig(AutoregressiveConfig):
    """What a PixelCNN is made of.

    The defaults are of the size of the paper's model of CIFAR-10, in multiples of three colours.

    layers: residual blocks. Each reaches kernel_size // 2 further, and together they should reach across the picture.
    width: channels inside a block, a multiple of the picture's channels; there are twice as many between the blocks.
    head: channels between the blocks and the logits, a multiple of the picture's channels.
    first_kernel_size, kernel_size: odd; of the first layer and of the blocks.
    dropout: of whole channels, inside each block and in the head.
    """

    layers: int = 15
    width: int = 126
    head: int = 1023
    first_kernel_size: int = 7
    kernel_size: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("layers")
        self.require_colours("width", "head")
        self.require_odd("first_kernel_size", "kernel_size")
        self.require_probability("dropout")


class MaskedBlock(nn.Module):
    """A residual block of masked convolutions, (n, 2 width, height, width') to the same shape."""

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        width, colours = config.width, config.shape[0]
        self.narrow = HorizontalConv2d(2 * width, width, 1, colours=colours)
        self.spread = MaskedConv2d(width, width, config.kernel_size, colours=colours)
        self.widen = HorizontalConv2d(width, 2 * width, 1, colours=colours)
        self.label = None if config.classes is None else nn.Embedding(config.classes, width)
        self.dropout = config.dropout

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.spread(F.relu(self.narrow(F.relu(x))))
        if self.label is not None:
            hidden = hidden + self.label(condition)[:, :, None, None]
        hidden = F.dropout2d(F.relu(hidden), self.dropout, self.training)
        return x + self.widen(hidden)  # type: ignore[no-any-return]


class PixelCNN(AutoregressiveModel):
    """An exact probability of discrete pictures, and samples element by element; see `AutoregressiveModel`."""

    convolutional = True
    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig | None = None) -> None:
        config = config or PixelCNNConfig()
        super().__init__(config)
        colours = config.shape[0]
        self.first = MaskedConv2d(colours, 2 * config.width, config.first_kernel_size, strict=True, colours=colours)
        self.blocks = nn.ModuleList(MaskedBlock(config) for _ in range(config.layers))
        self.hidden = HorizontalConv2d(2 * config.width, config.head, 1, colours=colours)
        self.head = HorizontalConv2d(config.head, colours * config.levels, 1, colours=colours)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        state = self.first(x)
        for block in self.blocks:
            state = block(state, condition)
        hidden = F.dropout2d(F.relu(self.hidden(F.relu(state))), self.config.dropout, self.training)
        return cast(Tensor, self.head(hidden))
