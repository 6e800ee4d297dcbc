"""Glow: steps of an activation normalization, an invertible 1x1 convolution and an affine coupling, at several scales.

(Kingma & Dhariwal 2018, arXiv:1807.03039; the step in table 1, the networks in appendix B). What leaves a scale is
normal given what stays: z = (x - mean) e^{-log_std}, both read off the half that stays, so that the prior of the whole
is N(0, I). The class, where there is one, moves the prior of the last scale in the same way (section 6.2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn

from pygen.flows.base import StandardNormal
from pygen.flows.coupling import AffineCoupling, AffineInjector
from pygen.flows.flow import Flow
from pygen.flows.linear import InvertibleLinear
from pygen.flows.multiscale import MultiscaleConfig, multiscale
from pygen.flows.normalization import ActNorm
from pygen.flows.pictures import Logit, PictureFlow
from pygen.flows.transform import Inverse, Step, Transform


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlowConfig(MultiscaleConfig):
    """What a Glow is made of; the paper's networks have 3 scales (CIFAR-10) of 32 steps, 512 channels wide.

    steps: steps of flow per scale.
    width: hidden channels of each coupling's network.
    labels: what the class acts on: "prior", that of the last scale, as in the paper; or "steps", each coupling's
        network, which is what it takes to tell sets apart that differ in more than that prior.
    """

    scales: int = 3
    steps: int = 32
    width: int = 512
    labels: Literal["prior", "steps"] = "prior"
    margin: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("steps", "width")
        if self.labels not in ("prior", "steps"):
            raise ValueError(f"labels is {self.labels!r}, but expected 'prior' or 'steps'")


class Glow(PictureFlow):
    """An exact density by couplings between channels that are mixed anew in each step."""

    config: GlowConfig

    def __init__(self, config: GlowConfig | None = None) -> None:
        config = config or GlowConfig()
        transforms = multiscale(config.shape[0], config.scales, functools.partial(_scale, config))
        flow = Flow([Logit(config.margin), *transforms], StandardNormal(config.shape), memory=config.memory)
        super().__init__(config, flow)


def _scale(config: GlowConfig, channels: int, last: bool) -> Iterator[Transform]:
    half = channels // 2
    classes = config.classes if config.labels == "steps" else None
    for _ in range(config.steps):
        # The scale sigmoid(raw + 2) is that of the authors' code, not in the paper.
        network = GlowConditioner(half, channels, config.width, classes=classes)
        coupling = AffineCoupling(network, activation="sigmoid", offset=2.0)
        yield Step([ActNorm(channels), InvertibleLinear(channels), coupling], "step")
    if not last:
        yield Inverse(AffineCoupling(ZeroConv2d(half, channels)))
    elif config.classes is not None and config.labels == "prior":
        yield Inverse(AffineInjector(ClassPrior(config.classes, channels, config.coarsest)))


class GlowConditioner(nn.Module):
    """Convolutions 3x3, 1x1 and 3x3 with rectifiers between them; the last starts at zero.

    classes: number of labels whose embedding is added before the first rectifier; None to read none.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, *, classes: int | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.label = None if classes is None else nn.Embedding(classes, width)
        self.second = nn.Conv2d(width, width, 1)
        self.last = ZeroConv2d(width, out_channels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        if self.label is not None:
            hidden = hidden + self.label(condition)[:, :, None, None]
        return cast(Tensor, self.last(self.second(hidden.relu()).relu()))


class ZeroConv2d(nn.Conv2d):
    """A 3x3 convolution times e^{3 gain}, gain learned for each channel, with all of it zero at the start."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.gain = nn.Parameter(torch.zeros(out_channels, 1, 1))
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(x) * (3 * self.gain).exp()


class ClassPrior(nn.Module):
    """For labels (n,), the log deviations and the means of every channel, (n, 2 channels, *size); zero at the start."""

    def __init__(self, classes: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Embedding(classes, 2 * channels)
        self.size = size
        nn.init.zeros_(self.table.weight)

    def forward(self, condition: Tensor) -> Tensor:
        return self.table(condition)[:, :, None, None].expand(-1, -1, *self.size)  # type: ignore[no-any-return]
