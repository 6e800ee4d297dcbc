"""The network that reads one part of a picture and proposes how to transform the other: a residual conv net.

Pre-activation residual blocks (He et al. 2016, arXiv:1603.05027, figure 4e), with the class added between the two
convolutions of a block. The last convolution starts at zero, so that a coupling starts as the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConditionerBlock(nn.Module):
    """x + conv(dropout2d(silu(conv(silu(x)) + class bias))), shape (n, width, height, width')."""

    def __init__(self, width: int, classes: int | None, dropout: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.label = None if classes is None else nn.Embedding(classes, width)
        self.dropout = dropout
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.first(F.silu(x))
        if self.label is not None:
            hidden = hidden + self.label(condition)[:, :, None, None]
        hidden = F.dropout2d(F.silu(hidden), self.dropout, self.training)
        return x + self.second(hidden)  # type: ignore[no-any-return]


class ConvConditioner(nn.Module):
    """(n, in_channels, height, width) -> (n, out_channels, height, width), zero at the start of training.

    in_channels, out_channels: of the part that is read, and of the parameters that are proposed.
    width: channels inside. blocks: residual blocks. classes: number of labels, or None.
    dropout: of whole channels, in each block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 64,
        blocks: int = 2,
        classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ConditionerBlock(width, classes, dropout) for _ in range(blocks))
        self.head = nn.Conv2d(width, out_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x (n, in_channels, height, width); condition int64 (n,) labels, or None without classes."""
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.head(F.silu(hidden))  # type: ignore[no-any-return]


class PictureConditioner(nn.Module):
    """A `ConvConditioner` that also reads a context picture, scaled to the size of what it stands beside.

    in_channels, context_channels, out_channels: of the part that is read, of the context picture, and of the parameters
    that are proposed. width, blocks, dropout: see `ConvConditioner`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        context_channels: int,
        width: int = 64,
        blocks: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = ConvConditioner(
            in_channels + context_channels, out_channels, width=width, blocks=blocks, dropout=dropout
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (n, in_channels, height, width), context (n, context_channels, any height, any width)."""
        beside = F.interpolate(context, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.net(torch.cat((x, beside), dim=1))  # type: ignore[no-any-return]
