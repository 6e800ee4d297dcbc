"""Multiscale RealNVP: affine couplings between the halves of checkerboards, rows, columns and channels.

(Dinh et al. 2017, arXiv:1605.08803; couplings in section 3.4, multiscale in 3.6)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pygen.flows.base import StandardNormal
from pygen.flows.coupling import AffineCoupling
from pygen.flows.flow import Flow
from pygen.flows.multiscale import MultiscaleConfig, multiscale
from pygen.flows.permutation import Permutation
from pygen.flows.pictures import Logit, PictureFlow
from pygen.flows.transform import Inverse, Step, Transform
from pygen.nn.conditioner import ConvConditioner


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealNVPConfig(MultiscaleConfig):
    """What a RealNVP is made of.

    couplings: affine couplings per scale.
    width, blocks, dropout: of each coupling's conditioner, a residual conv net.
    limit: the bound of the log-scale of one coupling, in nats.
    """

    couplings: int = 8
    width: int = 32
    blocks: int = 1
    dropout: float = 0.3
    limit: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("couplings", "width", "blocks")
        self.require_probability("dropout")
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit is {self.limit}, but expected a positive number")


class RealNVP(PictureFlow):
    """An exact density by affine couplings, and samples in one pass of their inverses."""

    config: RealNVPConfig

    def __init__(self, config: RealNVPConfig | None = None) -> None:
        config = config or RealNVPConfig()
        transforms = multiscale(config.shape[0], config.scales, functools.partial(_couplings, config))
        flow = Flow([Logit(config.margin), *transforms], StandardNormal(config.shape), memory=config.memory)
        super().__init__(config, flow)


def _couplings(config: RealNVPConfig, channels: int, last: bool) -> Iterator[Transform]:
    orders = _partitions(channels)
    for k in range(config.couplings):
        order = Permutation(orders[k // 2 % len(orders)])
        conditioner = ConvConditioner(
            channels // 2,
            channels,
            width=config.width,
            blocks=config.blocks,
            classes=config.classes,
            dropout=config.dropout,
        )
        coupling = AffineCoupling(conditioner, flip=k % 2 == 1, activation="tanh", limit=config.limit)
        yield Step([order, coupling, Inverse(order)], "coupling")


def _partitions(channels: int) -> list[Tensor]:
    """Orders of squeezed channels whose halves are the checkerboard, rows, columns, and alternating channels."""
    corners = torch.arange(channels).reshape(4, -1)
    orders = [corners[list(order)].flatten() for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))]
    if channels > 4:  # with one value per corner, alternating channels are the rows again
        flat = corners.flatten()
        orders.append(torch.cat((flat[::2], flat[1::2])))
    return orders
