"""Multiscale RealNVP: log p(v) = log N(f(v); 0, I) + log |det df/dv|, with f a stack of affine couplings.

Couplings, squeezing and factored-out scales are those of Dinh et al. 2017 (arXiv:1605.08803, sections 3.4-3.6).
Pictures are made continuous by uniform dequantization, v = (k + u) / levels, and P(x) >= the density of v times
levels^-D in expectation over u (Theis et al. 2016, arXiv:1511.01844, eq. 4-6).
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen import ops
from pygen.flows.coupling import AffineCoupling
from pygen.model import Density, GenerativeModel, ModelConfig, Stage, refuse_steps
from pygen.nn.conditioner import ConvConditioner


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealNVPConfig(ModelConfig):
    """What a RealNVP is made of.

    scales: how often the picture is squeezed, halving height and width; between scales half of the values leave.
    couplings: affine couplings per scale.
    width, blocks, dropout: of each coupling's conditioner, a residual conv net.
    limit: the bound of the log-scale of one coupling, in nats.
    margin: v in [0, 1) enters as logit(margin + (1 - 2 margin) v), so that the flow need not model its edges;
        None for an affine map to [-1, 1] instead.
    """

    scales: int = 2
    couplings: int = 8
    width: int = 32
    blocks: int = 1
    dropout: float = 0.3
    limit: float = 2.0
    margin: float | None = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scales", "couplings", "width", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but expected a number in [0, 1)")
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit is {self.limit}, but expected a positive number")
        if self.margin is not None and not 0 < self.margin < 0.5:
            raise ValueError(f"margin is {self.margin}, but expected a number in (0, 0.5) or None")
        step = 2**self.scales
        if self.shape[1] % step or self.shape[2] % step:
            raise ValueError(
                f"shape is {self.shape} with scales {self.scales}, but expected a height and width divisible by {step}"
            )


class PartitionedCoupling(nn.Module):
    """An affine coupling between two halves of the channels, named by an order that puts one half first."""

    order: Tensor
    restore: Tensor

    def __init__(self, order: Tensor, flip: bool, config: RealNVPConfig) -> None:
        super().__init__()
        channels = len(order)
        # Fixed by the configuration, so not part of a checkpoint.
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("restore", order.argsort(), persistent=False)
        conditioner = ConvConditioner(
            channels // 2,
            channels,
            width=config.width,
            blocks=config.blocks,
            classes=config.classes,
            dropout=config.dropout,
        )
        self.coupling = AffineCoupling(conditioner, flip=flip, activation="tanh", limit=config.limit)

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        y, ladj = self.coupling(x[:, self.order], condition)
        return y[:, self.restore], ladj

    def inverse(self, y: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        x, ladj = self.coupling.inverse(y[:, self.order], condition)
        return x[:, self.restore], ladj


class RealNVP(GenerativeModel):
    """An exact density by affine couplings, and samples in one pass of their inverses.

    A prior point is laid out as a picture, (n, channels, height, width): each value sits where the squeezing that led
    to it says.
    """

    density = Density.EXACT
    discrete = False
    config: RealNVPConfig

    def __init__(self, config: RealNVPConfig | None = None) -> None:
        config = config or RealNVPConfig()
        super().__init__(config)
        scales = []
        channels = config.shape[0]
        for _ in range(config.scales):
            channels *= 4
            orders = _partitions(channels)
            scales.append(
                nn.ModuleList(
                    PartitionedCoupling(orders[k // 2 % len(orders)], k % 2 == 1, config)
                    for k in range(config.couplings)
                )
            )
            channels //= 2
        self.scales = nn.ModuleList(scales)

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood in nats per dimension, dequantized by PyTorch's generator."""
        self.check_player(player)
        x = self.check_pictures(x)
        condition = self.check_condition(condition, len(x))
        return -self._log_prob(x, torch.rand_like(x), condition).mean() / self.config.dimensions

    def log_prob(
        self, x: Tensor, *, condition: Tensor | None = None, ids: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        x = self.check_pictures(x)
        condition = self.check_condition(condition, len(x))
        uniform = ops.uniform(self.resolve_ids(len(x), ids), self.config.shape, seed=seed, dtype=x.dtype)
        return self._log_prob(x, uniform, condition)

    def encode(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """The prior point of the centre of x's quantization cell; `decode` brings it back to x."""
        x = self.check_pictures(x)
        condition = self.check_condition(condition, len(x))
        return self.to_prior(self._dequantized(x, torch.full_like(x, 0.5)), condition=condition)[0]

    def decode(self, z: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """The quantized picture of a prior point, (n, channels, height, width) in [-1, 1]."""
        return self._picture(self.from_prior(z, condition=condition)[0])

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
        return self.decode(self._draw(ids, seed), condition=condition)

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
        """Z, the flow's state after each coupling (in the coordinates in which the couplings work), and X."""
        refuse_steps(self, steps)
        ids = self.resolve_ids(n, ids)
        condition = self.resolve_condition(ids, condition)
        stages = [Stage("Z", self._draw(ids, seed))]
        v, _ = self.from_prior(stages[0].values, condition=condition, stages=stages)
        return [*stages, Stage("X", self._picture(v))]

    def network_passes(self, steps: int | None = None) -> int:
        return 1

    def to_prior(self, v: Tensor, *, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From v in [0, 1), (n, channels, height, width), to the prior point z and log |det dz/dv| (n,) in nats."""
        state, total = _normalize(v, self.config.margin)
        left: list[Tensor] = []
        for depth, couplings in enumerate(self.scales):
            if depth > 0:
                state, leaving = state.chunk(2, dim=1)
                left.append(leaving)
            state = squeeze(state)
            for coupling in cast("nn.ModuleList", couplings):
                state, ladj = coupling(state, condition)
                total = total + ladj
        return _reassemble(state, left), total

    def from_prior(
        self, z: Tensor, *, condition: Tensor | None = None, stages: list[Stage] | None = None
    ) -> tuple[Tensor, Tensor]:
        """From the prior point z, (n, channels, height, width), back to v and log |det dv/dz| (n,) in nats.

        stages: a list that collects the state after each coupling, laid out as pictures.
        """
        if z.ndim != 4 or tuple(z.shape[1:]) != self.config.shape:
            raise ValueError(f"z has shape {tuple(z.shape)}, but expected (n, {str(self.config.shape)[1:]}")
        condition = self.check_condition(condition, len(z))
        left = []
        state = squeeze(z.to(self.device))
        for _ in range(1, self.config.scales):
            state, leaving = state.chunk(2, dim=1)
            left.append(leaving)
            state = squeeze(state)
        total = state.new_zeros(len(z))
        for depth in reversed(range(self.config.scales)):
            couplings = cast("nn.ModuleList", self.scales[depth])
            for k in reversed(range(len(couplings))):
                state, ladj = cast(PartitionedCoupling, couplings[k]).inverse(state, condition)
                total = total + ladj
                if stages is not None:
                    stages.append(Stage(f"scale {depth + 1}, coupling {k + 1}", _reassemble(state, left)))
            state = unsqueeze(state)
            if left:
                state = torch.cat((state, left.pop()), dim=1)
        v, ladj = _denormalize(state, self.config.margin)
        return v, total + ladj

    def _log_prob(self, x: Tensor, uniform: Tensor, condition: Tensor | None) -> Tensor:
        z, ladj = self.to_prior(self._dequantized(x, uniform), condition=condition)
        prior = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
        return prior + ladj - self.config.dimensions * math.log(self.config.levels)

    def _dequantized(self, x: Tensor, uniform: Tensor) -> Tensor:
        return (self.quantize(x) + uniform) / self.config.levels

    def _draw(self, ids: Tensor, seed: int) -> Tensor:
        return ops.noise(ids, self.config.shape, seed=seed, dtype=next(self.parameters()).dtype)

    def _picture(self, v: Tensor) -> Tensor:
        top = self.config.levels - 1
        return self.dequantize((v * self.config.levels).floor().clamp(0, top))


def squeeze(x: Tensor) -> Tensor:
    """(n, c, 2 h, 2 w) -> (n, 4 c, h, w): each 2x2 block becomes channels, its diagonal in the first half.

    A split of the channels into halves is then the checkerboard of the picture.
    """
    n, c, height, width = x.shape
    blocks = x.reshape(n, c, height // 2, 2, width // 2, 2)
    corners = (blocks[:, :, :, i, :, j] for i, j in _CORNERS)
    return torch.cat(tuple(corners), dim=1)


def unsqueeze(x: Tensor) -> Tensor:
    """(n, 4 c, h, w) -> (n, c, 2 h, 2 w), the inverse of `squeeze`."""
    a, d, b, c = x.chunk(4, dim=1)
    rows = torch.stack((torch.stack((a, b), dim=-1), torch.stack((c, d), dim=-1)), dim=3)
    return rows.reshape(x.shape[0], x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3])


_CORNERS = ((0, 0), (1, 1), (0, 1), (1, 0))


def _partitions(channels: int) -> list[Tensor]:
    """Orders of squeezed channels whose halves are the checkerboard, rows, columns, and alternating channels."""
    corners = torch.arange(channels).reshape(4, -1)
    orders = [corners[list(order)].flatten() for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))]
    if channels > 4:  # with one value per corner, alternating channels are the rows again
        flat = corners.flatten()
        orders.append(torch.cat((flat[::2], flat[1::2])))
    return orders


def _reassemble(state: Tensor, left: list[Tensor]) -> Tensor:
    """The innermost state and what left before it, outermost first, as one tensor of the picture's shape."""
    picture = unsqueeze(state)
    for leaving in reversed(left):
        picture = unsqueeze(torch.cat((picture, leaving), dim=1))
    return picture


def _normalize(v: Tensor, margin: float | None) -> tuple[Tensor, Tensor]:
    """v in [0, 1) to the coordinates in which the couplings work, and the log-determinant (n,)."""
    if margin is None:
        return 2 * v - 1, v.new_full((len(v),), v.shape[1:].numel() * math.log(2))
    p = margin + (1 - 2 * margin) * v
    y = p.log() - (-p).log1p()
    return y, (math.log(1 - 2 * margin) - p.log() - (-p).log1p()).flatten(1).sum(1)


def _denormalize(y: Tensor, margin: float | None) -> tuple[Tensor, Tensor]:
    """The inverse of `_normalize`, and its log-determinant (n,)."""
    if margin is None:
        return (y + 1) / 2, y.new_full((len(y),), -y.shape[1:].numel() * math.log(2))
    ladj = (F.logsigmoid(y) + F.logsigmoid(-y) - math.log(1 - 2 * margin)).flatten(1).sum(1)
    return (y.sigmoid() - margin) / (1 - 2 * margin), ladj
