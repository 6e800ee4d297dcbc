"""A convolutional network with gated residuals and self-attention: the conditioner of Flow++.

Gated residual: x + a sigmoid(b) with (a, b) = conv(dropout(act(conv(act(x))))) and act(x) = elu([x, -x]); the same
gate closes each attention layer, and a layer norm over the channels follows both
(Ho et al. 2019, arXiv:1902.00275, section 3.3 and appendix B).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def concat_elu(x: Tensor) -> Tensor:
    """elu of x and of -x side by side, (n, c, ...) -> (n, 2 c, ...)."""
    return F.elu(torch.cat((x, -x), dim=1))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over dimension 1, at each position of (n, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class GatedConvolution(nn.Module):
    """What a gated residual block of convolutions adds to x, (n, width, height, width'), and to the class."""

    def __init__(self, width: int, classes: int | None, dropout: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(2 * width, width, 3, padding=1)
        self.label = None if classes is None else nn.Embedding(classes, width)
        self.second = nn.Conv2d(2 * width, 2 * width, 1)
        self.dropout = dropout

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.first(concat_elu(x))
        if self.label is not None:
            hidden = hidden + self.label(condition)[:, :, None, None]
        hidden = F.dropout(concat_elu(hidden), self.dropout, self.training)
        return F.glu(self.second(hidden), dim=1)


class GatedAttention(nn.Module):
    """What gated self-attention between all positions adds to x, (n, width, *size)."""

    def __init__(self, width: int, size: tuple[int, int], heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(0.01 * torch.randn(width, *size))
        self.project = nn.Conv2d(width, 3 * width, 1)
        self.combine = nn.Conv2d(width, 2 * width, 1)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        n, width, *size = x.shape
        projected = self.project(x + self.position).view(n, 3, self.heads, width // self.heads, -1)
        query, key, value = projected.transpose(3, 4).unbind(1)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(2, 3).reshape(n, width, *size)
        return F.glu(self.combine(F.dropout(attended, self.dropout, self.training)), dim=1)


class GatedBlock(nn.Module):
    """x -> norm(x + convolution(x)) -> norm(x + attention(x))."""

    def __init__(self, width: int, size: tuple[int, int], heads: int, classes: int | None, dropout: float) -> None:
        super().__init__()
        self.convolution = GatedConvolution(width, classes, dropout)
        self.convolution_norm = ChannelNorm(width)
        self.attention = GatedAttention(width, size, heads, dropout)
        self.attention_norm = ChannelNorm(width)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.convolution_norm(x + self.convolution(x, condition))
        return cast(Tensor, self.attention_norm(x + self.attention(x)))


class GatedConditioner(nn.Module):
    """(n, in_channels, *size) -> (n, out_channels, *size), small at the start of training.

    The parameters of a mixture must not start all the same: equal components have equal gradients, and stay equal.

    size: height and width. width: channels inside, a multiple of `heads`. blocks: gated blocks. dropout: in each block.
    classes: number of labels, or None. context_channels: of a context (n, context_channels, *size) that is read beside
        x; the context is then that, and not labels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int],
        *,
        width: int = 96,
        blocks: int = 10,
        heads: int = 4,
        dropout: float = 0.2,
        classes: int | None = None,
        context_channels: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, but expected a multiple of the {heads} heads")
        self.reads_context = context_channels > 0
        self.stem = nn.Conv2d(in_channels + context_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(GatedBlock(width, size, heads, classes, dropout) for _ in range(blocks))
        self.head = nn.Conv2d(width, out_channels, 3, padding=1)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (n, in_channels, *size); context int64 (n,) labels, features (n, context_channels, *size), or None."""
        if self.reads_context:
            hidden, condition = self.stem(torch.cat((x, cast(Tensor, context)), dim=1)), None
        else:
            hidden, condition = self.stem(x), context
        for block in self.blocks:
            hidden = block(hidden, condition)
        return cast(Tensor, self.head(hidden))
