"""The discretized mixture of logistics of PixelCNN++: the probability of a pixel's levels, and a sampler of them.

P(x) = sum_k pi_k prod_c (sigmoid(a_kc) - sigmoid(b_kc)), a, b = (x_c - m_kc +- 1 / (levels - 1)) e^{-s_kc}, where the
lowest level reaches down to -inf and the highest up to inf, and the means of a pixel's later colours depend on the
earlier ones. (Salimans et al. 2017, arXiv:1701.05517, section 2.1-2.2)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pygen import _native
from pygen.ops.noise import (
    DRAW_LIMIT,
    TOKEN_STREAM,
    check_address,
    check_number,
    philox_reference,
    plain_number,
    signed_seed,
    split_seed,
)
from pygen.ops.sampling_reference import uniform_of_words

MAX_MIXTURES = 128
MAX_LEVELS = 2**16
# Log scales are cut off here: below as in PixelCNN++, above where a logistic is flat across all levels.
LOG_SCALE_RANGE = (-7.0, 12.0)

_PER_MIXTURE = {1: 3, 3: 10}  # parameters by colours


def _split(parameters: Tensor, colours: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(n, count, ...) as logits (n, M, ...), and means, log scales and coefficients, (n, colours, M, ...) each."""
    mixtures = parameters.shape[1] // _PER_MIXTURE[colours]
    wide = parameters.to(torch.float64 if parameters.dtype == torch.float64 else torch.float32)
    logits, rest = wide[:, :mixtures], wide[:, mixtures:].unflatten(1, (colours, -1, mixtures))
    log_scales = rest[:, :, 1].clamp(*LOG_SCALE_RANGE)
    return logits, rest[:, :, 0], log_scales, rest[:, :, 2].tanh() if colours == 3 else None


def _means(means: Tensor, coefficients: Tensor | None, x: Tensor, colour: int) -> Tensor:
    """The means of a colour, (n, M, ...), given the earlier colours of x."""
    mean = means[:, colour]
    if colour == 0:
        return mean
    assert coefficients is not None
    if colour == 1:
        return mean + coefficients[:, 0] * x[:, :1]
    return mean + coefficients[:, 1] * x[:, :1] + coefficients[:, 2] * x[:, 1:2]


def _log_interval(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """log(sigmoid(a) - sigmoid(b)) = log sigmoid(a) + log sigmoid(-b) + log(1 - e^{b-a}), exact in both tails."""
    half = 1 / (levels - 1)
    inverse_scale = (-log_scale).exp()
    a, b = (x - mean + half) * inverse_scale, (x - mean - half) * inverse_scale
    lowest, highest = (x < half - 1).expand_as(a), (x > 1 - half).expand_as(a)
    within = (-torch.expm1(-2 * half * inverse_scale)).log()
    return (
        torch.where(highest, 0.0, logsigmoid(a))
        + torch.where(lowest, 0.0, logsigmoid(-b))
        + torch.where(lowest | highest, 0.0, within)
    )


def discretized_logistics_log_prob_reference(x: Tensor, parameters: Tensor, *, levels: int = 256) -> Tensor:
    """`discretized_logistics_log_prob` in plain PyTorch: its specification, its fallback, the oracle of its tests."""
    colours = x.shape[1]
    logits, means, log_scales, coefficients = _split(parameters, colours)
    value = x.to(logits.dtype)
    joint = logits.log_softmax(1)
    for c in range(colours):
        mean = _means(means, coefficients, value, c)
        joint = joint + _log_interval(value[:, c : c + 1], mean, log_scales[:, c], levels)
    return joint.logsumexp(1)


def level_log_prob(x: Tensor, parameters: Tensor, *, levels: int = 256) -> Tensor:
    """log P(level | the colours before it at the pixel) of every level, (n, colours, levels, ...), in nats.

    x, parameters: as for `discretized_logistics_log_prob`, whose sum over the colours this is at the levels of x. It is
    in plain PyTorch: for decoding that compares all levels, such as with a temperature.
    """
    _check_count(x.shape[1], parameters.shape[1], levels)
    colours, event = x.shape[1], (1,) * (x.dim() - 2)
    logits, means, log_scales, coefficients = _split(parameters, colours)
    value = x.to(logits.dtype)
    grid = torch.arange(levels, device=x.device, dtype=logits.dtype) * (2 / (levels - 1)) - 1
    joint, found = logits.log_softmax(1), []
    for c in range(colours):
        mean, log_scale = _means(means, coefficients, value, c), log_scales[:, c]
        every = _log_interval(grid.view(-1, 1, *event), mean[:, None], log_scale[:, None], levels)
        found.append((joint[:, None] + every).logsumexp(2) - joint.logsumexp(1, keepdim=True))
        joint = joint + _log_interval(value[:, c : c + 1], mean, log_scale, levels)
    return torch.stack(found, 1)


@_native.register_fake("discretized_logistics_forward")
def _forward_fake(x: Tensor, parameters: Tensor, levels: int) -> Tensor:
    dtype = torch.float64 if parameters.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], *x.shape[2:]), dtype=dtype)


