"""Lowering of what is computed element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pygen.autoregressive.incremental.fields import (
    Array,
    ConversionError,
    Instruction,
    Lookup,
    Pointwise,
    Source,
)
from pygen.autoregressive.incremental.tracing import Tracer, Value, View, lowers


def apply(tracer: Tracer, kind: str, operands: Sequence[Any], numbers: tuple[float, ...] = ()) -> View:
    """A node for `kind` of one or two operands (views, constants, values on the tape), broadcast to one shape.

    Channels that come from different fields become fields of their own.
    """
    shape = tuple(torch.broadcast_shapes(*(_shape(each) for each in operands)))
    arrangement = max(
        (each.arrangement(shape) for each in operands if isinstance(each, View)), key=lambda a: math.prod(a.grid[1:])
    )
    grids = [arrangement.to_grid(tracer.view(each, shape, arrangement.roles)) for each in operands]
    out = torch.empty(arrangement.grid, dtype=torch.int64)
    for channels, sources in _common([tracer.network.decode(grid) for grid in grids], arrangement.grid):
        reads = [source or _zero(tracer, len(channels), arrangement.grid) for source in sources]
        # x + x reads x once, which fusing relies on nowhere, but memory does.
        node = Pointwise([Instruction(kind, 0, len(reads) - 1, numbers)], reads)
        field = tracer.network.add(node, len(channels), *arrangement.grid[1:])
        out[torch.from_numpy(channels)] = field.ids()
    return View(tracer.network, arrangement.from_grid(out), arrangement.roles)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.ids.shape if isinstance(value, View) else value.shape)


def _zero(tracer: Tracer, channels: int, grid: tuple[int, ...]) -> Source:
    field = tracer.network.add_constant(torch.zeros(1, 1, 1))
    return Source(field, np.zeros(channels, np.int64), np.zeros(grid[1], np.int64), np.zeros(grid[2], np.int64))


def _common(
    decoded: list[list[tuple[Array, Source | None]]], grid: tuple[int, ...]
) -> list[tuple[Array, list[Source | None]]]:
    """Sets of channels for which every operand has one source, with these sources."""
    part = np.zeros((len(decoded), grid[0]), np.int64)
    place = np.zeros((len(decoded), grid[0]), np.int64)
    for i, segments in enumerate(decoded):
        for j, (channels, _) in enumerate(segments):
            part[i, channels] = j
            place[i, channels] = np.arange(len(channels))
    found = []
    for signature in np.unique(part, axis=1).T:
        channels = np.flatnonzero((part == signature[:, None]).all(0))
        sources = []
        for i, j in enumerate(signature):
            source = decoded[i][j][1]
            sources.append(source and source.only(place[i, channels]))
        found.append((channels, sources))
    return found


def _unary(name: str, kind: str) -> None:
    @lowers(name)
    def lower(tracer: Tracer, function: Any, x: Value) -> Value:
        return apply(tracer, kind, [x])


for _name in ("neg", "exp", "log", "tanh", "sigmoid", "relu", "abs", "sqrt", "rsqrt", "silu"):
    _unary(_name, _name)


@lowers("reciprocal")
def _reciprocal(tracer: Tracer, function: Any, x: Value) -> Value:
    return apply(tracer, "div", [torch.ones(()), x])


@lowers("square")
def _square(tracer: Tracer, function: Any, x: Value) -> Value:
    return apply(tracer, "mul", [x, x])


@lowers("gelu")
def _gelu(tracer: Tracer, function: Any, x: Value, approximate: str = "none") -> Value:
    return apply(tracer, "gelu" if approximate == "none" else "gelu_tanh", [x])


@lowers("elu")
def _elu(tracer: Tracer, function: Any, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    if input_scale != 1:
        raise ConversionError(f"its input_scale is {input_scale}, but expected 1")
    return apply(tracer, "elu", [x], (float(alpha * scale), float(scale)))


@lowers("leaky_relu")
def _leaky_relu(tracer: Tracer, function: Any, x: Value, slope: float = 0.01) -> Value:
    return apply(tracer, "leaky_relu", [x], (float(slope),))


@lowers("softplus")
def _softplus(tracer: Tracer, function: Any, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    return apply(tracer, "softplus", [x], (float(beta), float(threshold)))


@lowers("clamp", "hardtanh")
def _clamp(tracer: Tracer, function: Any, x: Value, low: float | None = -1, high: float | None = 1) -> Value:
    if function._schema.name == "aten::clamp" and not (
        isinstance(low, (int, float, type(None))) and isinstance(high, (int, float, type(None)))
    ):
        raise ConversionError("its bounds are tensors, but expected numbers")
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return apply(tracer, "clamp", [x], (low, high))


@lowers("clamp_min")
def _clamp_min(tracer: Tracer, function: Any, x: Value, low: float) -> Value:
    return apply(tracer, "clamp", [x], (float(low), math.inf))


@lowers("pow")
def _pow(tracer: Tracer, function: Any, x: Value, exponent: Any) -> Value:
    if exponent == 2:
        return apply(tracer, "mul", [x, x])
    if exponent in (0.5, -0.5):
        return apply(tracer, "sqrt" if exponent > 0 else "rsqrt", [x])
    if exponent == -1:
        return _reciprocal(tracer, function, x)
    raise ConversionError(f"its exponent is {exponent}, but expected 2, 1/2, -1/2 or -1")


@lowers("prelu", "_prelu_kernel")
def _prelu(tracer: Tracer, function: Any, x: Value, slope: Any) -> Value:
    below = apply(tracer, "neg", [apply(tracer, "relu", [apply(tracer, "neg", [x])])])
    return apply(tracer, "add", [apply(tracer, "relu", [x]), apply(tracer, "mul", [below, slope])])


@lowers("hardsigmoid", "hardswish")
def _hard(tracer: Tracer, function: Any, x: Value) -> Value:
    gate = scale(tracer, apply(tracer, "clamp", [scale(tracer, x, 1.0, 3.0)], (0.0, 6.0)), 1 / 6)
    return apply(tracer, "mul", [x, gate]) if function._schema.name == "aten::hardswish" else gate


@lowers("fill")
def _fill(tracer: Tracer, function: Any, x: View, value: Any) -> Value:
    if (number := number_of(value)) is None:
        raise ConversionError("it fills with something that is no number")
    shape = tuple(x.ids.shape)
    return View(tracer.network, tracer.view(torch.full(shape, number), shape, x.roles), x.roles)


@lowers("mish")
def _mish(tracer: Tracer, function: Any, x: Value) -> Value:
    return apply(tracer, "mul", [x, apply(tracer, "tanh", [apply(tracer, "softplus", [x], (1.0, 20.0))])])


@lowers("glu")
def _glu(tracer: Tracer, function: Any, x: View, dim: int = -1) -> Value:
    value, gate = x.moved(lambda each: each.chunk(2, dim))
    return apply(tracer, "mul", [value, apply(tracer, "sigmoid", [gate])])


def number_of(value: Any) -> float | None:
    """The number that an operand is everywhere."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1 and value.dim() == 0:
        return float(value)
    return None


