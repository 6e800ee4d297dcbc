"""The distributions that flows start from: log p(z) in nats, and samples by their number.

Noise is addressed (pygen.ops.noise): sample number `ids[i]` under `seed` is the same in any batch and on any rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen import ops


class Base(nn.Module):
    """A distribution over tensors of one shape. `log_prob(z)` is (n,), `sample(n)` is (n, *shape).

    shape: of one sample. A `Flow` offers the same three, and can be the base of another flow.
    """

    where: Tensor

    def __init__(self, shape: Sequence[int] | int) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape is {self.shape}, but expected positive numbers")
        # Knows the device and the dtype, where there are no parameters that would.
        self.register_buffer("where", torch.zeros(()), persistent=False)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(z | context) in nats, (n,), of z (n, *shape)."""
        raise NotImplementedError(f"{type(self).__name__} does not define log_prob")

    def sample(self, n: int, *, context: Tensor | None = None, ids: Tensor | None = None, seed: int = 0) -> Tensor:
        """(n, *shape); `ids` int64 (n,), 0 .. n-1 by default."""
        raise NotImplementedError(f"{type(self).__name__} does not define sample")

    def _ids(self, n: int, ids: Tensor | None) -> Tensor:
        if n < 0:
            raise ValueError(f"n is {n}, but expected a number of samples that is not negative")
        if ids is None:
            return torch.arange(n, device=self.where.device)
        if ids.shape != (n,):
            raise ValueError(f"ids has shape {tuple(ids.shape)}, but expected ({n},)")
        return ids.to(self.where.device, torch.int64)

    def _noise(self, n: int, ids: Tensor | None, seed: int) -> Tensor:
        return ops.noise(self._ids(n, ids), self.shape, seed=seed, dtype=self.where.dtype)

    def _check(self, z: Tensor) -> None:
        if tuple(z.shape[1:]) != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"z has shape {tuple(z.shape)}, but expected (n, {expected})")

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


class StandardNormal(Base):
    """N(0, I)."""

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(z)
        return _normal_log_prob(_wide(z))

    def sample(self, n: int, *, context: Tensor | None = None, ids: Tensor | None = None, seed: int = 0) -> Tensor:
        return self._noise(n, ids, seed)


class DiagonalNormal(Base):
    """N(mean, diag(e^{2 log_std})), both learned; they start at 0."""

    def __init__(self, shape: Sequence[int] | int) -> None:
        super().__init__(shape)
        self.mean = nn.Parameter(torch.zeros(self.shape))
        self.log_std = nn.Parameter(torch.zeros(self.shape))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(z)
        return _normal_log_prob((_wide(z) - self.mean) * (-self.log_std).exp()) - self.log_std.sum()

    def sample(self, n: int, *, context: Tensor | None = None, ids: Tensor | None = None, seed: int = 0) -> Tensor:
        return torch.addcmul(self.mean, self._noise(n, ids, seed), self.log_std.exp())


class ConditionalNormal(Base):
    """N(mean, diag(e^{2 log_std})) with both given by a network of the context.

    network: maps the context, n rows, to (n, 2 c, ...) for a shape of (c, ...): means first, then log deviations.
    """

    def __init__(self, shape: Sequence[int] | int, network: nn.Module) -> None:
        super().__init__(shape)
        self.network = network

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(z)
        mean, log_std = self._propose(context, len(z))
        return _normal_log_prob((_wide(z) - mean) * (-log_std).exp()) - log_std.flatten(1).sum(1)

    def sample(self, n: int, *, context: Tensor | None = None, ids: Tensor | None = None, seed: int = 0) -> Tensor:
        mean, log_std = self._propose(context, n)
        return torch.addcmul(mean, self._noise(n, ids, seed), log_std.exp())

    def _propose(self, context: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        if context is None:
            raise ValueError("context is None, but expected what the base is conditioned on, with one row per sample")
        proposed: Tensor = self.network(context)
        expected = (n, 2 * self.shape[0], *self.shape[1:])
        if proposed.shape != expected:
            raise ValueError(f"network returned shape {tuple(proposed.shape)}, but expected {expected}")
        mean, log_std = proposed.chunk(2, dim=1)
        return mean, log_std


class StandardLogistic(Base):
    """The logistic distribution, sigmoid(z) (1 - sigmoid(z)) in each dimension: NICE's prior
    (Dinh et al. 2015, arXiv:1410.8516, section 3.4)."""

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(z)
        z = _wide(z)
        return (F.logsigmoid(z) + F.logsigmoid(-z)).flatten(1).sum(1)

    def sample(self, n: int, *, context: Tensor | None = None, ids: Tensor | None = None, seed: int = 0) -> Tensor:
        # In 16 bits a number next to 1 would be 1.
        wide = torch.float64 if self.where.dtype == torch.float64 else torch.float32
        u = ops.uniform(self._ids(n, ids), self.shape, seed=seed, dtype=wide)
        # Half a step into the open interval: the logit of 0 is infinite.
        return torch.logit(u * (1 - 2**-23) + 2**-24).to(self.where.dtype)


class Uniform(Base):
    """Uniform on [low, high] in each dimension: for spline flows of a bounded or circular domain."""

    def __init__(self, shape: Sequence[int] | int, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(shape)
        if not low < high:
            raise ValueError(f"low and high are {low} and {high}, but expected low < high")
        self.low, self.high = low, high

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(z)
        z = _wide(z).flatten(1)
        outside = ((z < self.low) | (z > self.high)).any(1)
        value = z.new_full((len(z),), -math.prod(self.shape) * math.log(self.high - self.low))
        return value.masked_fill(outside, -math.inf).masked_fill(z.isnan().any(1), math.nan)

    def sample(self, n: int, *, context: Tensor | None = None, ids: Tensor | None = None, seed: int = 0) -> Tensor:
        u = ops.uniform(self._ids(n, ids), self.shape, seed=seed, dtype=self.where.dtype)
        return self.low + (self.high - self.low) * u

    def extra_repr(self) -> str:
        return f"shape={self.shape}, low={self.low}, high={self.high}"


def _wide(z: Tensor) -> Tensor:
    # A sum over a picture in 16 bits would lose its last digits.
    return z if z.dtype == torch.float64 else z.float()


def _normal_log_prob(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
