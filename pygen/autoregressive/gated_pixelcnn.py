"""Gated PixelCNN: p(x) = prod_i p(x_i | x_1 .. x_{i-1}), in raster order, the colours of a pixel in turn.

The vertical stack reads the rows above, the horizontal stack the pixels to the left and the vertical stack; each layer
is tanh(W_f * x + V_f y) sigmoid(W_g * x + V_g y), y the class (van den Oord et al. 2016, arXiv:1606.05328, eq. 2-4 and
figure 2).
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.autoregressive.config import AutoregressiveConfig
from pygen.autoregressive.model import AutoregressiveModel
from pygen.nn.masked import HorizontalConv2d, VerticalConv2d, shift_down


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedPixelCNNConfig(AutoregressiveConfig):
    """What a Gated PixelCNN is made of.

    layers: gated layers. Each reaches kernel_size // 2 further, and together they should reach across the picture.
    width: channels of each stack, a multiple of the picture's channels.
    head: channels between the stacks and the logits, a multiple of the picture's channels.
    first_kernel_size, kernel_size: odd; of the first layer and of the others.
    dropout: of whole channels, after each gated activation and in the head.
    """

    layers: int = 6
    width: int = 30
    head: int = 60
    first_kernel_size: int = 5
    kernel_size: int = 3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("layers")
        self.require_colours("width", "head")
        self.require_odd("first_kernel_size", "kernel_size")
        self.require_probability("dropout")


class GatedLayer(nn.Module):
    """One layer of both stacks; the first reads the picture, the others add to what they read."""

    def __init__(self, config: GatedPixelCNNConfig, *, first: bool) -> None:
        super().__init__()
        colours, _, _ = config.shape
        width = config.width
        incoming = colours if first else width
        kernel_size = config.first_kernel_size if first else config.kernel_size
        self.residual = not first
        self.dropout = config.dropout
        self.above = VerticalConv2d(incoming, 2 * width, kernel_size)
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.left = HorizontalConv2d(incoming, 2 * width, kernel_size, strict=first, colours=colours)
        self.merge = HorizontalConv2d(width, width, 1, colours=colours)
        self.label = None if config.classes is None else nn.Embedding(config.classes, 4 * width)
        if self.label is not None:
            nn.init.zeros_(self.label.weight)

    def vertical(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next state of the vertical stack (n, width, rows, columns), and what the horizontal stack is fed."""
        above = self.above(x)
        feed = self.link(above)
        if self.label is not None:
            to_above, to_left = self.label(condition)[:, :, None, None].chunk(2, dim=1)
            above, feed = above + to_above, feed + to_left
        out = self._gate(above)
        return (x + out if self.residual else out), feed

    def horizontal(self, x: Tensor, feed: Tensor) -> Tensor:
        """The next state of the horizontal stack (n, width, rows, columns)."""
        out = self.merge(self._gate(self.left(x) + feed))
        return x + out if self.residual else out  # type: ignore[no-any-return]

    def _gate(self, x: Tensor) -> Tensor:
        # Value and gate alternate, so that both are of the same colour group.
        value, gate = torch.unflatten(x, 1, (-1, 2)).unbind(2)
        return F.dropout2d(value.tanh() * gate.sigmoid(), self.dropout, self.training)


class GatedPixelCNN(AutoregressiveModel):
    """An exact probability of discrete pictures, and samples element by element; see `AutoregressiveModel`."""

    convolutional = True
    config: GatedPixelCNNConfig

    def __init__(self, config: GatedPixelCNNConfig | None = None) -> None:
        config = config or GatedPixelCNNConfig()
        super().__init__(config)
        colours, height, width = config.shape
        self.layers = nn.ModuleList(GatedLayer(config, first=k == 0) for k in range(config.layers))
        # Convolutions cannot tell a border from a grey pixel, and pictures of one size have places.
        self.place = nn.Parameter(torch.zeros(2 * config.width, height, width))
        self.hidden = HorizontalConv2d(config.width, config.head, 1, colours=colours)
        self.head = HorizontalConv2d(config.head, colours * config.levels, 1, colours=colours)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        state, vertical = x, shift_down(x)
        for number, layer in enumerate(self.layers):
            vertical, feed = cast(GatedLayer, layer).vertical(vertical, condition)
            state = cast(GatedLayer, layer).horizontal(state, feed + self.place if number == 0 else feed)
        hidden = F.dropout2d(F.relu(self.hidden(F.relu(state))), self.config.dropout, self.training)
        return cast(Tensor, self.head(hidden))
