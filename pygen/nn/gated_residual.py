"""Residual blocks with a gate, of whatever convolution keeps a picture's order: x + a s(b), s the logistic function,
(a, b) = conv(dropout(act(conv(act(x)) + W act(skip)))) + V label, and act(x) = elu([x, -x])
(Salimans et al. 2017, PixelCNN++, arXiv:1701.05517, section 2.4-2.6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pygen.nn.gated import concat_elu

Convolution = Callable[[int, int], nn.Module]


def pointwise(in_channels: int, out_channels: int) -> nn.Module:
    """A 1 x 1 convolution under weight normalization."""
    return cast("nn.Module", weight_norm(nn.Conv2d(in_channels, out_channels, 1)))


class GatedResidual(nn.Module):
    """(n, width, height, width') to the same shape.

    convolution: makes a layer of so many channels to so many, which keeps height and width.
    skip: channels of a second input of the same height and width, or 0. classes: number of labels, or None.
    dropout: of single values, between the two convolutions.
    """

    def __init__(
        self, width: int, convolution: Convolution, *, skip: int = 0, classes: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.first = convolution(2 * width, width)
        self.skip = pointwise(2 * skip, width) if skip else None
        self.second = convolution(2 * width, 2 * width)
        self.label = None if classes is None else nn.Embedding(classes, 2 * width)
        if self.label is not None:
            nn.init.zeros_(self.label.weight)
        self.dropout = dropout

    def forward(self, x: Tensor, skip: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """skip: (n, skip, height, width'). condition: int64 (n,) labels."""
        hidden = self.first(concat_elu(x))
        if self.skip is not None and skip is not None:
            hidden = hidden + self.skip(concat_elu(skip))
        hidden = self.second(F.dropout(concat_elu(hidden), self.dropout, self.training))
        if self.label is not None:
            hidden = hidden + self.label(condition)[:, :, None, None]
        return x + F.glu(hidden, dim=1)
