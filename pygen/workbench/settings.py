"""The settings of a training run, and its learning rate.

The learning rate of step t in 0 .. steps-1 is learning_rate * multiplier(player) * min(1, (t + 1) / warmup) *
(1 + cos(pi max(0, t - warmup) / (steps - warmup))) / 2, without the last factor where the schedule is constant
(Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train. Raises ValueError, naming the field, for a value out of its range."""

    steps: int = 2000
    """Training steps; in each, every player takes one."""
    batch_size: int = 64
    """Pictures in a step."""
    learning_rate: float = 1e-3
    """Highest learning rate of the schedule."""
    player_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Factors on the learning rate of single players, by name."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay of the first and second moments."""
    weight_decay: float = 0.0
    """AdamW's decay of weights with two or more dimensions; biases and gains are left alone."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up: fall to zero, or stay."""
    warmup: int = 0
    """Steps over which the learning rate rises to its highest."""
    clip: float | None = 1.0
    """Longest gradient of one player; longer ones are scaled down to it."""
    ema_images: float = 10_000
    """Half-life of the moving average of the weights, in pictures; 0 for no average."""
    ema_ramp: float | None = 0.05
    """The half-life is at most this share of the pictures seen; None for no such limit."""
    autocast: Literal["off", "bf16"] = "off"
    """Compute losses in bfloat16 where PyTorch finds that safe."""
    seed: int = 0
    """Seed of the order of the pictures and of the noise in the losses."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0 for one at the end only."""
    log_every: int = 50
    """Steps between records in the history."""

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, float, float], ...] = (
            ("steps", 1, math.inf),
            ("batch_size", 1, math.inf),
            ("learning_rate", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("warmup", 0, math.inf),
            ("ema_images", 0, math.inf),
            ("checkpoint_every", 0, math.inf),
            ("log_every", 1, math.inf),
        )
        for name, low, high in limits:
            if not low <= getattr(self, name) < high:
                raise ValueError(f"{name} is {getattr(self, name)}, but expected a number of at least {low}")
        for name in ("clip", "ema_ramp"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, but expected a positive number or None")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}, but expected two numbers in [0, 1)")
        for name, choices in (("schedule", ("cosine", "constant")), ("autocast", ("off", "bf16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but expected one of {', '.join(choices)}")
        for player, rate in self.player_rates.items():
            if not 0 <= rate < math.inf:
                raise ValueError(f"player_rates[{player!r}] is {rate}, but expected a number of at least 0")
        object.__setattr__(self, "betas", tuple(self.betas))

    def rate(self, step: int) -> float:
        """The factor on the learning rate in step `step`, counted from 0."""
        factor = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "cosine" and step > self.warmup:
            factor *= (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2
        return factor