def scale(tracer: Tracer, x: Any, factor: float, shift: float = 0.0) -> Value:
    """x factor + shift."""
    if not isinstance(x, View):
        return x.scaled(factor, shift)
    if factor == 1 and shift == 0:
        return x
    return apply(tracer, "scale", [x], (factor, shift))


@lowers("add", "sub")
def _add(tracer: Tracer, function: Any, a: Any, b: Any, alpha: float = 1) -> Value:
    sign = -float(alpha) if function._schema.name.startswith("aten::sub") else float(alpha)
    if (number := number_of(b)) is not None:
        return scale(tracer, a, 1.0, sign * number)
    if (number := number_of(a)) is not None:
        return scale(tracer, b, sign, number)
    for each, other in ((a, b), (b, a)):
        if hasattr(each, "masked"):
            return each.masked(other, sign)
    if abs(sign) != 1:
        b = scale(tracer, b, abs(sign)) if isinstance(b, View) else b * abs(sign)
    return apply(tracer, "add" if sign > 0 else "sub", [a, b])


@lowers("rsub")
def _rsub(tracer: Tracer, function: Any, a: Any, b: Any, alpha: float = 1) -> Value:
    return _add(tracer, function, b, a, -alpha)


@lowers("mul")
def _mul(tracer: Tracer, function: Any, a: Any, b: Any) -> Value:
    for each, other in ((a, b), (b, a)):
        if (number := number_of(other)) is not None:
            return scale(tracer, each, number)
        if hasattr(each, "weighed"):
            return each.weighed(other)
    return apply(tracer, "mul", [a, b])


