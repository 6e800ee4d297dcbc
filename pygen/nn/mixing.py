"""One matrix over the channels at each position: the 1 x 1 convolution of flows.

y = W x + b at each position (Kingma & Dhariwal 2018, Glow, arXiv:1807.03039, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to here a product of matrices for each sample beats a convolution, which packs its weights at each call.
_FEW_CHANNELS = 32


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, channels, ...), weight (channels, channels), bias (channels,), of one dtype -> weight x + bias, like x."""
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    positions = x.flatten(2)
    if len(weight) > _FEW_CHANNELS:
        return F.conv1d(positions, weight.unsqueeze(-1), bias).view(x.shape)
    weights = weight.expand(len(x), *weight.shape)
    mixed = torch.bmm(weights, positions) if bias is None else torch.baddbmm(bias.view(-1, 1), weights, positions)
    return mixed.view(x.shape)
