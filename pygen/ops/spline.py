"""Monotone rational-quadratic splines: forward, inverse and log-determinant in one pass. (Durkan et al. 2019, Neural
Spline Flows, arXiv:1906.04032; the formulas are in spline_reference.py)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pygen import _native
from pygen.ops.arguments import arithmetic_dtype, expand
from pygen.ops.spline_reference import PARAMETRIZATIONS, PER_DIMENSION, TAILS, Spline, evaluate

MAX_BINS = 128

Tails = str | None | Sequence[str | None]
Bound = float | Tensor


def rational_quadratic_spline_reference(
    x: Tensor, parameters: Tensor | Sequence[Tensor], *, inverse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """`rational_quadratic_spline` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    parts, dimensions, spline = _settle(x, parameters, **options)
    return evaluate(x, parts, dimensions, spline, inverse)


@_native.register_fake("rational_quadratic_spline_forward")
@_native.register_fake("rational_quadratic_spline_inverse")
def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    ladj = x.new_empty(x.shape[: x.dim() - arguments[-1]], dtype=arithmetic_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), ladj


@_native.register_fake("rational_quadratic_spline_backward")
def _backward_fake(x: Tensor, parameters: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    count = sum(part.shape[-1] for part in parameters)
    grad_parameters = x.new_empty((*x.shape, count), dtype=_gradient_dtype(x, parameters))
    return torch.empty_like(x, memory_format=torch.contiguous_format), grad_parameters


def _gradient_dtype(x: Tensor, parts: Sequence[Tensor]) -> torch.dtype:
    dtypes = {part.dtype for part in parts}
    return dtypes.pop() if len(dtypes) == 1 else arithmetic_dtype(x)


def _kernel(kernels: Any, inverse: bool) -> Any:
    return kernels.rational_quadratic_spline_inverse if inverse else kernels.rational_quadratic_spline_forward


def _backward_reference(
    x: Tensor, parts: Sequence[Tensor], dimensions: Tensor | None, grad_output: Tensor, grad_ladj: Tensor,
    spline: Spline, inverse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The first derivative from differentiable operations, for second derivatives."""

    def transform(x: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(x, parts, dimensions, spline, inverse)

    dtype = arithmetic_dtype(x)
    _, pull = torch.func.vjp(  # type: ignore[misc]  # annotated for an auxiliary output as well
        transform, x.to(dtype), *(part.to(dtype) for part in parts)
    )
    grad_input, *grads = pull((grad_output.to(dtype), grad_ladj))
    return grad_input.to(x.dtype), *(grad.to(part.dtype) for grad, part in zip(grads, parts, strict=True))


class _RationalQuadraticSpline(torch.autograd.Function):
    """Saves its input and the parameters, nothing else."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dimensions: Tensor | None, spline: Spline, inverse: bool, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, ladj = _kernel(_native.kernels_for(x), inverse)(x, parts, dimensions, *spline)
        ctx.spline, ctx.inverse = spline, inverse
        ctx.save_for_backward(x, dimensions, *parts)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        x, dimensions, *parts = ctx.saved_tensors
        grads: Sequence[Tensor]
        if torch.is_grad_enabled():
            grad_input, *grads = _backward_reference(
                x, parts, dimensions, grad_output, grad_ladj, ctx.spline, ctx.inverse
            )
        else:
            kernels = _native.kernels_for(x)
            assert kernels is not None
            grad_input, packed = kernels.rational_quadratic_spline_backward(
                x, parts, dimensions, grad_output, grad_ladj, *ctx.spline, ctx.inverse
            )
            grads = packed.split([part.shape[-1] for part in parts], -1) if len(parts) > 1 else (packed,)
            grads = [grad.to(part.dtype) for grad, part in zip(grads, parts, strict=True)]
        return grad_input, None, None, None, *grads


def rational_quadratic_spline(
    x: Tensor,
    parameters: Tensor | Sequence[Tensor],
    *,
    inverse: bool = False,
    tails: Tails = None,
    domain: tuple[Bound, Bound] = (0.0, 1.0),
    image: tuple[Bound, Bound] | None = None,
    bins: int | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parametrization: str = "softplus",
    slope: float = 1e-3,
    boundary_slope: float = 1.0,
    identity_init: bool = False,
    scale: float = 1.0,
    event_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    """Map x elementwise through monotone rational-quadratic splines, and sum the log-determinant over the event
    dimensions in the same pass. (Durkan et al. 2019, Neural Spline Flows, arXiv:1906.04032)

    Args:
        x: (*batch, *event), float32, float64, bfloat16 or float16, any strides.
        parameters: the unconstrained parameters of K bins (2 to 128) for each element: widths, heights and
            derivatives, packed as (*x.shape, P) = [K | K | D], or a tuple of three tensors (*x.shape, K),
            (*x.shape, K), (*x.shape, D). Broadcastable to these shapes, any floating dtypes, any strides. D is K - 1
            with tails="linear", K with "circular", and K + 1 with None or a sequence of tails.
        inverse: map y to x.
        tails: what is outside of the domain. None: the spline goes on straight with its end slopes. "linear": the
            identity; the end slopes are boundary_slope. "circular": the identity; the last slope is the first.
            A sequence has one of these for each element of x's last dimension; end parameters that a dimension does
            not use are ignored and get no gradient.
        domain: (left, right) of the spline, each a number or a tensor that broadcasts to x's last dimension. Tensors
            get no gradient.
        image: (bottom, top), like domain; the domain where left out. Only without tails, where outside is not the
            identity.
        bins: K, to check that the parameters have as many.
        min_bin_width, min_bin_height: least share of the domain and the image that a bin takes, with "softplus".
        min_derivative: least slope at a knot, with "softplus". These three count as the rounding of the arithmetic's
            dtype where they are smaller, so that no bin has zero size.
        parametrization: "softplus" (nflows, normflows): bins are minimum + (1 - minimum K) softmax(u), slopes
            min_derivative + softplus(u). "softclip" (zuko): bins are softmax(u / (1 + |2 u / ln slope|)), slopes
            exp(u / (1 + |u / ln slope|)).
        slope: the least slope of "softclip", in (0, 1).
        boundary_slope: the slope at the ends under linear tails. 1 makes the spline smooth there.
        identity_init: with "softplus", scale softplus so that parameters of zero make slopes of one: with linear tails
            the identity.
        scale: factor of the unconstrained widths and heights, such as 1 / sqrt(hidden features).
        event_dims: how many of the last dimensions the log-determinant is summed over.

    Returns:
        The transformed tensor, with x's shape and dtype, contiguous, and ladj (*batch) in nats of the direction taken,
        float32 (float64 for float64 x). Arithmetic is in float32 (float64 for float64). NaN in gives NaN in that
        element and row only; parameters up to 1e6, and any finite x inside of the domain or in tails, give finite
        results and gradients. With tails=None so does x outside, as long as the straight line there and its derivative
        by the end's slope s, |x| / s^2 going back, are in the arithmetic's range. In float16 what exceeds 65504 becomes
        infinite, gradients too, as loss scaling expects.

        In float32 the inverse finds x back within 5e-7 / min(1, dy/dx) of the domain, so that the flatness of the bins
        decides how well. With the default minimums and unconstrained parameters of standard deviation up to 0.5, the
        ordinary size, that is within 1e-5; with 1 still for 99.5 % of all elements, and 1e-3 for the others; with 3 for
        60 %, and 0.2. Extreme parameters make bins so flat that their points share one y, and any of them comes back.
        It is y's own rounding: an exact spline, with its y rounded to float32, finds no more of them.

    Raises:
        ValueError: for parameters whose number or shape does not fit, bins outside 2 .. 128, minimum sizes that leave
            no room, bounds that are not increasing, an image beside tails, an unknown name, or event_dims outside
            0 .. x.dim().
        TypeError: for a dtype that is not floating.
    """
    parts, dimensions, spline = _settle(
        x, parameters, tails=tails, domain=domain, image=image, bins=bins, min_bin_width=min_bin_width,
        min_bin_height=min_bin_height, min_derivative=min_derivative, parametrization=parametrization, slope=slope,
        boundary_slope=boundary_slope, identity_init=identity_init, scale=scale, event_dims=event_dims,
    )  # fmt: skip
    kernels = _native.kernels_for(x)
    if kernels is None:
        return evaluate(x, parts, dimensions, spline, inverse)
    if _native.wants_gradient(x, *parts):
        y, ladj = _RationalQuadraticSpline.apply(x, dimensions, spline, inverse, *parts)  # type: ignore[no-untyped-call]
        return y, ladj
    y, ladj = _kernel(kernels, inverse)(x, parts, dimensions, *spline)
    return y, ladj


def _settle(
    x: Tensor,
    parameters: Tensor | Sequence[Tensor],
    *,
    tails: Tails = None,
    domain: tuple[Bound, Bound] = (0.0, 1.0),
    image: tuple[Bound, Bound] | None = None,
    bins: int | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parametrization: str = "softplus",
    slope: float = 1e-3,
    boundary_slope: float = 1.0,
    identity_init: bool = False,
    scale: float = 1.0,
    event_dims: int = 1,
) -> tuple[tuple[Tensor, ...], Tensor | None, Spline]:
    """The arguments checked, the parameters expanded to x, and what every element shares."""
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, but expected float32, float64, bfloat16 or float16")
    if not 0 <= event_dims <= x.dim():
        raise ValueError(f"event_dims is {event_dims}, but x has {x.dim()} dimensions")
    layout = _layout(tails, x)
    parts = (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)
    k = _bins(parts, layout, bins)
    parts = tuple(expand(name, part, x, part.shape[-1:]) for name, part in zip(_names(parts), parts, strict=True))
    if parametrization not in PARAMETRIZATIONS:
        raise ValueError(f"parametrization is {parametrization!r}, but expected one of {', '.join(PARAMETRIZATIONS)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, but expected a positive number")
    if not 0 < boundary_slope < math.inf:
        raise ValueError(f"boundary_slope is {boundary_slope}, but expected a positive number")
    if parametrization == "softclip":
        if identity_init:
            raise ValueError("identity_init is True, but with parametrization 'softclip' zeros are the identity")
        if not 0 < slope < 1:
            raise ValueError(f"slope is {slope}, but expected a number between 0 and 1")
        least = (0.0, 0.0, 0.0)
        sharpness = -math.log(slope)
    else:
        for name, size in (("min_bin_width", min_bin_width), ("min_bin_height", min_bin_height)):
            if not 0 <= size * k <= 1:
                raise ValueError(f"{name} is {size}, but {k} bins need a number from 0 to 1/{k}")
        if not 0 <= min_derivative < (1 if identity_init else math.inf):
            raise ValueError(
                f"min_derivative is {min_derivative}, but expected a number >= 0{', below 1' * identity_init}"
            )
        floor = torch.finfo(arithmetic_dtype(x)).eps
        least = (max(min_bin_width, floor), max(min_bin_height, floor), max(min_derivative, floor))
        sharpness = math.log(2) / (1 - least[2]) if identity_init else 1.0
    if image is not None and layout != 0 and any(t is not None for t in _each(tails)):
        raise ValueError(f"image is given, but with tails {tails!r} outside is the identity: leave it None")
    edges = _pair("domain", domain) + (_pair("domain", domain) if image is None else _pair("image", image))
    dimensions = None
    if layout == PER_DIMENSION or any(isinstance(edge, Tensor) for edge in edges):
        dimensions = _dimensions(x, edges, tails, layout)
        edges = (0.0, 1.0, 0.0, 1.0)
    left, right, bottom, top = (float(edge) for edge in edges)
    spline = Spline(
        k, layout, (left, right, bottom, top), least, PARAMETRIZATIONS.index(parametrization), sharpness,
        float(boundary_slope), float(scale), event_dims,
    )  # fmt: skip
    return parts, dimensions, spline


def _each(tails: Tails) -> Sequence[str | None]:
    return (tails,) if tails is None or isinstance(tails, str) else tails


def _layout(tails: Tails, x: Tensor) -> int:
    for tail in _each(tails):
        if tail not in TAILS:
            raise ValueError(f"tails has {tail!r}, but expected None, 'linear' or 'circular'")
    if tails is None or isinstance(tails, str):
        return TAILS.index(tails)
    if x.dim() == 0 or len(tails) != x.shape[-1]:
        raise ValueError(f"tails has {len(tails)} entries, but x has shape {tuple(x.shape)}: expected its last size")
    return PER_DIMENSION


def _names(parts: Sequence[Tensor]) -> Sequence[str]:
    return ("parameters",) if len(parts) == 1 else ("widths", "heights", "derivatives")


def _bins(parts: Sequence[Tensor], layout: int, bins: int | None) -> int:
    """The number of bins, from the number of parameters."""
    if len(parts) not in (1, 3):
        raise ValueError(f"parameters has {len(parts)} tensors, but expected one, or widths, heights and derivatives")
    for name, part in zip(_names(parts), parts, strict=True):
        if not part.is_floating_point():
            raise TypeError(f"{name} has dtype {part.dtype}, but expected float32, float64, bfloat16 or float16")
        if part.dim() == 0:
            raise ValueError(f"{name} has shape (), but expected one that ends with the parameters of an element")
    more = {0: 1, 1: -1, 2: 0, PER_DIMENSION: 1}[layout]
    counts = [part.shape[-1] for part in parts]
    k = (counts[0] - more) // 3 if len(parts) == 1 else counts[0]
    if bins is not None:
        k = bins
    if not 2 <= k <= MAX_BINS:
        raise ValueError(f"parameters are for {k} bins, but expected 2 to {MAX_BINS}")
    wanted = [3 * k + more] if len(parts) == 1 else [k, k, k + more]
    if counts != wanted:
        came, expected = (" + ".join(str(count) for count in each) for each in (counts, wanted))
        raise ValueError(
            f"parameters has {came} values for an element, but expected {expected}: "
            f"{k} widths, {k} heights and {k + more} derivatives"
        )
    return k


def _pair(name: str, pair: tuple[Bound, Bound]) -> tuple[Bound, Bound]:
    low, high = pair
    if not (isinstance(low, Tensor) or isinstance(high, Tensor)) and not -math.inf < low < high < math.inf:
        raise ValueError(f"{name} is ({low}, {high}), but expected two finite numbers, the lower first")
    return low, high


# (tails, dtype, device) -> their codes on that device: made once, so that a call copies nothing from the host.
_codes: dict[tuple[Any, ...], Tensor] = {}


def _tail_codes(tails: tuple[str | None, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    def make() -> Tensor:
        return torch.tensor([TAILS.index(tail) for tail in tails], dtype=dtype, device=device)

    if torch.compiler.is_compiling():
        return make()
    key = (tails, dtype, device)
    if key not in _codes:
        _codes[key] = make()
    return _codes[key]


def _dimensions(x: Tensor, edges: Sequence[Bound], tails: Tails, layout: int) -> Tensor:
    """(5, C): left, right, bottom, top and the code of the tails for each element of x's last dimension."""
    count = x.shape[-1] if x.dim() else 1
    dtype = arithmetic_dtype(x)
    rows = []
    for name, edge in zip(("domain", "domain", "image", "image"), edges, strict=True):
        if not isinstance(edge, Tensor):
            rows.append(torch.full((count,), float(edge), dtype=dtype, device=x.device))
            continue
        if edge.device != x.device:
            raise ValueError(f"{name} is on {edge.device}, but expected x's {x.device}")
        if edge.numel() != 1 and (edge.numel() != count or edge.shape[-1] != count):
            raise ValueError(
                f"{name} has a bound of shape {tuple(edge.shape)}, but expected one that broadcasts to ({count},)"
            )
        rows.append(edge.detach().to(dtype).reshape(-1).expand(count))
    if layout == PER_DIMENSION:
        rows.append(_tail_codes(tuple(_each(tails)), dtype, x.device))
    else:
        rows.append(torch.full((count,), float(layout), dtype=dtype, device=x.device))
    return torch.stack(rows)
