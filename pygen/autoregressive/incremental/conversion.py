"""`incremental(model)`: from a network that scores all elements at once to one that is given them one by one.

Each activation of a causal network depends on some first elements of the sample, so that it can be computed once, when
these are drawn, and kept while it is read: sampling then costs one pass. (Ramachandran et al. 2017, arXiv:1704.06001)
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Each registers what it lowers.
from pygen.autoregressive.incremental import attention, indexing, linear, pointwise  # noqa: F401
from pygen.autoregressive.incremental.converted import Incremental
from pygen.autoregressive.incremental.encoding import Encoder
from pygen.autoregressive.incremental.fields import ConversionError, NotSeparable
from pygen.autoregressive.incremental.fusion import fuse
from pygen.autoregressive.incremental.schedule import Draw, Geometry, Schedule
from pygen.autoregressive.incremental.tracing import Traced, evaluation, trace

_lock = threading.RLock()


def incremental(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    levels: int,
    condition: Tensor | None = None,
    forward: Callable[..., Tensor] | None = None,
    values: Tensor | None = None,
    logistics: bool = False,
    verify: bool = True,
    device: torch.device | str | None = None,
) -> Incremental:
    """Convert a masked convolutional network, as it is, into one that draws element after element.

    The network is run once on an example, and what it does to every element is followed: convolutions of any stride,
    dilation and grouping, transposed ones, matrices over channels, shifts, pads, slices, concatenations, nearest
    upsampling, pointwise functions, normalization over the channels of a site, batch normalization in evaluation, and
    attention with a causal mask. Masks and weight normalization are folded into the weights as they are now: after a
    training step, convert anew.

    Args:
        model: the network; it is put into evaluation mode while it is converted.
        shape: of a sample without the batch: (channels, height, width), (channels, length), or (length,).
        levels: how many values an element can have.
        condition: an example of what the network is given beside the sample, with a batch of one, such as a label;
            None where it is given nothing.
        forward: forward(x) or forward(x, condition) gives the outputs; `model` itself if None. x is (n, *shape), with
            the elements' values; int64 tokens where `values` are int64. Outputs are the logits of every element:
            (n, channels, levels, height, width), (n, channels * levels, height, width), (n, channels * levels, length)
            or (n, elements, levels); another order is brought into one of these by `forward`.
        values: (levels,), what x is for each level; 2 k / (levels - 1) - 1 if None.
        logistics: outputs are instead the parameters of a discretized mixture of logistics for each pixel, (n, 10 * M,
            height, width) for 3 channels and (n, 3 * M, height, width) for 1 (see `ops.sample_discretized_logistics`).
        verify: compare outputs with those of the network on random samples, of which some differ from some element
            on: those before it have to stay the same.
        device: where samples are drawn; where the network is, if None.

    Elements are numbered in the order in which they are drawn: (row * width + column) * channels + channel.

    Raises:
        ConversionError: (a ValueError) for a network that is not causal, naming the output and the later element that
            it depends on; for a module with an operation that is not supported, naming both; for outputs of another
            shape; where verification fails; for parameters in 16 bits; and for a parameter that is not finite, where
            that is what made it fail.
    """
    if not 1 <= len(shape) <= 3 or min(shape) < 1:
        raise ValueError(f"shape is {tuple(shape)}, but expected 1 to 3 positive sizes")
    if levels < 1:
        raise ValueError(f"levels is {levels}, but expected at least 1")
    if values is None:
        values = torch.arange(levels).float() * (2 / max(levels - 1, 1)) - 1
    if values.shape != (levels,):
        raise ValueError(f"values has shape {tuple(values.shape)}, but expected ({levels},)")
    if condition is not None and (condition.dim() == 0 or len(condition) != 1):
        raise ValueError(f"condition has shape {tuple(condition.shape)}, but expected (1, ...): an example for one")
    channels, height, width = (*(1,) * (3 - len(shape)), *shape) if len(shape) < 2 else (
        shape[0], *(1,) * (3 - len(shape)), *shape[1:]
    )  # fmt: skip
    picture = Geometry(channels, height, width)
    call = forward or model
    parameter = next(iter([*model.parameters(), *model.buffers()]), torch.zeros(()))
    if parameter.dtype in (torch.float16, torch.bfloat16):
        raise ConversionError(
            f"the network's parameters are {parameter.dtype}, but expected float32 or float64, as model.float() makes "
            "them"
        )
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    own = values if values.dtype == torch.int64 else values.to(dtype)
    example = own.to(parameter.device)[torch.arange(picture.length, device=parameter.device) % levels]

    def follow(geometry: Geometry) -> tuple[Traced, list[Draw], bool]:
        places = torch.arange(picture.length).view(channels, height, width)
        if geometry is not picture:
            places = places.permute(1, 2, 0).reshape(1, 1, -1)
        traced = trace(model, call, example.reshape(1, *shape), condition, places)
        return traced, *_draws(traced, picture, geometry, levels, logistics)

    def follow_either() -> tuple[Geometry, Traced, list[Draw], bool]:
        try:
            return picture, *follow(picture)
        except NotSeparable as error:
            # It may flatten the picture first, to read it as a sequence; if not, the first reason is the reason.
            sequence = Geometry(1, 1, picture.length)
            try:
                return sequence, *follow(sequence)
            except NotSeparable:
                raise error from None

    # What a network keeps, and what PyTorch is told while it is followed, is the process's: one at a time.
    with _lock:
        try:
            geometry, traced, draws, levels_first = follow_either()
            fields = fuse(traced.network.fields, [draw.source for draw in draws])
            encoded = Encoder(Schedule(fields, draws, geometry), len(draws[0].source.channels), dtype).encode()
            converted = Incremental(
                encoded, traced.tape, tuple(shape), picture, values,
                None if condition is None else tuple(condition.shape[1:]), levels if logistics else 0,
                parameter.device, parameter.device if device is None else torch.device(device), dtype,
            )  # fmt: skip
            if verify:
                _verify(model, call, converted, condition, levels_first)
        except ConversionError as error:
            broken = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
            if broken:
                raise ConversionError(f"{broken[0]} is not finite, and what a mask multiplies by 0 is NaN") from error
            raise
    return converted


def _draws(
    traced: Traced, picture: Geometry, geometry: Geometry, levels: int, logistics: bool
) -> tuple[list[Draw], bool]:
    """Where the outputs for each channel of the sample are read; and whether, of a sequence with as many levels as
    elements, levels come first."""
    if tuple(traced.output.ids.shape) == (1, picture.length, picture.length) and levels == picture.length:
        with contextlib.suppress(NotSeparable):
            return _draws_of(traced, picture, geometry, levels, logistics, True), True
    return _draws_of(traced, picture, geometry, levels, logistics, False), False


def _draws_of(
    traced: Traced, picture: Geometry, geometry: Geometry, levels: int, logistics: bool, levels_first: bool
) -> list[Draw]:
    ids = _by_element(traced.output.ids, picture, levels, logistics, levels_first)
    grid = ids.view(geometry.height, geometry.width, geometry.channels, -1).permute(2, 3, 0, 1)
    draws = []
    for channel, outputs in enumerate(grid):
        decoded = traced.network.decode(outputs)
        if len(decoded) > 1 or decoded[0][1] is None:
            draws.append(Draw(linear.joined(traced.network, [outputs]), channel))
        else:
            draws.append(Draw(decoded[0][1], channel))
    return draws


def _by_element(ids: Tensor, picture: Geometry, levels: int, logistics: bool, levels_first: bool = False) -> Tensor:
    """Outputs of every element in the order of the elements: (elements, outputs)."""
    channels, height, width = picture.channels, picture.height, picture.width
    shape, sites = tuple(ids.shape), height * width
    expected = "(1, elements, levels), (1, channels, levels, height, width) or (1, channels * levels, height, width)"
    if logistics:
        per_mixture = {1: 3, 3: 10}.get(channels)
        if per_mixture is None:
            raise ConversionError(f"the sample has {channels} channels, but a mixture of logistics is for 1 or 3")
        flat = ids.reshape(shape[1], -1) if len(shape) >= 3 and shape[0] == 1 else ids
        if flat.dim() == 2 and flat.shape[1] == sites and flat.shape[0] % per_mixture == 0:
            return flat.T[:, None].expand(sites, channels, -1).reshape(picture.length, -1)
        expected = f"(1, {per_mixture} * mixtures, height, width)"
    elif shape == (1, picture.length, levels):
        return ids[0].T if levels_first else ids[0]
    elif len(shape) >= 3 and shape[0] == 1 and math.prod(shape) == picture.length * levels:
        if shape[1] == channels * levels or shape[1:3] == (channels, levels):
            return ids.reshape(channels, levels, sites).permute(2, 0, 1).reshape(picture.length, levels)
        if shape[1:] == (levels, picture.length):
            return ids[0].T
    raise ConversionError(
        f"the network's output has shape {shape} for one sample of {channels} channels, {height} rows, {width} "
        f"columns and {levels} levels, but expected {expected}"
    )


@torch.no_grad()
def _verify(
    model: nn.Module, call: Callable[..., Tensor], converted: Incremental, condition: Tensor | None, levels_first: bool
) -> None:
    """ConversionError unless the outputs are the network's own, and those before a change do not change."""
    length = converted.length
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randint, converted.levels, (length,), generator=generator)
    tokens, other = draw(), draw()
    cuts = (length // 3, 2 * length // 3)
    changed = [torch.where(torch.arange(length) < cut, tokens, other) for cut in cuts]
    rows = torch.stack([tokens, *changed])
    conditions = None if condition is None else condition.expand(len(rows), *condition.shape[1:])
    # One by one, as a network may have kept something of the size of its first batch.
    with evaluation(model):
        x = converted.pictures(rows).to(converted.traced_on)
        outputs = torch.cat([
            call(x[i : i + 1]) if conditions is None else call(x[i : i + 1], conditions[i : i + 1])
            for i in range(len(rows))
        ])  # fmt: skip
        another = None if condition is None else _another(call, x[:1], condition)
        if another is not None and conditions is not None:
            rows, conditions = torch.cat((rows, rows[:1])), torch.cat((conditions, another[0]))
            outputs = torch.cat((outputs, another[1]))
    logistics = converted.logistics > 0
    expected = torch.stack([
        _by_element(output[None], converted.geometry, converted.levels, logistics, levels_first)
        for output in outputs.cpu()
    ]).to(converted.dtype)  # fmt: skip
    tolerance = 1e-5 * max(1.0, float(expected.nan_to_num(0, 0, 0).abs().max()))
    for cut, row in zip(cuts, expected[1:], strict=False):
        moved = _difference(row[: cut + 1], expected[0, : cut + 1]).amax(1) > tolerance
        if moved.any():
            raise ConversionError(
                f"the network is not causal: its outputs for element {int(moved.nonzero()[0])} change with the "
                f"elements from {cut} on"
            )
    try:
        found = converted.logits(rows, condition=conditions).cpu()
    except (IndexError, RuntimeError) as error:
        raise ConversionError(
            "the converted network fails under another condition: the network computes something that depends on the "
            "values of its condition"
        ) from error
    worst = _difference(found, expected).amax(2)
    bad = ~(worst <= tolerance)
    if bad.any():
        element, other_condition = int(bad.any(0).nonzero()[0]), not bad[:3].any()
        raise ConversionError(
            f"the converted network's outputs differ from the network's by {float(worst.max()):.2g}, first for element "
            f"{element}{' under another condition' if other_condition else ''}: it computes something that depends on "
            f"the values of its {'condition' if other_condition else 'input, or rounds to a narrower dtype'}"
        )


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, where equal infinities do not differ, as the logits of a forbidden level."""
    return torch.where(a == b, 0.0, (a - b).abs())


def _another(call: Callable[..., Tensor], x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor] | None:
    """A condition other than the example, and the outputs under it; None where the network takes no other that can be
    guessed."""
    if condition.is_floating_point():
        other = condition + 1
    elif (condition != 0).any():
        other = torch.zeros_like(condition)
    elif condition.dtype == torch.int64 and condition.device.type == "cpu":
        other = condition + 1  # which, on a GPU, must not be beyond the end of a table
    else:
        return None
    try:
        return other, call(x, other)
    except (IndexError, RuntimeError):
        return None
