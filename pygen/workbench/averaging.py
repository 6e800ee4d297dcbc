"""The moving average of a model's weights: average = beta average + (1 - beta) weights.

beta = 0.5^(batch / half-life), both in pictures, and the half-life is at most `ramp` times the pictures seen so far, so
that the first weights are soon forgotten (Karras et al. 2022, arXiv:2206.00364, appendix F.2, and their earlier GANs).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

from pygen.model import GenerativeModel

Model = TypeVar("Model", bound=GenerativeModel)


def decay(step: int, batch: int, half_life: float, ramp: float | None) -> float:
    """beta of training step `step`, counted from 1; 0 where the half-life is 0."""
    if ramp is not None:
        half_life = min(half_life, step * batch * ramp)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


def copy_for_averaging(model: Model) -> Model:
    """A copy of a model that takes no gradients and stays in evaluation mode."""
    average: Model = copy.deepcopy(model)
    return average.eval().requires_grad_(False)


@torch.no_grad()
def average_into(average: GenerativeModel, model: GenerativeModel, beta: float) -> None:
    """Move the parameters of `average` towards those of `model`; buffers are copied."""
    old: list[torch.Tensor] = list(average.parameters())
    new: list[torch.Tensor] = list(model.parameters())
    if beta == 0:
        torch._foreach_copy_(old, new)
    else:
        torch._foreach_lerp_(old, new, 1 - beta)
    for buffer, source in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(source)
