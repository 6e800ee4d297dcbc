"""Affine coupling: y = x s + t with its log-determinant in the same pass.

s = activation(raw_scale + offset) + epsilon;  ladj = sum over event dimensions of log s.
(Dinh et al. 2015, NICE, arXiv:1410.8516; Dinh et al. 2017, RealNVP, arXiv:1605.08803, eq. 7-8)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pygen import _native
from pygen.ops.arguments import arithmetic_dtype, expand

# In the order of `enum class Activation` in csrc/coupling.h.
ACTIVATIONS = ("exp", "tanh", "atan", "sigmoid_symmetric", "sigmoid", "softplus", "softclip")
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_BOUNDED = frozenset({"tanh", "atan", "sigmoid_symmetric", "softclip"})


def _log_scale(a: Tensor, activation: str, limit: float) -> Tensor:
    if activation == "tanh":
        return limit * torch.tanh(a)
    if activation == "atan":
        return limit * (0.636 * torch.atan(a))
    if activation == "sigmoid_symmetric":
        return limit * torch.tanh(0.5 * a)
    if activation == "softclip":
        return a / (1 + (a / limit).abs())
    return a


def _scale(a: Tensor, activation: str, limit: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """The scale and its logarithm."""
    if activation == "sigmoid":
        s, log_s = torch.sigmoid(a), functional.logsigmoid(a)
    elif activation == "softplus":
        s = functional.softplus(a)
        log_s = torch.where(a < -40, a, s.clamp_min(torch.finfo(s.dtype).tiny).log())
    else:
        log_s = _log_scale(a, activation, limit)
        s = log_s.exp()
    if epsilon != 0:
        s = s + epsilon
        log_s = s.log()
    return s, log_s


def affine_reference(
    x: Tensor,
    raw_scale: Tensor | None,
    shift: Tensor | None,
    *,
    activation: str = "exp",
    limit: float | None = None,
    offset: float = 0.0,
    epsilon: float = 0.0,
    event_dims: int = 1,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`affine` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    dtype = arithmetic_dtype(x)
    value = x.to(dtype)
    t = None if shift is None else shift.to(dtype)
    if raw_scale is None:
        s, log_s = None, torch.zeros_like(value)
    else:
        s, log_s = _scale(raw_scale.to(dtype) + offset, activation, limit or 1.0, epsilon)
    if inverse:
        value = value if t is None else value - t
        value = value if s is None else value / s
        log_s = -log_s
    else:
        value = value if s is None else value * s
        value = value if t is None else value + t
    # sum over no dimensions would be a sum over all.
    ladj = log_s.expand(x.shape).sum(tuple(range(-event_dims, 0))) if event_dims else log_s.expand(x.shape)
    return value.to(x.dtype).expand(x.shape), ladj


@_native.register_fake("affine_forward")
@_native.register_fake("affine_inverse")
def _affine_fake(
    x: Tensor, raw_scale: Tensor | None, shift: Tensor | None, activation: int, limit: float, offset: float,
    epsilon: float, event_dims: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ladj = x.new_empty(x.shape[: x.dim() - event_dims], dtype=arithmetic_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), ladj


@_native.register_fake("affine_backward")
def _affine_backward_fake(x: Tensor, raw_scale: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(x, memory_format=contiguous), torch.empty_like(raw_scale, memory_format=contiguous)


def _backward_reference(
    x: Tensor, raw_scale: Tensor, grad_output: Tensor, grad_ladj: Tensor, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """The first derivative from differentiable operations, for second derivatives. x is the value on the data side of
    the transform: its input going forward, its output going back."""
    activation, limit, offset, epsilon, event_dims, inverse = options
    dtype = arithmetic_dtype(x)
    value, grad = x.to(dtype), grad_output.to(dtype)
    a = raw_scale.to(dtype) + offset
    s, log_s = _scale(a, ACTIVATIONS[activation], limit, epsilon)
    if not a.requires_grad:
        a = a.detach().requires_grad_()
        s, log_s = _scale(a, ACTIVATIONS[activation], limit, epsilon)
    (relative,) = torch.autograd.grad(log_s.sum(), a, create_graph=True)
    spread = grad_ladj.to(dtype).reshape(grad_ladj.shape + (1,) * event_dims)
    if inverse:
        return (grad / s).to(x.dtype), (-relative * (grad * value + spread)).to(raw_scale.dtype)
    return (grad * s).to(x.dtype), (relative * (s * grad * value + spread)).to(raw_scale.dtype)


class _Affine(torch.autograd.Function):
    """Saves the value on the data side of the transform and the raw scale, nothing else."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, raw_scale: Tensor | None, shift: Tensor | None, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        *_, inverse = options
        kernels = _native.kernels_for(x)
        assert kernels is not None
        operator = kernels.affine_inverse if inverse else kernels.affine_forward
        y, ladj = operator(x, raw_scale, shift, *options[:-1])
        ctx.options = options
        ctx.shift_dtype = None if shift is None else shift.dtype
        ctx.save_for_backward(y if inverse else x, raw_scale)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        x, raw_scale = ctx.saved_tensors
        *_, inverse = ctx.options
        grad_raw_scale = None
        if raw_scale is None:
            grad_input = grad_output
        elif torch.is_grad_enabled():
            grad_input, grad_raw_scale = _backward_reference(x, raw_scale, grad_output, grad_ladj, ctx.options)
        else:
            kernels = _native.kernels_for(x)
            assert kernels is not None
            grad_input, grad_raw_scale = kernels.affine_backward(x, raw_scale, grad_output, grad_ladj, *ctx.options)
        grad_shift = None
        if ctx.shift_dtype is not None and ctx.needs_input_grad[2]:
            grad_shift = (-grad_input if inverse else grad_output).to(ctx.shift_dtype)
        return grad_input, grad_raw_scale, grad_shift, None


