"""Checks that the autoregressive models and the ways to sample them have in common, each an error of one sentence.

What can be told from a tensor's type, dtype and shape is always checked; its values where the host has them anyway.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from pygen.autoregressive.config import AutoregressiveConfig
from pygen.autoregressive.sampling import Sampling
from pygen.model import GenerativeModel
from pygen.ops.noise import check_address, plain_number
from pygen.ops.sampling import check_filters
from pygen.ops.sampling_reference import Filters


def can_read(tensor: Tensor) -> bool:
    """Whether there are values, and to look at them waits for no device and breaks no graph."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type == "cpu" and tensor.numel() > 0


def check_tensor(name: str, value: Tensor) -> None:
    """TypeError for what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, but expected a tensor")


def check_integers(name: str, value: Tensor) -> None:
    """TypeError for what is no tensor of an integer dtype: rounding would take one number for another."""
    check_tensor(name, value)
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} has dtype {value.dtype}, but expected torch.int64")


def check_count(name: str, value: int, least: int = 0) -> int:
    """`value` as an int; TypeError for what is none, ValueError below `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}, but expected an int of at least {least}")
    count = operator.index(value)
    if count < least:
        raise ValueError(f"{name} is {count}, but expected at least {least}")
    return count


def check_levels(name: str, tokens: Tensor, vocabulary: int, *, wait: bool = False) -> None:
    """TypeError for tokens that are no int64 tensor, ValueError for values outside 0 .. vocabulary - 1.

    wait: look at them wherever they are; for callers that wait for the device in any case.
    """
    check_tensor(name, tokens)
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {tokens.dtype}, but expected torch.int64")
    if can_read(tokens) or (wait and tokens.numel()):
        low, high = map(int, tokens.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"{name} has the value {low if low < 0 else high}, but expected 0 to {vocabulary - 1}")


class CheckedModel(GenerativeModel):
    """What an autoregressive model says of its samples, and of what it is given."""

    config: AutoregressiveConfig

    @property
    def length(self) -> int:
        """Tokens of a picture."""
        return self.config.dimensions

    @property
    def any_length(self) -> bool:
        """Whether samples may be shorter or longer than `length`."""
        return False

    @property
    def vocabulary(self) -> int:
        """Values that a token can have."""
        return self.config.levels

    def check_start(self, n: int, guidance: float | None, length: int | None) -> None:
        """ValueError for a start that the model cannot make; TypeError for a number that is no int."""
        check_count("n", n)
        self.check_guidance(guidance)
        if length is not None:
            check_count("length", length, 1)
        if length not in (None, self.length) and not self.any_length:
            raise ValueError(f"length is {length}, but expected {self.length}, the tokens of a picture")

    def check_guidance(self, guidance: float | None) -> None:
        """ValueError for guidance that the model has not learned."""
        if guidance:
            raise ValueError(
                f"guidance is {guidance}, but expected 0: {type(self).__name__} never saw a picture without its label"
            )

    def check_pictures(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        return super().check_pictures(x)

    def check_batch(self, x: Tensor) -> Tensor:
        """`check_pictures` of what a mean is taken over."""
        x = self.check_pictures(x)
        if not len(x):
            raise ValueError("x has no pictures, but expected at least one: the loss is their mean")
        return x

    def refuse_nan(self, x: Tensor) -> None:
        """ValueError for pictures with NaN, where the host can see it; see `nan_of_nan`."""
        if can_read(x) and bool(x.isnan().any()):
            raise ValueError("x has values that are NaN, but expected values in [-1, 1]")

    def nan_of_nan(self, x: Tensor, log_prob: Tensor) -> Tensor:
        """log_prob (n,), NaN for the pictures that have NaN."""
        return torch.where(x.isnan().flatten(1).any(1), math.nan, log_prob)

    def check_tokens(self, tokens: Tensor) -> Tensor:
        """`tokens`, or an error that says what is wrong with their dtype, shape or values."""
        check_levels("tokens", tokens, self.vocabulary)
        length = self.length
        if tokens.dim() == 2 and self.any_length:
            length = max(tokens.shape[1], 1)
        if tokens.dim() != 2 or tokens.shape[1] != length:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, but expected (n, {length})")
        return tokens

    def check_condition(self, condition: Tensor | None, n: int) -> Tensor | None:
        if condition is not None:
            check_integers("condition", condition)
        return super().check_condition(condition, n)

    def resolve_ids(self, n: int, ids: Tensor | None) -> Tensor:
        n = check_count("n", n)
        if ids is not None:
            check_integers("ids", ids)
        return super().resolve_ids(n, ids)

    def resolve_sampling(
        self, n: int, ids: Tensor | None, condition: Tensor | None, seed: int, *, guidance: float | None = None,
        **filters: Any,
    ) -> Sampling:  # fmt: skip
        """How n samples are drawn, all of it checked: before a network is converted, or run."""
        ids = self.resolve_ids(n, ids)
        check_address(ids, plain_number("seed", seed), 0)
        self.check_guidance(guidance)
        check_filters(Filters(**filters))
        return Sampling(ids, self.resolve_condition(ids, condition), seed, guidance=guidance, **filters)
