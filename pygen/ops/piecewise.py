"""Monotone splines of piecewise polynomials, linear, quadratic and cubic: forward, inverse and log-determinant in one
pass. (Mueller et al. 2019, Neural Importance Sampling, arXiv:1808.03856; Durkan et al. 2019, Cubic-Spline Flows,
arXiv:1906.02145; the formulas are in piecewise_reference.py)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pygen import _native
from pygen.ops.arguments import arithmetic_dtype, expand
from pygen.ops.piecewise_reference import Spline, counts, evaluate

MIN_BINS, MAX_BINS = 2, 128
# By degree.
NAMES = {
    1: ("densities",),
    2: ("widths", "heights"),
    3: ("widths", "heights", "left derivative", "right derivative"),
}


def linear_spline_reference(
    x: Tensor, parameters: Tensor | Sequence[Tensor], *, inverse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """`linear_spline` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    return evaluate(x, *_settle(1, x, parameters, **options), inverse)


def quadratic_spline_reference(
    x: Tensor, parameters: Tensor | Sequence[Tensor], *, inverse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """`quadratic_spline` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    return evaluate(x, *_settle(2, x, parameters, **options), inverse)


def cubic_spline_reference(
    x: Tensor, parameters: Tensor | Sequence[Tensor], *, inverse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """`cubic_spline` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    return evaluate(x, *_settle(3, x, parameters, **options), inverse)


@_native.register_fake("piecewise_spline_forward")
@_native.register_fake("piecewise_spline_inverse")
def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    ladj = x.new_empty(x.shape[: x.dim() - arguments[-1]], dtype=arithmetic_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), ladj


@_native.register_fake("piecewise_spline_backward")
def _backward_fake(x: Tensor, parameters: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    dtypes = {part.dtype for part in parameters}
    count = sum(part.shape[-1] for part in parameters)
    grad_parameters = x.new_empty((*x.shape, count), dtype=dtypes.pop() if len(dtypes) == 1 else arithmetic_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), grad_parameters


def _backward_reference(
    x: Tensor, parts: Sequence[Tensor], grad_output: Tensor, grad_ladj: Tensor, spline: Spline, inverse: bool
) -> tuple[Tensor, ...]:
    """The first derivative from differentiable operations, for second derivatives."""

    def transform(x: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(x, parts, spline, inverse)

    dtype = arithmetic_dtype(x)
    _, pull = torch.func.vjp(  # type: ignore[misc]  # annotated for an auxiliary output as well
        transform, x.to(dtype), *(part.to(dtype) for part in parts)
    )
    grad_input, *grads = pull((grad_output.to(dtype), grad_ladj.to(dtype)))
    return grad_input.to(x.dtype), *(grad.to(part.dtype) for grad, part in zip(grads, parts, strict=True))


def _kernel(kernels: Any, inverse: bool) -> Any:
    return kernels.piecewise_spline_inverse if inverse else kernels.piecewise_spline_forward


class _Piecewise(torch.autograd.Function):
    """Saves its input and the parameters, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spline: Spline, inverse: bool, *parts: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = _kernel(_native.kernels_for(x), inverse)(x, parts, *spline)
        ctx.spline, ctx.inverse = spline, inverse
        ctx.save_for_backward(x, *parts)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        x, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _backward_reference(x, parts, grad_output, grad_ladj, ctx.spline, ctx.inverse)
            return grads[0], None, None, *grads[1:]
        kernels = _native.kernels_for(x)
        assert kernels is not None
        grad_input, packed = kernels.piecewise_spline_backward(
            x, parts, grad_output, grad_ladj, *ctx.spline, ctx.inverse
        )
        grads = packed.split([part.shape[-1] for part in parts], -1)
        return grad_input, None, None, *(grad.to(part.dtype) for grad, part in zip(grads, parts, strict=True))


def _transform(x: Tensor, parts: tuple[Tensor, ...], spline: Spline, inverse: bool) -> tuple[Tensor, Tensor]:
    kernels = _native.kernels_for(x)
    if kernels is None:
        return evaluate(x, parts, spline, inverse)
    if _native.wants_gradient(x, *parts):
        y, ladj = _Piecewise.apply(x, spline, inverse, *parts)  # type: ignore[no-untyped-call]
        return y, ladj
    y, ladj = _kernel(kernels, inverse)(x, parts, *spline)
    return y, ladj


def linear_spline(
    x: Tensor,
    parameters: Tensor | Sequence[Tensor],
    *,
    inverse: bool = False,
    tails: str | None = None,
    domain: tuple[float, float] = (0.0, 1.0),
    image: tuple[float, float] | None = None,
    scale: float = 1.0,
    event_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    """Map x elementwise through piecewise linear splines of K bins of one width, and sum the log-determinant over the
    event dimensions in the same pass. (Mueller et al. 2019, Neural Importance Sampling, arXiv:1808.03856, section 4.1)

    Args:
        x: (*batch, *event), float32, float64, bfloat16 or float16, any strides.
        parameters: the unconstrained density of each of K bins (2 to 128): (*x.shape, K), or a tuple of this tensor
            alone. Broadcastable to this shape, any floating dtype, any strides. The bins' shares of the image are their
            softmax, none below the square of the arithmetic's rounding.
        inverse: map y to x.
        tails: what is outside of the domain. None: the spline goes on straight with its end slopes. "linear": the
            identity, which the slope inside need not meet.
        domain: (left, right) of the spline.
        image: (bottom, top); the domain where left out. Only without tails, where outside is not the identity.
        scale: factor of the unconstrained parameters, such as 1 / sqrt(hidden features).
        event_dims: how many of the last dimensions the log-determinant is summed over.

    Returns:
        The transformed tensor, with x's shape and dtype, contiguous, and ladj (*batch) in nats of the direction taken,
        float32 (float64 for float64 x). Arithmetic is in float32 (float64 for float64). NaN in gives NaN in that
        element and row only; any finite parameters, and any finite x inside of the domain or in tails, give finite
        results and gradients. Without tails so does x outside, as long as the straight line there and its derivative by
        the end's slope s, |x| / s^2 going back, are in the arithmetic's range. In float16 what exceeds 65504 becomes
        infinite, gradients too, as loss scaling expects.

    Raises:
        ValueError: for parameters whose number or shape does not fit, bins outside 2 .. 128, bounds that are not
            increasing, an image beside tails, unknown tails, a scale that is not positive, or event_dims outside
            0 .. x.dim().
        TypeError: for a dtype that is not floating.
    """
    parts, spline = _settle(
        1, x, parameters, tails=tails, domain=domain, image=image, scale=scale, event_dims=event_dims
    )
    return _transform(x, parts, spline, inverse)


def quadratic_spline(
    x: Tensor,
    parameters: Tensor | Sequence[Tensor],
    *,
    inverse: bool = False,
    tails: str | None = None,
    domain: tuple[float, float] = (0.0, 1.0),
    image: tuple[float, float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    smooth_ends: bool = False,
    scale: float = 1.0,
    event_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    """Map x elementwise through piecewise quadratic splines, of continuous slope, and sum the log-determinant over
    the event dimensions in the same pass. (Mueller et al. 2019, Neural Importance Sampling,
    arXiv:1808.03856, section 4.2)

    Args:
        x: (*batch, *event), float32, float64, bfloat16 or float16, any strides.
        parameters: the unconstrained parameters of K bins (2 to 128) for each element: widths of the bins, and heights
            of the slope at the knots, packed as (*x.shape, P) = [K | K + 1], or a tuple of two tensors. K - 1 heights,
            of the inner knots, with tails="linear". Broadcastable to these shapes, any floating dtypes, any strides.
        inverse: map y to x.
        tails: what is outside of the domain. None: the spline goes on straight with its end slopes. "linear": the
            identity, with end slopes near 1.
        domain: (left, right) of the spline.
        image: (bottom, top); the domain where left out. Only without tails, where outside is not the identity.
        min_bin_width: least share of the domain that a bin takes.
        min_bin_height: least slope in the unit square. Both count as the rounding of the arithmetic's dtype where they
            are smaller, so that no bin has zero size.
        smooth_ends: with tails="linear", make the end slopes 1, so that equal parameters are the identity. Where False
            they are nflows', which counts half of the end bins' area and misses 1.
        scale: factor of the unconstrained parameters, such as 1 / sqrt(hidden features).
        event_dims: how many of the last dimensions the log-determinant is summed over.

    Returns:
        The transformed tensor, with x's shape and dtype, contiguous, and ladj (*batch) in nats of the direction taken,
        float32 (float64 for float64 x). Arithmetic is in float32 (float64 for float64). NaN in gives NaN in that
        element and row only; any finite parameters, and any finite x inside of the domain or in tails, give finite
        results and gradients. Without tails so does x outside, as long as the straight line there and its derivative by
        the end's slope s, |x| / s^2 going back, are in the arithmetic's range. In float16 what exceeds 65504 becomes
        infinite, gradients too, as loss scaling expects.

    Raises:
        ValueError: for parameters whose number or shape does not fit, bins outside 2 .. 128, minimum sizes that leave
            no room, bounds that are not increasing, an image or no tails beside what needs the other, unknown tails, a
            scale that is not positive, or event_dims outside 0 .. x.dim().
        TypeError: for a dtype that is not floating.
    """
    parts, spline = _settle(
        2, x, parameters, tails=tails, domain=domain, image=image, min_bin_width=min_bin_width,
        min_bin_height=min_bin_height, smooth_ends=smooth_ends, scale=scale, event_dims=event_dims,
    )  # fmt: skip
    return _transform(x, parts, spline, inverse)


def cubic_spline(
    x: Tensor,
    parameters: Tensor | Sequence[Tensor],
    *,
    inverse: bool = False,
    tails: str | None = None,
    domain: tuple[float, float] = (0.0, 1.0),
    image: tuple[float, float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    scale: float = 1.0,
    event_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    """Map x elementwise through monotone piecewise cubic splines, and sum the log-determinant over the event dimensions
    in the same pass. (Durkan et al. 2019, Cubic-Spline Flows, arXiv:1906.02145; Steffen 1990, eq. 11)

    The inverse finds the root inside the known bin by bracketed steps, a fixed number that gives all digits; its
    gradients are those of the implicit function at the solution.

    Args:
        x: (*batch, *event), float32, float64, bfloat16 or float16, any strides.
        parameters: the unconstrained parameters of K bins (2 to 128) for each element: widths, heights, and the slopes
            at the left and right end, packed as (*x.shape, 2 K + 2) = [K | K | 1 | 1], or a tuple of four tensors.
            Broadcastable to these shapes, any floating dtypes, any strides. The end slopes are 3 sigmoid(u) h / w
            of their bins, sigmoid(u) no less than the rounding of the arithmetic's dtype; the others follow from the
            bins.
        inverse: map y to x.
        tails: what is outside of the domain. None: the spline goes on straight with its end slopes. "linear": the
            identity, which the slope inside need not meet.
        domain: (left, right) of the spline.
        image: (bottom, top); the domain where left out. Only without tails, where outside is not the identity.
        min_bin_width, min_bin_height: least share of the domain and the image that a bin takes. They count as the
            rounding of the arithmetic's dtype where they are smaller, so that no bin has zero size.
        scale: factor of the unconstrained widths and heights, such as 1 / sqrt(hidden features).
        event_dims: how many of the last dimensions the log-determinant is summed over.

    Returns:
        The transformed tensor, with x's shape and dtype, contiguous, and ladj (*batch) in nats of the direction taken,
        float32 (float64 for float64 x). Arithmetic is in float32 (float64 for float64). NaN in gives NaN in that
        element and row only; any finite parameters, and any finite x inside of the domain or in tails, give finite
        results and gradients. Without tails so does x outside, as long as the straight line there and its derivative by
        the end's slope s, |x| / s^2 going back, are in the arithmetic's range. In float16 what exceeds 65504 becomes
        infinite, gradients too, as loss scaling expects.

    Raises:
        ValueError: for parameters whose number or shape does not fit, bins outside 2 .. 128, minimum sizes that leave
            no room, bounds that are not increasing, an image beside tails, unknown tails, a scale that is not positive,
            or event_dims outside 0 .. x.dim().
        TypeError: for a dtype that is not floating.
    """
    parts, spline = _settle(
        3, x, parameters, tails=tails, domain=domain, image=image, min_bin_width=min_bin_width,
        min_bin_height=min_bin_height, scale=scale, event_dims=event_dims,
    )  # fmt: skip
    return _transform(x, parts, spline, inverse)


def _settle(
    degree: int,
    x: Tensor,
    parameters: Tensor | Sequence[Tensor],
    *,
    tails: str | None = None,
    domain: tuple[float, float] = (0.0, 1.0),
    image: tuple[float, float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    smooth_ends: bool = False,
    scale: float = 1.0,
    event_dims: int = 1,
) -> tuple[tuple[Tensor, ...], Spline]:
    """The arguments checked, the parameters expanded to x, and what every element shares."""
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, but expected float32, float64, bfloat16 or float16")
    if not 0 <= event_dims <= x.dim():
        raise ValueError(f"event_dims is {event_dims}, but x has {x.dim()} dimensions")
    if tails not in (None, "linear"):
        raise ValueError(f"tails is {tails!r}, but expected None or 'linear'")
    if tails is not None and image is not None:
        raise ValueError(f"image is {image}, but with tails {tails!r} outside is the identity: leave it None")
    if tails is None and smooth_ends:
        raise ValueError("smooth_ends is True, but without tails the end heights are parameters")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, but expected a positive number")
    image = domain if image is None else image
    for name, (low, high) in (("domain", domain), ("image", image)):
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"{name} is ({low}, {high}), but expected two finite numbers, the lower first")
    parts = (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)
    bins = _bins(degree, parts, tails is not None)
    names = NAMES[degree] if len(parts) == len(NAMES[degree]) else ("parameters",)
    parts = tuple(expand(name, part, x, part.shape[-1:]) for name, part in zip(names, parts, strict=True))
    rounding = torch.finfo(arithmetic_dtype(x)).eps
    if degree == 1:
        minimums = (0.0, rounding * rounding)
    else:
        for name, size in (("min_bin_width", min_bin_width), ("min_bin_height", min_bin_height)):
            if not 0 <= size * bins <= 1:
                raise ValueError(f"{name} is {size}, but {bins} bins need a number from 0 to 1/{bins}")
        minimums = (max(min_bin_width, rounding), max(min_bin_height, rounding))
    bounds = (float(domain[0]), float(domain[1]), float(image[0]), float(image[1]))
    weight = 0.5 if smooth_ends else 0.25
    return parts, Spline(degree, bins, tails is not None, bounds, minimums, weight, float(scale), event_dims)


def _bins(degree: int, parts: Sequence[Tensor], tails: bool) -> int:
    """The number of bins, from the number of parameters."""
    names = NAMES[degree]
    if len(parts) not in (1, len(names)):
        raise ValueError(f"parameters has {len(parts)} tensors, but expected one, or {', '.join(names)}")
    for part in parts:
        if not part.is_floating_point():
            raise TypeError(f"parameters has dtype {part.dtype}, but expected float32, float64, bfloat16 or float16")
        if part.dim() == 0:
            raise ValueError("parameters has shape (), but expected one that ends with the parameters of an element")
    came = tuple(part.shape[-1] for part in parts)
    beside = sum(counts(degree, 0, tails))
    bins = (came[0] - beside) // min(degree, 2) if len(parts) == 1 else came[0]
    if not MIN_BINS <= bins <= MAX_BINS:
        raise ValueError(f"parameters are for {bins} bins, but expected {MIN_BINS} to {MAX_BINS}")
    wanted = counts(degree, bins, tails)
    if came not in (wanted, (sum(wanted),)):
        given, expected = (" + ".join(str(count) for count in each) for each in (came, wanted))
        raise ValueError(
            f"parameters has {given} values for an element, but expected {expected} "
            f"({' + '.join(names)}) for {bins} bins"
        )
    return bins