def affine(
    x: Tensor,
    raw_scale: Tensor | None,
    shift: Tensor | None,
    *,
    activation: str = "exp",
    limit: float | None = None,
    offset: float = 0.0,
    epsilon: float = 0.0,
    event_dims: int = 1,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and shift x elementwise, and sum the log-determinant over the event dimensions in the same pass.

    y = x s + t and ladj = sum log s, or with `inverse` x = (y - t) / s and ladj = -sum log s, where
    s = activation(raw_scale + offset) + epsilon and t = shift.

    Args:
        x: (*batch, *event), float32, float64, bfloat16 or float16, any strides.
        raw_scale: broadcastable to x, any of these dtypes, any strides (half of a conditioner's output, interleaved
            channels); None for the additive coupling of NICE (s = 1).
        shift: like raw_scale; None for no shift.
        activation: with a = raw_scale + offset, one of
            "exp": s = e^a;
            "tanh", "atan", "sigmoid_symmetric": log s = limit tanh(a), limit 0.636 atan(a), limit (2 sigmoid(a) - 1),
            the clamps of FrEIA;
            "sigmoid": s = sigmoid(a) (nflows: offset 2, epsilon 1e-3);
            "softplus": s = softplus(a);
            "softclip": log s = a / (1 + |a / limit|) (zuko: limit = ln 1000).
        limit: the bound of |log s|, positive; for the activations that have one.
        offset, epsilon: constants added before and after the activation; epsilon >= 0.
        event_dims: how many of the last dimensions the log-determinant is summed over.
        inverse: map y to x.

    Returns:
        The transformed tensor, with x's shape and dtype, contiguous, and ladj (*batch) in nats, float32 (float64 for
        float64 x). Arithmetic is in float32 (float64 for float64). NaN in gives NaN in that element and row only.

    Raises:
        ValueError: for an unknown activation, a limit that is missing, useless or not positive, a negative epsilon,
            shapes that do not broadcast to x's, tensors on another device than x, or event_dims outside
            0 .. x.dim().
        TypeError: for a dtype that is not floating.
    """
    code = _CODES.get(activation, -1)
    if (
        code < 0
        or (limit is None) == (activation in _BOUNDED)
        or (limit is not None and not 0 < limit < math.inf)
        or not epsilon >= 0
        or not 0 <= event_dims <= x.dim()
        or not x.is_floating_point()
    ):
        _refuse(x, activation, limit, epsilon, event_dims)
    if raw_scale is not None and not _fits(raw_scale, x):
        raw_scale = expand("raw_scale", raw_scale, x)
    if shift is not None and not _fits(shift, x):
        shift = expand("shift", shift, x)
    kernels = _native.kernels_for(x)
    if kernels is None:
        return affine_reference(
            x, raw_scale, shift, activation=activation, limit=limit, offset=offset, epsilon=epsilon,
            event_dims=event_dims, inverse=inverse,
        )  # fmt: skip
    bound = 1.0 if limit is None else limit
    if _native.wants_gradient(x, raw_scale, shift):
        options = (code, bound, offset, epsilon, event_dims, inverse)
        y, ladj = _Affine.apply(x, raw_scale, shift, options)  # type: ignore[no-untyped-call]
        return y, ladj
    operator = kernels.affine_inverse if inverse else kernels.affine_forward
    y, ladj = operator(x, raw_scale, shift, code, bound, offset, epsilon, event_dims)
    return y, ladj


def _fits(value: Tensor, x: Tensor) -> bool:
    return value.shape == x.shape and value.device == x.device and value.is_floating_point()


def _refuse(x: Tensor, activation: str, limit: float | None, epsilon: float, event_dims: int) -> None:
    if activation not in _CODES:
        raise ValueError(f"activation is {activation!r}, but expected one of {', '.join(ACTIVATIONS)}")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, but expected float32, float64, bfloat16 or float16")
    if limit is None and activation in _BOUNDED:
        raise ValueError(f"limit is None, but activation {activation!r} needs the bound of |log s|, a positive number")
    if limit is not None and activation not in _BOUNDED:
        raise ValueError(f"limit is {limit}, but activation {activation!r} has no bound: leave it None")
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"limit is {limit}, but expected a positive number")
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon}, but expected a number >= 0")
    raise ValueError(f"event_dims is {event_dims}, but x has {x.dim()} dimensions")
