"""Lowering of attention: scores = scale q k^T, masked, a softmax over the keys, times the values.

What lies between the two products is followed as `Scores` and `Weights`, whose masks are constants of the network.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pygen.autoregressive.incremental.fields import Array, Attention, ConversionError, NotSeparable, Roles
from pygen.autoregressive.incremental.linear import side_by_side, site_product
from pygen.autoregressive.incremental.pointwise import number_of
from pygen.autoregressive.incremental.tracing import Tracer, Value, View, lowers

# A score this far below the others has no weight in float32 or float64: e^-1000 is zero in both.
_EXCLUDED = -1000.0


def _same_places(shape: tuple[int, ...], function: Any, args: Any, kwargs: Any) -> tuple[int, ...]:
    """The shape after an operation that has to leave scores where they are."""
    numbers = torch.arange(math.prod(shape)).view(shape)
    out = function(numbers, *args, **kwargs)
    if not isinstance(out, Tensor) or out.shape[-2:] != shape[-2:] or not torch.equal(out.flatten(), numbers.flatten()):
        raise ConversionError("it takes the scores of attention apart")
    return tuple(out.shape)


def _matrix(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A constant beside scores as (queries, keys)."""
    whole = value.detach().cpu().expand(shape).reshape(-1, *shape[-2:])
    if not (whole == whole[:1]).all():
        raise ConversionError("heads that attend by different masks are not supported")
    return whole[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """scale q k^T where `allowed`: query and key identities (heads, queries, size) and (heads, keys, size).

    unmasked: queries whose keys were all pushed down by a finite number, so that they see all of them alike.
    """

    query: Tensor
    key: Tensor
    shape: tuple[int, ...]
    allowed: Tensor
    unmasked: Tensor
    scale: float = 1.0

    def reshaped(self, function: Any, *args: Any, **kwargs: Any) -> Scores:
        return dataclasses.replace(self, shape=_same_places(self.shape, function, args, kwargs))

    def scaled(self, factor: float, shift: float) -> Scores:
        return dataclasses.replace(self, scale=self.scale * factor)  # a shift of all changes no weight

    def filled(self, mask: Tensor, number: float) -> Scores:
        if number > _EXCLUDED:
            raise ConversionError(f"masked scores become {number}, but expected -inf or at most {_EXCLUDED}")
        allowed = self.allowed & ~_matrix(mask, self.shape)
        unmasked = self.unmasked | ~allowed.any(1) if math.isfinite(number) else self.unmasked
        return dataclasses.replace(self, allowed=allowed, unmasked=unmasked)

    def masked(self, bias: Tensor, sign: float) -> Scores:
        if not isinstance(bias, Tensor) or sign < 0:
            raise ConversionError("something that is no constant is added to the scores of attention")
        matrix = _matrix(bias, self.shape)
        excluded = matrix <= _EXCLUDED
        if (matrix[~excluded] != 0).any():
            raise ConversionError("a bias other than a mask is added to the scores of attention")
        return self.filled(excluded, -math.inf if not matrix[excluded].isfinite().any() else _EXCLUDED)

    def weighed(self, factor: Any) -> Scores:
        raise ConversionError("scores of attention are multiplied with a tensor")


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The softmax of scores."""

    scores: Scores

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scores.shape

    def reshaped(self, function: Any, *args: Any, **kwargs: Any) -> Weights:
        return Weights(self.scores.reshaped(function, *args, **kwargs))

    def scaled(self, factor: float, shift: float) -> Weights:
        if factor != 1 or shift != 0:
            raise ConversionError("weights of attention are scaled")
        return self

    def masked(self, bias: Any, sign: float) -> Weights:
        raise ConversionError("something is added to the weights of attention")

    def filled(self, mask: Tensor, number: float) -> Weights:
        if number != 0:
            raise ConversionError(f"weights of attention become {number}, but expected 0")
        return self.weighed(~mask)

    def weighed(self, factor: Any) -> Weights:
        """Rows may be switched off, not parts of them."""
        if not isinstance(factor, Tensor):
            raise ConversionError("weights of attention are multiplied with something that is no constant")
        matrix = _matrix(factor, self.shape)
        allowed, kept = self.scores.allowed, matrix != 0
        off = ~(kept & allowed).any(1)
        changed = allowed & (matrix != 1) & ~off[:, None]
        if changed.any():
            raise ConversionError("weights of attention are scaled")
        unmasked = self.scores.unmasked & kept.any(1)
        return Weights(dataclasses.replace(self.scores, allowed=allowed & ~off[:, None], unmasked=unmasked))


@lowers("bmm")
def _bmm(tracer: Tracer, function: Any, a: Any, b: Any) -> Value:
    if isinstance(a, View) and isinstance(b, View):
        heads, queries, _ = a.ids.shape
        keys = b.ids.shape[2]
        allowed = torch.ones(queries, keys, dtype=torch.bool)
        return Scores(a.ids, b.ids.transpose(1, 2), (heads, queries, keys), allowed, torch.zeros(queries) > 0)
    if isinstance(a, Weights) and isinstance(b, View):
        return _attend(tracer, a.scores, b.ids)
    if isinstance(a, View) and isinstance(b, Tensor) and len(b) == 1:
        product = site_product(tracer, View(tracer.network, a.ids[0]), 1, b[0].detach().cpu().T, None)
        return View(tracer.network, product.ids[None])
    if isinstance(b, View) and isinstance(a, Tensor) and len(a) == 1:
        product = site_product(tracer, View(tracer.network, b.ids[0]), 0, a[0].detach().cpu(), None)
        return View(tracer.network, product.ids[None])
    raise ConversionError("a product of this kind is not supported")


@lowers("baddbmm")
def _baddbmm(tracer: Tracer, function: Any, bias: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Value:
    product = _bmm(tracer, function, a, b)
    if not isinstance(product, Scores) or not isinstance(bias, Tensor):
        raise ConversionError("a product of this kind is not supported")
    return product.scaled(float(alpha), 0).masked(bias * beta, 1.0)


@lowers("_softmax", "_safe_softmax")
def _softmax(tracer: Tracer, function: Any, x: Any, dim: int, *args: Any) -> Value:
    if not isinstance(x, Scores):
        raise ConversionError("a softmax is supported over the scores of attention alone")
    if dim not in (-1, len(x.shape) - 1):
        raise ConversionError("the softmax of attention runs over the queries")
    if function._schema.name == "aten::_safe_softmax":
        x = dataclasses.replace(x, unmasked=x.unmasked & False) if not x.unmasked.any() else x
    return Weights(x)


@lowers("nan_to_num")
def _nan_to_num(tracer: Tracer, function: Any, x: Any, nan: Any = None, *args: Any) -> Value:
    if not isinstance(x, Weights) or number_of(nan or 0.0) != 0:
        raise ConversionError("it is supported on the weights of attention alone")
    return x


def _raster(roles: Roles, dimension: int, length: int) -> Tensor:
    """The raster place of each entry of the dimension that holds queries or keys."""
    if roles.flat is not None:
        return roles.flat
    if (roles.rows or roles.columns) != dimension or (roles.rows is not None and roles.columns is not None):
        raise NotSeparable("queries and keys of attention do not lie along one dimension")
    return torch.arange(length)


def _attend(tracer: Tracer, scores: Scores, value: Tensor) -> View:
    if scores.unmasked.any():
        first_query = int(scores.unmasked.nonzero()[0])
        raise ConversionError(f"query {first_query} is allowed no key, and so attends to all, also to what comes later")
    views = [View(tracer.network, ids) for ids in (scores.query, scores.key, value)]
    places = [_raster(view.roles, 1, view.ids.shape[1]) for view in views]
    if not torch.equal(places[1], places[2]):
        raise ConversionError("keys and values of attention lie in different orders")
    arrangements = [view.arrangement() for view in views]
    allowed = torch.empty_like(scores.allowed)
    allowed[places[0][:, None], places[1]] = scores.allowed
    first, last = _intervals(allowed.numpy())
    query, key, values = (
        side_by_side(tracer, arrangement.to_grid(view.ids))
        for arrangement, view in zip(arrangements, views, strict=True)
    )
    heads, width = value.shape[0], value.shape[2]
    node = Attention(query, key, values, heads, scores.scale, first, last)
    height, columns = arrangements[0].grid[1:]
    field = tracer.network.add(node, heads * width, height, columns)
    shape = (heads, scores.query.shape[1], width)
    roles = arrangements[0].roles
    return View(tracer.network, type(arrangements[0])(shape, roles).from_grid(field.ids()), roles)


def _intervals(allowed: Array) -> tuple[Array, Array]:
    """First and last + 1 of the keys that each query is allowed."""
    count = allowed.sum(1)
    first = np.where(count > 0, allowed.argmax(1), 0)
    last = first + count
    span = np.arange(allowed.shape[1])
    if (allowed != ((span >= first[:, None]) & (span < last[:, None]))).any():
        raise ConversionError("the keys that a query is allowed do not follow one another in raster order")
    return first, last
