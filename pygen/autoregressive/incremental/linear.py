"""Lowering of convolutions, matrices, sums over channels and normalizations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pygen.autoregressive.incremental.fields import (
    Arrangement,
    Array,
    ConversionError,
    Linear,
    Network,
    Norm,
    Roles,
    Source,
    Tap,
)
from pygen.autoregressive.incremental.pointwise import apply
from pygen.autoregressive.incremental.tracing import Tracer, Unusable, Value, View, lowers


def constant(what: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ConversionError(f"its {what} depends on the sample or the condition")
    return value.detach().cpu()


@lowers("convolution")
def _convolution(
    tracer: Tracer, function: Any, x: View, weight: Any, bias: Any, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
) -> Value:  # fmt: skip
    kernel = constant("weight", weight)
    dimensions = kernel.dim() - 2
    if dimensions not in (1, 2):
        raise ConversionError(f"it has {dimensions} spatial dimensions, but expected 1 or 2")
    offset = constant("bias", bias).numpy() if bias is not None else None
    ids = x.ids
    if ids.dim() == dimensions + 1:
        ids = ids[None]
    if dimensions == 1:
        ids, kernel = ids[:, :, None], kernel[:, :, None]
        stride, padding, dilation, output_padding = [1, *stride], [0, *padding], [1, *dilation], [0, *output_padding]
    if ids.shape[0] != 1:
        raise ConversionError("it mixes the samples of a batch, or takes places for samples")
    taps_of = _transposed_axis if transposed else _axis
    size = [
        taps_of(n, k, s, p, d, o)
        for n, k, s, p, d, o in zip(
            ids.shape[2:], kernel.shape[2:], stride, padding, dilation, output_padding, strict=True
        )
    ]
    weights = _dense(kernel, groups, transposed).numpy()
    taps = []
    for channels, source in tracer.network.decode(ids[0]):
        if source is None:
            continue
        for ky, rows in enumerate(size[0]):
            for kx, columns in enumerate(size[1]):
                taps += _tap(source.with_maps(rows, columns), weights[:, channels, ky, kx])
    node = Linear(taps, np.zeros(len(weights)) if offset is None else offset)
    field = tracer.network.add(node, len(weights), len(size[0][0]), len(size[1][0]))
    out = field.ids()
    if dimensions == 1:
        out = out[:, 0]
    if x.ids.dim() == dimensions + 2:
        out = out[None]
    spatial = tuple(range(out.dim() - dimensions, out.dim()))
    return View(tracer.network, out, Roles(spatial[0] if dimensions == 2 else None, spatial[-1]))


def _axis(size: int, kernel: int, stride: int, padding: int, dilation: int, _: int) -> list[Array]:
    """For each tap the input place of each output place, -1 for none."""
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    places = [np.arange(outputs) * stride - padding + k * dilation for k in range(kernel)]
    return [np.where((at >= 0) & (at < size), at, -1) for at in places]


def _transposed_axis(size: int, kernel: int, stride: int, padding: int, dilation: int, extra: int) -> list[Array]:
    outputs = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1
    places = [np.arange(outputs) + padding - k * dilation for k in range(kernel)]
    return [
        np.where((at % stride == 0) & (at >= 0) & (at < size * stride), at // stride, -1) for at in places
    ]  # fmt: skip


def _dense(kernel: Tensor, groups: int, transposed: bool) -> Tensor:
    """(out channels, in channels, height, width), zero between groups."""
    if transposed:
        # (in, out / groups, ...): the groups lie along the inputs.
        parts = [part.transpose(0, 1) for part in kernel.chunk(groups)]
    else:
        parts = list(kernel.chunk(groups))
    if groups == 1:
        return parts[0]
    outputs, inputs = (sum(part.shape[d] for part in parts) for d in (0, 1))
    dense = kernel.new_zeros(outputs, inputs, *kernel.shape[2:])
    row = column = 0
    for part in parts:
        dense[row : row + part.shape[0], column : column + part.shape[1]] = part
        row, column = row + part.shape[0], column + part.shape[1]
    return dense


def _tap(source: Source, weight: Array) -> list[Tap]:
    """Without the channels that nothing reads; nothing where no site or no weight is left."""
    used = np.flatnonzero((weight != 0).any(0))
    if not len(used) or not (source.rows >= 0).any() or not (source.columns >= 0).any():
        return []
    return [Tap(source.only(used), weight[:, used])]


def site_product(tracer: Tracer, x: View, dimension: int, weight: Tensor, bias: Tensor | None) -> View:
    """weight (outputs, inputs) times the channels of x along one dimension, at each site."""
    dimension %= x.ids.dim()
    arrangement = x.arrangement()
    channels = [d for d in arrangement.channel_dimensions if x.ids.shape[d] > 1]
    if channels not in ([dimension], []):
        raise ConversionError("a matrix is multiplied with something else than the channels of a site")
    offset = np.zeros(weight.shape[0]) if bias is None else bias.numpy()
    return View(
        tracer.network,
        _product(tracer, x, arrangement, weight.numpy(), offset, {dimension: weight.shape[0]}),
        arrangement.roles,
    )


def _product(
    tracer: Tracer, x: View, arrangement: Arrangement, weight: Array, bias: Array, changed: dict[int, int]
) -> Tensor:
    """Identities of weight times all channels of a site plus bias, in x's shape but for the changed dimensions."""
    taps = []
    for channels, source in tracer.network.decode(arrangement.to_grid(x.ids)):
        if source is not None:
            taps += _tap(source, weight[:, channels])
    field = tracer.network.add(Linear(taps, bias), len(weight), *arrangement.grid[1:])
    shape = [changed.get(d, size) for d, size in enumerate(x.ids.shape)]
    return Arrangement(tuple(shape), arrangement.roles).from_grid(field.ids())


