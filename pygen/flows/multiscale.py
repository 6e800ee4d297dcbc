"""Flows of pictures at several scales: squeeze, transform, let half of the values go, and so on with the other half.

(Dinh et al. 2017, RealNVP, arXiv:1605.08803, section 3.6 and eq. 13-16)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from pygen.flows.pictures import PictureFlowConfig
from pygen.flows.reshape import Squeeze
from pygen.flows.transform import FirstHalf, Inverse, Stack, Transform


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiscaleConfig(PictureFlowConfig):
    """What a flow at several scales needs to know.

    scales: how often the picture is squeezed, halving height and width; between scales half of the values leave.
    """

    scales: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("scales")
        step = 2**self.scales
        if self.shape[1] % step or self.shape[2] % step:
            raise ValueError(
                f"shape is {self.shape} with scales {self.scales}, but expected a height and width divisible by {step}"
            )

    @property
    def coarsest(self) -> tuple[int, int]:
        """Height and width at the last scale."""
        return self.shape[1] >> self.scales, self.shape[2] >> self.scales


def multiscale(channels: int, scales: int, scale: Callable[[int, bool], Iterable[Transform]]) -> list[Transform]:
    """The transforms of a flow of pictures (n, channels, height, width) at several scales; the result has x's shape.

    scale: called for each scale as `scale(channels, last)` with the number of channels after squeezing, for the
        transforms of that scale. Where it is not the last, the second half of the channels goes to the prior after it.
    """
    squeeze = Squeeze()
    steps = [squeeze, *scale(4 * channels, scales == 1)]
    if scales > 1:
        steps.append(FirstHalf(Stack(multiscale(2 * channels, scales - 1, scale))))
    return [*steps, Inverse(squeeze)]
