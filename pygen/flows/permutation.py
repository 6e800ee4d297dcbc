"""Fixed permutations of the channels, of log-determinant 0."""

from __future__ import annotations

import torch
from torch import Tensor

from pygen.flows.transform import Reshape


class Permutation(Reshape):
    """Channel i of the result is channel order[i] of x (n, c, ...).

    order: int64 (c,), each of 0 .. c-1 once. It is no part of a checkpoint: whoever builds the layer knows it, or draws
    it by a seed (`Permutation.random`).

    ValueError: order is not a permutation, or x has another number of channels.
    """

    order: Tensor
    restore: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        if order.dim() != 1 or not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise ValueError(
                f"order is {order.tolist()}, but expected a permutation of 0 .. {max(order.numel() - 1, 0)}"
            )
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("restore", order.argsort(), persistent=False)

    @classmethod
    def random(cls, channels: int, *, seed: int) -> Permutation:
        """A permutation drawn by a seed."""
        return cls(torch.randperm(channels, generator=torch.Generator().manual_seed(seed)))

    @classmethod
    def reverse(cls, channels: int) -> Permutation:
        """The last channel first."""
        return cls(torch.arange(channels - 1, -1, -1))

    def arrange(self, x: Tensor) -> Tensor:
        self._check(x)
        return x.index_select(1, self.order)

    def lay_out(self, y: Tensor) -> Tensor:
        self._check(y)
        return y.index_select(1, self.restore)

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != len(self.order):
            raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, {len(self.order)}, ...)")

    def extra_repr(self) -> str:
        return f"channels={len(self.order)}"
