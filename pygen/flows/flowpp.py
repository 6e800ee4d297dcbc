"""Flow++: couplings by the distribution function of a mixture of logistics, proposed by gated convolutions and
attention, and dequantization by a second flow that is trained with the first.

(Ho et al. 2019, arXiv:1902.00275; dequantization in section 3.1, couplings in 3.2, networks in 3.3, the order of the
layers in appendix B). The checkerboards are the halves of a squeezed picture's channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from pygen.flows.base import StandardNormal
from pygen.flows.coupling import MixtureCoupling
from pygen.flows.flow import Flow
from pygen.flows.linear import InvertibleLinear
from pygen.flows.normalization import ActNorm
from pygen.flows.permutation import Permutation
from pygen.flows.pictures import Logit, PictureFlow, PictureFlowConfig
from pygen.flows.reshape import Squeeze
from pygen.flows.transform import FirstHalf, Inverse, Stack, Step, Transform
from pygen.nn.gated import GatedBlock, GatedConditioner


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowPPConfig(PictureFlowConfig):
    """What a Flow++ is made of; the defaults are the paper's for CIFAR-10.

    checkerboards, channels, coarse: couplings between the halves of checkerboards, then between halves of the channels
        after squeezing, then between the halves of the coarser checkerboards.
    width, blocks, heads, dropout: of each coupling's network.
    components: logistics in each mixture.
    dequantizer_couplings, dequantizer_blocks: couplings of the flow of the dequantization noise, and blocks of each of
        their networks and of the network that reads the picture for them.
    """

    checkerboards: int = 4
    channels: int = 2
    coarse: int = 3
    width: int = 96
    blocks: int = 10
    heads: int = 4
    dropout: float = 0.2
    components: int = 32
    dequantizer_couplings: int = 4
    dequantizer_blocks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive(
            "checkerboards", "channels", "coarse", "width", "blocks", "heads", "components", "dequantizer_couplings",
            "dequantizer_blocks",
        )  # fmt: skip
        self.require_probability("dropout")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, but expected a multiple of the {self.heads} heads")
        if self.shape[1] % 4 or self.shape[2] % 4:
            raise ValueError(f"shape is {self.shape}, but expected a height and width divisible by 4")


class FlowPP(PictureFlow):
    """A density of dequantized pictures whose dequantization noise is a flow of its own."""

    config: FlowPPConfig

    def __init__(self, config: FlowPPConfig | None = None) -> None:
        config = config or FlowPPConfig()
        flow = Flow([Logit(config.margin), *_layers(config)], StandardNormal(config.shape), memory=config.memory)
        super().__init__(config, flow, _dequantizer(config))


def _layers(config: FlowPPConfig) -> Iterator[Transform]:
    colours, height, width = config.shape
    fine, coarse = Squeeze(), Squeeze()
    # Rows of the 2x2 blocks, where the halves of the squeezed channels are their diagonals.
    rows = Permutation(torch.arange(4 * colours).view(4, -1)[[0, 2, 1, 3]].flatten())
    yield fine
    yield from _couplings(config, config.checkerboards, 4 * colours, (height // 2, width // 2))
    yield rows
    yield from _couplings(config, config.channels, 4 * colours, (height // 2, width // 2))
    yield Inverse(rows)
    yield coarse
    yield from _couplings(config, config.coarse, 16 * colours, (height // 4, width // 4))
    yield Inverse(coarse)
    yield Inverse(fine)


def _couplings(config: FlowPPConfig, count: int, channels: int, size: tuple[int, int]) -> Iterator[Transform]:
    for _ in range(count):
        yield _step(config, channels, size, blocks=config.blocks, classes=config.classes)


def _step(
    config: FlowPPConfig,
    channels: int,
    size: tuple[int, int],
    *,
    blocks: int,
    classes: int | None = None,
    context_channels: int = 0,
) -> Transform:
    """A normalization, a mixing of the channels that are kept, a coupling, and the halves exchanged."""
    half = channels // 2
    network = GatedConditioner(
        half,
        half * (2 + 3 * config.components),
        size,
        width=config.width,
        blocks=blocks,
        heads=config.heads,
        dropout=config.dropout,
        classes=classes,
        context_channels=context_channels,
    )
    coupling = MixtureCoupling(network, components=config.components)
    exchange = Permutation(torch.arange(channels).roll(half))
    return Step([ActNorm(channels), FirstHalf(InvertibleLinear(half)), coupling, exchange], "coupling")


def _dequantizer(config: FlowPPConfig) -> Flow:
    """A flow of u in (0, 1), given the picture. Only its samples are needed, so that the quick direction of its layers
    is the one from the prior."""
    colours, height, width = config.shape
    size = (height // 2, width // 2)
    squeeze = Squeeze()
    steps = [
        Inverse(_step(config, 4 * colours, size, blocks=config.dequantizer_blocks, context_channels=config.width))
        for _ in range(config.dequantizer_couplings)
    ]
    stack = Stack([squeeze, *steps, Inverse(squeeze)], memory=config.memory)
    return Flow([Logit(0.0), Reading(PictureReader(config, size), stack)], StandardNormal(config.shape))


class Reading(Transform):
    """A transform whose context a network makes of the context that is given, once for all its layers."""

    def __init__(self, network: nn.Module, transform: Transform) -> None:
        super().__init__()
        self.network = network
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(x, self.network(context))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(y, self.network(context))


class PictureReader(nn.Module):
    """From a picture (n, channels, height, width) in [-1, 1] to features (n, width, height / 2, width / 2)."""

    def __init__(self, config: FlowPPConfig, size: tuple[int, int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(config.shape[0], config.width, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(
            *(
                GatedBlock(config.width, size, config.heads, None, config.dropout)
                for _ in range(config.dequantizer_blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.blocks(self.stem(x)))
