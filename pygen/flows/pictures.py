"""Flows of pictures: dequantization, the map to the real line, and the contract of the five families.

Pictures are made continuous by noise in the cell of their values, v = (k + u) / levels with u ~ q(u | k) on [0, 1), and
log P(k) >= E_q[log p(v) - log q(u | k)] - D log(levels) (Theis et al. 2016, arXiv:1511.01844, eq. 4-6, for uniform q;
Ho et al. 2019, arXiv:1902.00275, eq. 5, for one that is learned).
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen import ops
from pygen.flows.base import Base
from pygen.flows.flow import Flow
from pygen.flows.memory import MODES
from pygen.flows.reshape import Flatten
from pygen.flows.transform import Inverse, Transform
from pygen.model import Density, GenerativeModel, ModelConfig, Stage, refuse_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureFlowConfig(ModelConfig):
    """What every flow of pictures needs to know.

    margin: v in [0, 1) enters as logit(margin + (1 - 2 margin) v), so that the flow need not model its edges;
        None for an affine map to [-1, 1] instead.
    memory: what training keeps: "store", "recompute" or "checkpoint", see `pygen.flows.Stack`.
    """

    margin: float | None = 0.05
    memory: str = "store"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin is not None and not 0 < self.margin < 0.5:
            raise ValueError(f"margin is {self.margin}, but expected a number in (0, 0.5) or None")
        if self.memory not in MODES:
            raise ValueError(f"memory is {self.memory!r}, but expected one of {', '.join(map(repr, MODES))}")


class PictureFlow(GenerativeModel):
    """An exact density of dequantized pictures, and samples in one pass back. A recipe is a subclass that builds the
    `flow`.

    flow: of v in [0, 1), (n, channels, height, width), to a prior of the same shape; its context is the labels.
    dequantizer: a flow of u in (0, 1), of the picture's shape, whose context is the picture in [-1, 1]; uniform where
        there is none.

    A prior point is laid out as a picture: each value sits where the squeezing that led to it says.
    """

    density = Density.EXACT
    discrete = False
    config: PictureFlowConfig

    def __init__(self, config: PictureFlowConfig, flow: Flow, dequantizer: Flow | None = None) -> None:
        super().__init__(config)
        self.flow = flow
        self.dequantizer = dequantizer

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood in nats per dimension, dequantized by PyTorch's generator."""
        self.check_player(player)
        x = self.check_pictures(x)
        condition = self.check_condition(condition, len(x))
        v, volume = self._dequantize(x, None, 0)
        return -(self.flow.log_prob(v, condition) + volume).mean() / self.config.dimensions

    def log_prob(
        self, x: Tensor, *, condition: Tensor | None = None, ids: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        x = self.check_pictures(x)
        condition = self.check_condition(condition, len(x))
        v, volume = self._dequantize(x, self.resolve_ids(len(x), ids), seed)
        return self.flow.log_prob(v, condition) + volume

    def encode(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """The prior point of the centre of x's quantization cell; `decode` brings it back to x."""
        x = self.check_pictures(x)
        condition = self.check_condition(condition, len(x))
        return self.flow.encode((self.quantize(x).to(x.dtype) + 0.5) / self.config.levels, condition)

    def decode(self, z: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """The quantized picture of a prior point, (n, channels, height, width) in [-1, 1]."""
        z, condition = self._check_prior(z, condition)
        return self._picture(self.flow.decode(z, condition))

    @torch.inference_mode()
    def sample(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> Tensor:
        refuse_steps(self, steps)
        ids = self.resolve_ids(n, ids)
        condition = self.resolve_condition(ids, condition)
        return self._picture(self.flow.sample(n, context=condition, ids=ids, seed=seed))

    @torch.inference_mode()
    def trajectory(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> list[Stage]:
        """Z, the flow's state after each layer (in the coordinates in which the layers work), and X."""
        refuse_steps(self, steps)
        ids = self.resolve_ids(n, ids)
        condition = self.resolve_condition(ids, condition)
        z = self.flow.base.sample(n, context=condition, ids=ids, seed=seed)
        stages = [Stage("Z", z), *self.flow.transform.inverse_path(z, condition)]
        return [*stages[:-1], Stage("X", self._picture(stages[-1].values))]

    def network_passes(self, steps: int | None = None) -> int:
        return 1

    def _dequantize(self, x: Tensor, ids: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """A point v in the cells of the pictures x, and the log of the volume (n,) that it stands for.

        ids: the numbers of the samples under `seed`, or None for noise from PyTorch's generator.
        """
        volume = x.new_full((len(x),), -self.config.dimensions * math.log(self.config.levels))
        if self.dequantizer is not None:
            if ids is None:  # the dequantizer draws by number: new numbers for each call
                ids = torch.randint(2**62, (len(x),), device=x.device)
            u, log_q = self.dequantizer.sample_and_log_prob(len(x), context=x, ids=ids, seed=seed)
            volume = volume - log_q
        else:
            u = torch.rand_like(x) if ids is None else ops.uniform(ids, self.config.shape, seed=seed, dtype=x.dtype)
        return (self.quantize(x) + u) / self.config.levels, volume

    def _check_prior(self, z: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if z.ndim != 4 or tuple(z.shape[1:]) != self.config.shape:
            raise ValueError(f"z has shape {tuple(z.shape)}, but expected (n, {str(self.config.shape)[1:]}")
        return z.to(self.device), self.check_condition(condition, len(z))

    def _picture(self, v: Tensor) -> Tensor:
        top = self.config.levels - 1
        return self.dequantize((v * self.config.levels).floor().clamp(0, top))


def flat_flow(config: PictureFlowConfig, transform: Transform, base: Base) -> Flow:
    """A flow of pictures by a transform of vectors (n, values); base: of the picture's shape."""
    flatten = Flatten(config.shape)
    return Flow([Logit(config.margin), flatten, transform, Inverse(flatten)], base, memory=config.memory)


class Logit(Transform):
    """v in [0, 1) to logit(margin + (1 - 2 margin) v), or with margin None to 2 v - 1.

    (Dinh et al. 2017, arXiv:1605.08803, section 4.1, with alpha = margin)
    """

    def __init__(self, margin: float | None = 0.05) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.margin is None:
            return 2 * x - 1, x.new_full((len(x),), x.shape[1:].numel() * math.log(2))
        p = self.margin + (1 - 2 * self.margin) * x
        log_p, log_rest = p.log(), (-p).log1p()
        ladj = (math.log(1 - 2 * self.margin) - log_p - log_rest).flatten(1).sum(1)
        return log_p - log_rest, ladj

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.margin is None:
            return (y + 1) / 2, y.new_full((len(y),), -y.shape[1:].numel() * math.log(2))
        ladj = (F.logsigmoid(y) + F.logsigmoid(-y) - math.log(1 - 2 * self.margin)).flatten(1).sum(1)
        return (y.sigmoid() - self.margin) / (1 - 2 * self.margin), ladj

    def extra_repr(self) -> str:
        return f"margin={self.margin}"