@_native.register_fake("discretized_logistics_backward")
def _backward_fake(x: Tensor, parameters: Tensor, grad: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, parameters))  # type: ignore[return-value]


class _LogProb(torch.autograd.Function):
    """Saves x and the parameters, nothing of the components."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, levels: int) -> Tensor:
        kernels = _native.kernels_for(x)
        assert kernels is not None
        ctx.levels = levels
        ctx.save_for_backward(x, parameters)
        log_prob: Tensor = kernels.discretized_logistics_forward(x, parameters, levels)
        return log_prob

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, parameters = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: the first one from differentiable operations
            leaves = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (x, parameters)]
            log_prob = discretized_logistics_log_prob_reference(*leaves, levels=ctx.levels)
            return *torch.autograd.grad(log_prob, leaves, grad, create_graph=True), None
        kernels = _native.kernels_for(x)
        assert kernels is not None
        return *kernels.discretized_logistics_backward(x, parameters, grad, ctx.levels), None


def discretized_logistics_log_prob(x: Tensor, parameters: Tensor, *, levels: int = 256) -> Tensor:
    """log P of each pixel of a picture under a discretized mixture of logistics, summed over its colours.

    Args:
        x: (n, colours, ...), colours 1 or 3, values 2 k / (levels - 1) - 1 in [-1, 1]; float32, float64, bfloat16 or
            float16, any strides. Values between levels count as the middle of a cell of the same width.
        parameters: (n, 10 M, ...) of three colours, [M logits | for each colour M means, M log scales, M coefficients],
            as PixelCNN++'s networks give them: tanh of the coefficients times the colours before moves the means (red
            to green, red to blue, green to blue). (n, 3 M, ...) of one colour, [M logits | M means | M log scales]. M
            is 1 to 128; any floating dtype, any strides. Log scales count as -7 below that, and as 12 above
            that, and have no gradient there.
        levels: number of levels of a colour, 2 to 65,536.

    Returns:
        log P in nats, (n, ...), float32 (float64 for float64 parameters). The probabilities of all levels of a pixel
        add to 1, in both tails: where PixelCNN++'s loss takes the density for a small difference of two sigmoids, this
        has its logarithm. Gradients go to the parameters and to x; forward and backward need no memory for the
        components. NaN in gives NaN out in that pixel only.

    Raises:
        ValueError: for shapes that do not fit, another number of colours, or levels out of range.
        TypeError: for a dtype that is not floating.
    """
    _check_floating("x", x)
    _check_floating("parameters", parameters)
    if (
        x.dim() < 2
        or parameters.dim() != x.dim()
        or x.shape[:1] + x.shape[2:] != parameters.shape[:1] + parameters.shape[2:]
    ):
        raise ValueError(
            f"parameters has shape {tuple(parameters.shape)}, but expected that of x, {tuple(x.shape)}, but for the "
            "number of channels"
        )
    if parameters.device != x.device:
        raise ValueError(f"parameters is on {parameters.device}, but expected x's {x.device}")
    _check_count(x.shape[1], parameters.shape[1], levels)
    kernels = _native.kernels_for(x)
    if kernels is None:
        return discretized_logistics_log_prob_reference(x, parameters, levels=levels)
    if _native.wants_gradient(x, parameters):
        result: Tensor = _LogProb.apply(x, parameters, levels)  # type: ignore[no-untyped-call]
        return result
    log_prob: Tensor = kernels.discretized_logistics_forward(x, parameters, levels)
    return log_prob


def sample_discretized_logistics_reference(
    parameters: Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    position: int | Tensor,
    colours: int = 3,
    levels: int = 256,
    x: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_discretized_logistics` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    seed, position = plain_number("seed", seed), plain_number("position", position)
    seeds = seed if isinstance(seed, Tensor) else sample_ids.new_tensor(signed_seed(seed))
    positions = position if isinstance(position, Tensor) else sample_ids.new_tensor(position)
    logits, means, log_scales, coefficients = _split(parameters, colours)
    drawn = logits.new_zeros(len(logits), colours)
    log_probs = []
    joint, before = logits, logits.logsumexp(1)
    for c in range(colours):
        words = philox_reference(seeds, sample_ids, TOKEN_STREAM, positions + c, torch.zeros_like(sample_ids))
        u = uniform_of_words(words[:, :2]).to(logits.dtype)
        weight = (joint - before[:, None]).exp()
        passed = weight.cumsum(1) > u[:, None]
        # The last component that has any weight, should rounding leave u above their sum.
        last = weight.shape[1] - 1 - (weight > 0).flip(1).int().argmax(1)
        chosen = torch.where(passed.any(1), passed.int().argmax(1), last)[:, None]
        v = uniform_of_words(words[:, 2:])
        noise = v.to(logits.dtype).log() - (1 - v).to(logits.dtype).log()
        mean = _means(means, coefficients, drawn, c)
        value = mean.gather(1, chosen)[:, 0] + log_scales[:, c].gather(1, chosen)[:, 0].exp() * noise
        level = ((value.clamp(-1, 1) + 1) * (0.5 * (levels - 1))).round()
        value = torch.where(before.isnan(), math.nan, level * (2 / (levels - 1)) - 1)
        if x is not None and known is not None:
            value = torch.where(known[:, c], x[:, c], value)
        drawn = drawn.index_copy(1, torch.tensor([c], device=drawn.device), value[:, None])
        joint = joint + _log_interval(value[:, None], mean, log_scales[:, c], levels)
        after = joint.logsumexp(1)
        log_probs.append(after - before)
        before = after
    return drawn, torch.stack(log_probs, 1)


@_native.register_fake("discretized_logistics_sample")
def _sample_fake(
    parameters: Tensor, sample_ids: Tensor, seed: int, seeds: Tensor | None, position: int, positions: Tensor | None,
    colours: int, levels: int, x: Tensor | None, known: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.float64 if parameters.dtype == torch.float64 else torch.float32
    drawn = parameters.new_empty((parameters.shape[0], colours), dtype=dtype)
    return drawn, torch.empty_like(drawn)


def sample_discretized_logistics(
    parameters: Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    position: int | Tensor,
    colours: int = 3,
    levels: int = 256,
    x: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one pixel per row from a discretized mixture of logistics, colour by colour.

    A colour's component is drawn by its weight given the colours before, then its value, rounded to the nearest level,
    which is the distribution of `discretized_logistics_log_prob`. Colour c takes its two numbers from (seed, sample id,
    position + c): a pixel drawn at once, or one colour at a time with those before as `known`, is the same.

    Args:
        parameters: (n, 10 M) of three colours or (n, 3 M) of one, see `discretized_logistics_log_prob`.
        seed: an int of at most 64 bits, or an int64 tensor, () or (n,).
        sample_ids: int64 (n,), which sample each row belongs to.
        position: which of the sample's elements the pixel's first colour is, 0 .. 2^30 - 1, or an int64 tensor, () or
            (n,), of which the lower 30 bits count.
        colours: 1 or 3.
        levels: number of levels of a colour, 2 to 65,536.
        x, known: (n, colours), values on the levels and bool: colours that are given, where known is True.

    Returns:
        The pixels, (n, colours), values 2 k / (levels - 1) - 1 in float32 (float64 for float64 parameters), and the
        log-probability in nats of each colour, given or drawn, given those before, (n, colours). NaN for a row whose
        parameters are NaN. There is no gradient.

    Raises:
        ValueError: for shapes or devices that do not fit, x without known, or numbers out of range.
        TypeError: for parameters that are not floating, ids that are not int64, or a `known` that is not bool.
    """
    _check_floating("parameters", parameters)
    if parameters.dim() != 2:
        raise ValueError(f"parameters has shape {tuple(parameters.shape)}, but expected (n, parameters)")
    _check_count(colours, parameters.shape[1], levels)
    seed, position = plain_number("seed", seed), plain_number("position", position)
    check_address(sample_ids, seed, 0)
    check_number("position", position, sample_ids, 0, DRAW_LIMIT)
    if sample_ids.shape != parameters.shape[:1]:
        raise ValueError(f"sample_ids has shape {tuple(sample_ids.shape)}, but expected ({parameters.shape[0]},)")
    if sample_ids.device != parameters.device:
        raise ValueError(f"sample_ids is on {sample_ids.device}, but expected {parameters.device}")
    x = _check_known(parameters, colours, x, known)
    parameters = parameters.detach()
    kernels = _native.kernels_for(parameters)
    if kernels is None:
        return sample_discretized_logistics_reference(
            parameters, seed=seed, sample_ids=sample_ids, position=position, colours=colours, levels=levels, x=x,
            known=known,
        )  # fmt: skip
    seed, seeds = split_seed(seed)
    position, positions = (0, position) if isinstance(position, Tensor) else (position, None)
    drawn, log_prob = kernels.discretized_logistics_sample(
        parameters, sample_ids, seed, seeds, position, positions, colours, levels, x, known
    )
    return drawn, log_prob


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}, but expected float32, float64, bfloat16 or float16")