@lowers("mm")
def _mm(tracer: Tracer, function: Any, a: Any, b: Any) -> Value:
    if isinstance(a, View) and isinstance(b, Tensor):
        return site_product(tracer, a, 1, b.detach().cpu().T, None)
    if isinstance(b, View) and isinstance(a, Tensor):
        return site_product(tracer, b, 0, a.detach().cpu(), None)
    raise ConversionError("both of its matrices depend on the sample or the condition")


@lowers("addmm")
def _addmm(tracer: Tracer, function: Any, bias: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Value:
    if isinstance(a, View) and isinstance(b, Tensor) and isinstance(bias, Tensor) and beta == alpha == 1:
        return site_product(tracer, a, 1, b.detach().cpu().T, bias.detach().cpu().expand(b.shape[1]))
    product = _mm(tracer, function, a, b)
    return apply(tracer, "add", [product, bias])


@lowers("sum", "mean")
def _sum(
    tracer: Tracer, function: Any, x: Value, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Value:  # fmt: skip
    if not isinstance(x, View):
        return Unusable()  # as of the weights of attention that MultiheadAttention returns beside its output
    arrangement, dims = _over_channels(x, dim)
    count = arrangement.grid[0]
    weight = np.full((1, count), 1 / count if function._schema.name == "aten::mean" else 1.0)
    ids = _product(tracer, x, arrangement, weight, np.zeros(1), dict.fromkeys(dims, 1))
    return _kept(tracer, x, ids, dims, keepdim)


def _over_channels(x: View, dim: Any) -> tuple[Arrangement, list[int]]:
    """The dimensions that are reduced, which have to be all channels of a site."""
    dims = range(x.ids.dim()) if not dim and dim != 0 else [dim] if isinstance(dim, int) else dim
    dims = sorted(d % x.ids.dim() for d in dims)
    arrangement = x.arrangement()
    channels = [d for d in arrangement.channel_dimensions if x.ids.shape[d] > 1]
    spatial = [d for d in dims if d not in arrangement.channel_dimensions and x.ids.shape[d] > 1]
    if spatial:
        raise ConversionError("it is taken over places of the picture, which mixes what comes later into what is there")
    if [d for d in dims if x.ids.shape[d] > 1] != channels:
        raise ConversionError("it is taken over some of the channels; all or none can be converted")
    return arrangement, list(dims)


def _kept(tracer: Tracer, x: View, ids: Tensor, dims: list[int], keepdim: bool) -> View:
    if keepdim:
        return View(tracer.network, ids, x.roles)
    shape = [size for d, size in enumerate(ids.shape) if d not in dims]
    return View(tracer.network, ids.reshape(shape))


@lowers("var")
def _var(tracer: Tracer, function: Any, x: View, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> Value:
    if isinstance(correction, bool):  # the older overload: unbiased
        correction = int(correction)
    arrangement, dims = _over_channels(x, dim)
    count = arrangement.grid[0]
    changed = dict.fromkeys(dims, 1)

    def weighted(of: View, weight: float) -> View:
        ids = _product(tracer, of, of.arrangement(), np.full((1, count), weight), np.zeros(1), changed)
        return View(tracer.network, ids, of.roles)

    centred = apply(tracer, "sub", [x, weighted(x, 1 / count)])
    squares = apply(tracer, "mul", [centred, centred])
    freedom = count - (1 if correction is None else correction)
    ids = weighted(squares, 1 / freedom if freedom > 0 else math.inf).ids
    return _kept(tracer, x, ids, dims, keepdim)


@lowers("var_mean")
def _var_mean(tracer: Tracer, function: Any, x: View, dim: Any = None, **kwargs: Any) -> list[Value]:
    mean = torch.ops.aten.mean.dim
    return [_var(tracer, function, x, dim, **kwargs), _sum(tracer, mean, x, dim, bool(kwargs.get("keepdim", False)))]


@lowers("native_layer_norm")
def _layer_norm(
    tracer: Tracer, function: Any, x: View, shape: list[int], weight: Any, bias: Any, epsilon: float
) -> list[Value]:
    arrangement, _ = _over_channels(x, list(range(-len(shape), 0)))
    count = arrangement.grid[0]
    grid = arrangement.to_grid(x.ids)
    reads: list[Source] = []
    order: list[Array] = []
    for channels, source in tracer.network.decode(grid):
        reads.append(joined(tracer.network, [grid[channels]]) if source is None else source)
        order.append(channels)
    places = np.concatenate(order)
    gain, offset = (
        np.full(count, missing) if each is None else constant("weight", each).numpy().reshape(-1)
        for each, missing in ((weight, 1.0), (bias, 0.0))
    )
    field = tracer.network.add(Norm(reads, gain[places], offset[places], epsilon), count, *arrangement.grid[1:])
    ids = torch.empty_like(field.ids())
    ids[torch.from_numpy(places)] = field.ids()
    return [View(tracer.network, arrangement.from_grid(ids), arrangement.roles), None, None]


@lowers("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm")
def _batch_norm(
    tracer: Tracer, function: Any, x: View, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any
) -> list[Value]:
    *training, _, epsilon = rest
    if training not in ([], [False]):
        raise ConversionError("it normalizes over the batch: it has no running statistics, or is in training mode")
    statistics = [constant("running statistics", each).double() for each in (mean, variance)]
    gain = (statistics[1] + epsilon).rsqrt()
    if weight is not None:
        gain = gain * constant("weight", weight).double()
    shift = -statistics[0] * gain
    if bias is not None:
        shift = shift + constant("bias", bias).double()
    spatial = [1] * (x.ids.dim() - 2)
    scaled = apply(tracer, "mul", [x, gain.view(1, -1, *spatial)])
    outputs = len(function._schema.returns)
    return [apply(tracer, "add", [scaled, shift.view(1, -1, *spatial)]), *[None] * (outputs - 1)]


@lowers("native_group_norm", "_native_batch_norm_legit")
def _mixes_places(tracer: Tracer, function: Any, x: Any, *args: Any) -> Value:
    raise ConversionError("it normalizes over places of the picture, which mixes what comes later into what is there")


def joined(network: Network, grids: Sequence[Tensor]) -> Source:
    """A field of its own that holds the sum of what grids (channels, height, width) of identities show, in order."""
    channels, height, width = grids[0].shape
    taps = [
        Tap(source, np.eye(channels)[:, mine])
        for grid in grids
        for mine, source in network.decode(grid)
        if source is not None
    ]
    field = network.add(Linear(taps, np.zeros(channels)), channels, height, width)
    return Source(field, np.arange(channels), np.arange(height), np.arange(width))


def side_by_side(tracer: Tracer, grid: Tensor) -> Source:
    """What a grid of identities shows as a field whose channels are stored in its order."""
    decoded = tracer.network.decode(grid)
    if len(decoded) == 1 and decoded[0][1] is not None:
        source, channels = decoded[0][1], np.arange(grid.shape[0])
        if source.in_place and source.field.channels == len(channels) and (source.channels == channels).all():
            source.field.natural = True
            return source
    source = joined(tracer.network, [grid])
    source.field.natural = True
    return source