@lowers("div")
def _div(tracer: Tracer, function: Any, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise ConversionError(f"its rounding_mode is {rounding_mode!r}, but expected None")
    if (number := number_of(b)) is not None:
        return scale(tracer, a, 1 / number)
    return apply(tracer, "div", [torch.full((), float(a)) if isinstance(a, (int, float)) else a, b])


@lowers("maximum", "minimum")
def _extreme(tracer: Tracer, function: Any, a: Any, b: Any) -> Value:
    return apply(tracer, function._schema.name.removeprefix("aten::"), [a, b])


@lowers("addcmul")
def _addcmul(tracer: Tracer, function: Any, a: Any, b: Any, c: Any, value: float = 1) -> Value:
    product = apply(tracer, "mul", [b, c])
    return apply(tracer, "add", [a, scale(tracer, product, float(value))])


@lowers("masked_fill")
def _masked_fill(tracer: Tracer, function: Any, x: Any, mask: Any, value: Any) -> Value:
    number = number_of(value)
    if not isinstance(mask, Tensor) or number is None:
        raise ConversionError("its mask depends on the sample, or its value is no number")
    if hasattr(x, "filled"):
        return x.filled(mask, number)
    return apply(tracer, "fill", [mask.to(torch.float32), x], (number,))


@lowers("where")
def _where(tracer: Tracer, function: Any, mask: Any, a: Any, b: Any) -> Value:
    if not isinstance(mask, Tensor):
        raise ConversionError("its mask depends on the sample")
    for each, other, filled in ((a, b, ~mask), (b, a, mask)):
        if (number := number_of(other)) is not None:
            return _masked_fill(tracer, function, each, filled, number)
        if hasattr(each, "filled"):
            raise ConversionError("scores of attention are replaced by other than a number")
    first = apply(tracer, "fill", [(~mask).float(), a], (0.0,)) if isinstance(a, View) else torch.where(mask, a, 0.0)
    second = apply(tracer, "fill", [mask.float(), b], (0.0,)) if isinstance(b, View) else torch.where(mask, 0.0, b)
    return apply(tracer, "add", [first, second])


@lowers("embedding")
def _embedding(tracer: Tracer, function: Any, table: Any, token: View, *args: Any) -> Value:
    if not isinstance(table, Tensor):
        raise ConversionError("its table depends on the condition")
    return look_up(tracer, table, token)


def look_up(tracer: Tracer, table: Tensor, token: View) -> View:
    """table[token], with the channels of the table as a last dimension."""
    arrangement = token.arrangement()
    (channels, source), *others = tracer.network.decode(arrangement.to_grid(token.ids))
    if others or source is None or len(channels) != 1:
        raise ConversionError("the tokens that it looks up are padded, or several at a place")
    node = Lookup(source, table.detach().cpu().numpy())
    field = tracer.network.add(node, table.shape[1], *arrangement.grid[1:])
    ids = [arrangement.from_grid(channel[None]) for channel in field.ids()]
    return View(tracer.network, torch.stack(ids, -1), arrangement.roles)


@lowers("scatter")
def _one_hot(tracer: Tracer, function: Any, zeros: Any, dim: int, index: Any, value: Any) -> Value:
    last = isinstance(zeros, Tensor) and dim in (-1, zeros.dim() - 1)
    if not last or not isinstance(index, View) or index.ids.shape[-1] != 1 or zeros.any() or number_of(value) is None:
        raise ConversionError("scatter is supported as one-hot codes along the last dimension alone")
    table = torch.eye(zeros.shape[-1]) * float(value)
    return look_up(tracer, table, View(tracer.network, index.ids[..., 0]))
