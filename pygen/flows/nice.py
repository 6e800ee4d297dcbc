"""NICE: additive couplings between the even and the odd values, one learned scale for each value, a logistic prior.

(Dinh et al. 2015, arXiv:1410.8516; couplings in section 3.2, the scaling in 3.3, the prior in 3.4)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.flows.base import StandardLogistic
from pygen.flows.coupling import AdditiveCoupling
from pygen.flows.permutation import Permutation
from pygen.flows.pictures import PictureFlow, PictureFlowConfig, flat_flow
from pygen.flows.transform import Inverse, Stack, Transform
from pygen.nn.dense import MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class NICEConfig(PictureFlowConfig):
    """What a NICE is made of; the defaults are the paper's for MNIST.

    couplings: additive couplings, the even and the odd values taking turns.
    width, layers: hidden units and hidden layers of each coupling's network.
    """

    couplings: int = 4
    width: int = 1000
    layers: int = 5
    margin: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("couplings", "width", "layers")
        if self.dimensions < 2:
            raise ValueError(f"shape is {self.shape}, but expected at least two values")


class NICE(PictureFlow):
    """An exact density by shifts and one scaling, and samples in one pass back."""

    config: NICEConfig

    def __init__(self, config: NICEConfig | None = None) -> None:
        config = config or NICEConfig()
        super().__init__(config, flat_flow(config, Stack(_layers(config)), StandardLogistic(config.shape)))


def _layers(config: NICEConfig) -> Iterator[Transform]:
    order = torch.arange(config.dimensions)
    split = Permutation(torch.cat((order[::2], order[1::2])))
    even, odd = (config.dimensions + 1) // 2, config.dimensions // 2
    yield split
    for k in range(config.couplings):
        kept, moved = (odd, even) if k % 2 else (even, odd)
        network = MLP(kept, moved, [config.width] * config.layers, classes=config.classes)
        yield AdditiveCoupling(network, flip=k % 2 == 1)
    yield Inverse(split)
    yield Scaling(config.dimensions)


class Scaling(Transform):
    """y = x e^{log_scale}, learned for each value."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.affine(x, self.log_scale.expand_as(x), None)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.affine(y, self.log_scale.expand_as(y), None, inverse=True)