def _check_count(colours: int, count: int, levels: int) -> None:
    if colours not in _PER_MIXTURE:
        raise ValueError(f"x has {colours} colours, but expected 1 or 3")
    each = _PER_MIXTURE[colours]
    if count % each or not 1 <= count // each <= MAX_MIXTURES:
        raise ValueError(
            f"parameters has {count} values for a pixel, but expected {each} for each of 1 to {MAX_MIXTURES} mixtures"
        )
    if not 2 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels is {levels}, but expected 2 to {MAX_LEVELS}")


def _check_known(parameters: Tensor, colours: int, x: Tensor | None, known: Tensor | None) -> Tensor | None:
    """x in the dtype of the samples; raises what is wrong with it and with `known`."""
    if (x is None) != (known is None):
        raise ValueError("x and known come together, but there is only one of them")
    if x is None or known is None:
        return None
    expected = (parameters.shape[0], colours)
    for name, tensor in (("x", x), ("known", known)):
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but expected {expected}")
        if tensor.device != parameters.device:
            raise ValueError(f"{name} is on {tensor.device}, but expected {parameters.device}, where parameters is")
    if known.dtype != torch.bool:
        raise TypeError(f"known has dtype {known.dtype}, but expected torch.bool")
    return x.detach().to(torch.float64 if parameters.dtype == torch.float64 else torch.float32)
