"""The contract that the five families share: a map from a prior point Z to a data point X.

The families differ in how they make the map and in what they can say of p(x); the contract states that
difference (`Density`) instead of hiding it. Training, checkpoints, evaluation and the command line are written
against this file alone.
"""

from __future__ import annotations

import dataclasses
import enum
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Density(enum.Enum):
    """What a family can say of p(x)."""

    IMPLICIT = "implicit"  # samples only
    LOWER_BOUND = "lower bound"  # an evidence lower bound on log p(x)
    EXACT = "exact"


class DensityUnavailable(RuntimeError):
    """Raised by `log_prob` of a model that has no density; the message says what to use instead."""


class Stage(NamedTuple):
    """One stop on the way from Z to X: a short label and the values there, one row per sample."""

    label: str
    values: Tensor  # (n, ...)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every family needs to know of its data.

    shape: (channels, height, width) of one picture.
    levels: number of grey values per channel. A picture's value k in 0 .. levels-1 reaches the model as
        x = 2 k / (levels - 1) - 1, a float in [-1, 1].
    classes: number of class labels, or None for data without labels.
    """

    shape: tuple[int, int, int] = (1, 8, 8)
    levels: int = 17
    classes: int | None = 10

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(
                f"shape is {tuple(self.shape)}, but expected three positive numbers (channels, height, width)"
            )
        if self.levels < 2:
            raise ValueError(f"levels is {self.levels}, but expected at least 2")
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"classes is {self.classes}, but expected a positive number or None")
        object.__setattr__(self, "shape", tuple(self.shape))

    def require_positive(self, *names: str) -> None:
        """ValueError where one of these fields is less than 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but expected at least 1")

    def require_probability(self, *names: str) -> None:
        """ValueError where one of these fields is outside [0, 1)."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but expected a number in [0, 1)")

    @property
    def dimensions(self) -> int:
        """The number of values in one picture."""
        channels, height, width = self.shape
        return channels * height * width


class GenerativeModel(nn.Module):
    """A trained or trainable map from Z to X, with what it knows of p(x).

    Pictures are float tensors (n, channels, height, width) in [-1, 1], quantized to `config.levels` values.
    Labels are int64 tensors (n,).
    """

    density: ClassVar[Density]
    # Whether `log_prob` speaks of the picture itself; False where it is the density at a point in the picture's cell,
    # which even of an EXACT model only bounds the probability of the picture from below, on average.
    discrete: ClassVar[bool] = True
    PLAYERS: ClassVar[tuple[str, ...]] = ("model",)
    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def sample(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> Tensor:
        """Draw n pictures, (n, channels, height, width) in [-1, 1].

        GAN, Diffusion and VAE (pixels="mean") return values between the levels; `quantize` rounds them.
        Sample number `ids[i]` under `seed` is the same picture in any batch and on any rank.

        ids: int64 (n,), the numbers of the samples; 0 .. n-1 by default.
        condition: int64 (n,) labels; by default a conditional model cycles through its classes by `ids`.
        steps: network passes to spend, where the family can choose (diffusion); ValueError elsewhere.
        """

    def log_prob(
        self, x: Tensor, *, condition: Tensor | None = None, ids: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """log p(x | condition) of quantized pictures in nats, one number per sample, shape (n,).

        A model of discrete values gives the probability of the picture. A continuous model gives its density at a
        point drawn uniformly in the picture's quantization cell, times the volume of the cell, so that all families
        speak of the same quantity (Theis et al. 2016, arXiv:1511.01844, eq. 4-6). Where `density` is LOWER_BOUND the
        number bounds log p(x) from below, in expectation over the addressed noise (`seed`, `ids`).
        """
        raise DensityUnavailable(
            f"{type(self).__name__} has no density; compare its samples instead (pygen evaluate: Frechet distance, "
            "precision, recall, coverage)"
        )

    def encode(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """The prior point of x, (n, ...), where the family has one."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder")

    def decode(self, z: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """The picture of a prior point, (n, channels, height, width) in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} has no decoder")

    @abstractmethod
    def trajectory(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> list[Stage]:
        """The way of `sample(n, ...)` from Z to X: the first stage is Z, the last is what `sample` returns."""

    @abstractmethod
    def network_passes(self, steps: int | None = None) -> int:
        """How many passes of the network one call of `sample` takes."""

    def players(self) -> dict[str, list[nn.Parameter]]:
        """Named parameter groups, in the order in which one training step updates them."""
        return {self.PLAYERS[0]: list(self.parameters())}

    @abstractmethod
    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """The scalar that `player` descends on, for a batch of pictures; noise comes from PyTorch's generator."""

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain values, for a checkpoint."""
        return dataclasses.asdict(self.config)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def resolve_ids(self, n: int, ids: Tensor | None) -> Tensor:
        """`ids`, or 0 .. n-1, as int64 on the model's device."""
        if n < 0:
            raise ValueError(f"n is {n}, but expected a number of samples that is not negative")
        if ids is None:
            return torch.arange(n, device=self.device)
        if ids.shape != (n,):
            raise ValueError(f"ids has shape {tuple(ids.shape)}, but expected ({n},)")
        return ids.to(self.device, torch.int64)

    def resolve_condition(self, ids: Tensor, condition: Tensor | None) -> Tensor | None:
        """`condition`, or for a conditional model the classes in turn by sample id."""
        classes = self.config.classes
        if condition is None:
            return None if classes is None else ids % classes
        return self.check_condition(condition, len(ids))

    def check_condition(self, condition: Tensor | None, n: int) -> Tensor | None:
        """`condition` as int64 on the model's device, or a ValueError that says what is wrong with its shape."""
        classes = self.config.classes
        if condition is None:
            if classes is not None:
                raise ValueError(
                    f"condition is None, but {type(self).__name__} was built for {classes} classes: pass labels (n,)"
                )
            return None
        if classes is None:
            raise ValueError(f"condition was given, but {type(self).__name__} was built without classes (classes=None)")
        if condition.shape != (n,):
            raise ValueError(f"condition has shape {tuple(condition.shape)}, but expected ({n},)")
        # What the host can read is checked; on a GPU, reading would wait for the device.
        if condition.device.type == "cpu" and condition.numel() and not torch.compiler.is_compiling():
            low, high = int(condition.min()), int(condition.max())
            if low < 0 or high >= classes:
                raise ValueError(
                    f"condition has label {low if low < 0 else high}, but expected labels from 0 to {classes - 1}"
                )
        return condition.to(self.device, torch.int64)

    def check_player(self, player: str) -> None:
        """ValueError for a player that the model does not have."""
        if player not in self.PLAYERS:
            expected = " or ".join(repr(name) for name in self.PLAYERS)
            raise ValueError(f"player is {player!r}, but expected {expected}")

    def check_pictures(self, x: Tensor) -> Tensor:
        """`x` on the model's device and in its dtype, or an error that says what is wrong with dtype or shape."""
        if not x.is_floating_point():
            raise TypeError(f"x has dtype {x.dtype}, but expected a floating-point dtype with values in [-1, 1]")
        if x.ndim != 4 or tuple(x.shape[1:]) != self.config.shape:
            expected = ", ".join(map(str, self.config.shape))
            raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, {expected})")
        return x.to(self.device, next(self.parameters()).dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest of the `levels` values, as int64 in 0 .. levels-1; x float in [-1, 1]."""
        top = self.config.levels - 1
        return ((x.clamp(-1, 1) + 1) * (top / 2)).round().long()

    def dequantize(self, k: Tensor) -> Tensor:
        """x = 2 k / (levels - 1) - 1 of integer values k, as float32."""
        return k.float() * (2 / (self.config.levels - 1)) - 1


def refuse_steps(model: GenerativeModel, steps: int | None) -> None:
    """ValueError for a family whose number of passes is not the caller's to choose."""
    if steps is not None:
        raise ValueError(
            f"steps is {steps}, but {type(model).__name__} always takes {model.network_passes()} passes; leave it None"
        )
