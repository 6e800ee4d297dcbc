"""Lowering of what only moves elements: the same operation on their identities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pygen.autoregressive.incremental.fields import ZERO, Arrangement, ConversionError, NotSeparable
from pygen.autoregressive.incremental.linear import joined
from pygen.autoregressive.incremental.pointwise import apply
from pygen.autoregressive.incremental.tracing import Tracer, Value, View, lowers


@lowers("view", "_unsafe_view", "reshape")
def _viewed(tracer: Tracer, function: Any, x: Value, shape: list[int]) -> list[Value]:
    # Identities need not lie in memory as the tensor does.
    return _moved(tracer, torch.reshape, x, shape, kwargs={})


@lowers(
    "permute", "transpose.int", "transpose", "t", "unsqueeze", "squeeze", "expand",
    "select", "unbind", "repeat", "unfold",
)  # fmt: skip
def _reshaped(tracer: Tracer, function: Any, x: Value, *args: Any, **kwargs: Any) -> list[Value]:
    return _moved(tracer, function, x, *args, kwargs=kwargs)


@lowers("slice", "split", "split_with_sizes", "chunk", "clone", "alias", "detach", "lift_fresh", "roll", "flip")
def _kept_in_shape(tracer: Tracer, function: Any, x: Value, *args: Any, **kwargs: Any) -> list[Value]:
    kwargs.pop("memory_format", None)
    # A part of a flattened picture is none; one of rows and columns stays what it is.
    if isinstance(x, View) and x.roles_if_any is not None and x.roles.flat is None:
        outputs, _ = tree_flatten(function(x.ids, *args, **kwargs))
        return [View(tracer.network, ids, x.roles) for ids in outputs]
    return _moved(tracer, function, x, *args, kwargs=kwargs)


def _moved(tracer: Tracer, function: Any, x: Value, *args: Any, kwargs: dict[str, Any]) -> list[Value]:
    if not isinstance(x, View):
        return [x.reshaped(function, *args, **kwargs)]
    return list(x.moved(lambda each: function(each, *args, **kwargs)))


@lowers("_to_copy")
def _to_copy(tracer: Tracer, function: Any, x: Value, dtype: torch.dtype | None = None, **kwargs: Any) -> Value:
    if dtype is not None and not dtype.is_floating_point:
        raise ConversionError("a conversion to whole numbers is not supported")
    return x


@lowers("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
def _shape_only(tracer: Tracer, function: Any, *args: Any, **kwargs: Any) -> list[None]:
    return [None]


@lowers("aminmax")
def _bounds(tracer: Tracer, function: Any, x: Value, **kwargs: Any) -> list[None]:
    if not tracer.of_tokens:
        raise ConversionError("the network looks at the values of the sample")
    return [None, None]  # `one_hot` checks its codes


@lowers("constant_pad_nd")
def _pad(tracer: Tracer, function: Any, x: View, pad: list[int], value: float = 0) -> Value:
    roles = x.roles_if_any
    if roles is not None and roles.flat is not None:
        roles = None
    padded = View(tracer.network, function(x.ids, pad, ZERO), roles)
    if value == 0:
        return padded
    return apply(tracer, "add", [padded, function(torch.zeros(x.ids.shape), pad, float(value))])


@lowers("cat", "stack")
def _cat(tracer: Tracer, function: Any, tensors: list[Any], dim: int = 0) -> Value:
    first = _widest([each for each in tensors if isinstance(each, View)])
    if (
        first.roles.flat is not None
        and function._schema.name == "aten::cat"
        and dim % first.ids.dim() == first.roles.rows
    ):
        raise NotSeparable("something is put beside a flattened picture")
    ids = [tracer.view(each, _shape(each), first.roles) for each in tensors]
    if function._schema.name == "aten::stack" or len({len(_shape(each)) for each in tensors}) > 1:
        return View(tracer.network, function(ids, dim))
    whole = View(tracer.network, function(ids, dim), first.roles)
    filled = [each for each in ids if (each != ZERO).any()]
    if dim % first.ids.dim() in (first.roles.rows, first.roles.columns) and len(filled) > 1:
        # Rows, or columns, of several fields.
        parts = [
            function([each if each is part else torch.full_like(each, ZERO) for each in ids], dim) for part in filled
        ]
        return _sum_of_parts(tracer, whole.arrangement(), parts)
    return whole


def _widest(views: list[View]) -> View:
    """The one that knows most about rows and columns: constants beside it lie as it does."""
    return max(views, key=lambda view: sum(d is not None for d in (view.roles.rows, view.roles.columns)))


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.ids.shape if isinstance(value, View) else value.shape)


@lowers("slice_scatter", "select_scatter", "copy")
def _scatter(tracer: Tracer, function: Any, x: Any, source: Any, *args: Any, **kwargs: Any) -> Value:
    views = [each for each in (x, source) if isinstance(each, View)]
    roles = next((view.roles for view in views if view.ids.dim() == len(_shape(x))), None)
    if roles is None:
        raise ConversionError("what is written here has fewer dimensions than what it is written into")
    if isinstance(source, Tensor) and source.dim() == len(_shape(x)) - 1:
        source_ids = torch.full(_shape(source), ZERO)
        if source.any():
            raise ConversionError("numbers other than zero are written into a row or column")
    elif function._schema.name == "aten::copy":
        source_ids = tracer.view(source, _shape(x), roles)
        return View(tracer.network, source_ids.clone(), roles)
    else:
        source_ids = source.ids if isinstance(source, View) else tracer.view(source, _shape(source), roles)
    ids = tracer.view(x, _shape(x), roles)
    whole = View(tracer.network, function(ids, source_ids, *args, **kwargs), roles)
    arrangement = whole.arrangement()
    try:
        tracer.network.decode(arrangement.to_grid(whole.ids))
    except NotSeparable:
        parts = [
            function(ids, torch.full_like(source_ids, ZERO), *args, **kwargs),
            function(torch.full_like(ids, ZERO), source_ids, *args, **kwargs),
        ]
        return _sum_of_parts(tracer, arrangement, parts)
    return whole


def _sum_of_parts(tracer: Tracer, arrangement: Arrangement, parts: list[Tensor]) -> View:
    """Identities of one shape, of which at each place at most one is not ZERO: one field that is their sum."""
    source = joined(tracer.network, [arrangement.to_grid(part) for part in parts])
    return View(tracer.network, arrangement.from_grid(source.field.ids()), arrangement.roles)


@lowers("upsample_nearest1d", "upsample_nearest2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d")
def _upsample(tracer: Tracer, function: Any, x: View, *args: Any, **kwargs: Any) -> Value:
    # Identities stay exact in float64 up to 2^53.
    return View(tracer.network, function(x.ids.double(), *args, **kwargs).long(), x.roles_if_any)


@lowers("index_select")
def _index_select(tracer: Tracer, function: Any, x: View, dim: int, index: Any) -> Value:
    if not isinstance(index, Tensor):
        raise ConversionError("the network looks up places that depend on the sample")
    return x.moved(lambda each: function(each, dim, index.cpu()))[0]
