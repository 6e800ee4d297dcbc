"""Lowering of attention: scores = scale q k^T, masked, a softmax over the keys, times the values.

What lies between the two products is followed as `Scores` and `Weights`, whose masks are constants of the network.
"""

from __future__ import annotations

import dataclasses
import itertools
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


def _matrix(value: Tensor, scores: Scores) -> Tensor:
    """A constant beside scores as (queries, keys)."""
    laid_out = value.detach().cpu().expand(scores.shape).reshape([scores.sizes[axis] for axis in scores.layout])
    whole = laid_out.permute([scores.layout.index(axis) for axis in range(3)])
    if not (whole == whole[:1]).all():
        raise ConversionError("heads that attend by different masks are not supported")
    return whole[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """scale q k^T where `allowed`: queries (heads, queries, size) and keys (heads, keys, size).

    unmasked: queries whose keys were all pushed down by a finite number, so that they see all of them alike.
    zeroed: scores that were multiplied by zero, which only those that are not allowed may be.
    shape: what the network makes of (heads, queries, keys), in the order of `layout`.
    """

    query: View
    key: View
    shape: tuple[int, ...]
    allowed: Tensor
    unmasked: Tensor
    zeroed: Tensor
    scale: float = 1.0
    layout: tuple[int, ...] = (0, 1, 2)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads, queries, keys."""
        queries, keys = self.allowed.shape
        return self.query.ids.shape[0], queries, keys

    def is_keys(self, dim: int) -> bool:
        """Whether a dimension is that of the keys."""
        behind = math.prod(self.sizes[axis] for axis in self.layout[self.layout.index(2) :])
        return self.shape[dim] == self.sizes[2] and math.prod(self.shape[dim:]) == behind

    def reshaped(self, function: Any, *args: Any, **kwargs: Any) -> Scores:
        """Heads, queries and keys may change places, and dimensions of one come and go."""
        numbers = torch.arange(math.prod(self.shape)).view(self.shape)
        out = function(numbers, *args, **kwargs)
        if isinstance(out, Tensor) and out.numel() == numbers.numel():
            laid_out = numbers.view([self.sizes[axis] for axis in self.layout])
            for order in itertools.permutations(range(3)):
                if torch.equal(laid_out.permute(order).flatten(), out.flatten()):
                    layout = tuple(self.layout[i] for i in order)
                    return dataclasses.replace(self, shape=tuple(out.shape), layout=layout)
        raise ConversionError("it takes the scores of attention apart")

    def scaled(self, factor: float, shift: float) -> Scores:
        return dataclasses.replace(self, scale=self.scale * factor)  # a shift of all changes no weight

    def filled(self, mask: Tensor, number: float) -> Scores:
        if number > _EXCLUDED:
            raise ConversionError(f"masked scores become {number}, but expected -inf or at most {_EXCLUDED}")
        allowed = self.allowed & ~_matrix(mask, self)
        unmasked = self.unmasked | ~allowed.any(1) if math.isfinite(number) else self.unmasked
        return dataclasses.replace(self, allowed=allowed, unmasked=unmasked)

    def masked(self, bias: Tensor, sign: float) -> Scores:
        if not isinstance(bias, Tensor):
            raise ConversionError("something that is no constant is added to the scores of attention")
        matrix = sign * _matrix(bias, self)
        excluded = matrix <= _EXCLUDED
        if (matrix[~excluded] != 0).any():
            raise ConversionError("a bias other than a mask is added to the scores of attention")
        return self.filled(excluded, -math.inf if not matrix[excluded].isfinite().any() else _EXCLUDED)

    def weighed(self, factor: Any) -> Scores:
        matrix = _matrix(factor, self) if isinstance(factor, Tensor) else None
        if matrix is None or ((matrix != 0) & (matrix != 1)).any():
            raise ConversionError("scores of attention are multiplied with a tensor of other numbers than 0 and 1")
        return dataclasses.replace(self, zeroed=self.zeroed | (matrix == 0))


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
        matrix = _matrix(factor, self.scores)
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
        (key,) = b.moved(lambda each: each.transpose(1, 2))
        return Scores(a, key, (heads, queries, keys), allowed, torch.zeros(queries) > 0, ~allowed)
    if isinstance(a, Weights) and isinstance(b, View) and a.scores.layout == (0, 1, 2):
        return _attend(tracer, a.scores, b)
    if isinstance(a, View) and isinstance(b, Weights) and b.scores.layout == (0, 2, 1):
        (value,) = a.moved(lambda each: each.transpose(1, 2))
        return _attend(tracer, b.scores, value).moved(lambda each: each.transpose(1, 2))[0]
    if isinstance(a, View) and isinstance(b, Tensor) and len(b) == 1:
        product = site_product(tracer, a.moved(lambda each: each[0])[0], 1, b[0].detach().cpu().T, None)
        return product.moved(lambda each: each[None])[0]
    if isinstance(b, View) and isinstance(a, Tensor) and len(a) == 1:
        product = site_product(tracer, b.moved(lambda each: each[0])[0], 0, a[0].detach().cpu(), None)
        return product.moved(lambda each: each[None])[0]
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
    if not x.is_keys(dim):
        raise ConversionError("the softmax of attention runs over the queries")
    if (x.zeroed & x.allowed).any():
        raise ConversionError("scores of attention are multiplied by 0 and not masked")
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
    if length == 1:
        return torch.zeros(1, dtype=torch.int64)
    if (roles.rows or roles.columns) != dimension or (roles.rows is not None and roles.columns is not None):
        raise NotSeparable("queries and keys of attention do not lie along one dimension")
    return torch.arange(length)


def _attend(tracer: Tracer, scores: Scores, value: View) -> View:
    if scores.unmasked.any():
        first_query = int(scores.unmasked.nonzero()[0])
        raise ConversionError(f"query {first_query} is allowed no key, and so attends to all, also to what comes later")
    views = [scores.query, scores.key, value]
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
    heads, width = value.ids.shape[0], value.ids.shape[2]
    node = Attention(query, key, values, heads, scores.scale, first, last)
    height, columns = arrangements[0].grid[1:]
    field = tracer.network.add(node, heads * width, height, columns)
    shape = (heads, scores.query.ids.shape[1], width)
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
