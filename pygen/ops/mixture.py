"""The distribution function of a mixture of logistics, carried to the whole line by a logit.

y = logit(F(x)), F(x) = sum_k pi_k sigmoid(z_k), z_k = (x - mu_k) e^{-s_k}, pi = softmax(logits);
log dy/dx = log f - log F - log(1 - F), f(x) = sum_k pi_k e^{-s_k} sigmoid(z_k) sigmoid(-z_k).
(Ho et al. 2019, Flow++, arXiv:1902.00275, section 3.2, eq. 11-13)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pygen import _native
from pygen.ops.arguments import arithmetic_dtype, expand

MAX_COMPONENTS = 128
# Log scales count as this much where they are further from zero.
LOG_SCALE_LIMIT = 30.0
# dx/dy counts as e to this where it is larger, in gradients of the inverse: products with it stay within float32.
LOG_SLOPE_LIMIT = 60.0

_NAMES = ("logits", "means", "log_scales")
_PER_COMPONENT = len(_NAMES)
_BISECTIONS = {torch.float32: 80, torch.float64: 140}


def _split(parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, means and log scales, each (..., K)."""
    logits, means, log_scales = parts[0].chunk(_PER_COMPONENT, -1) if len(parts) == 1 else parts
    return logits.to(dtype), means.to(dtype), log_scales.to(dtype).clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)


def _evaluate(x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor) -> tuple[Tensor, Tensor]:
    """y and log dy/dx of each element."""
    log_weights = logits.log_softmax(-1)
    z = (x.unsqueeze(-1) - means) * (-log_scales).exp()
    below, above = log_weights + logsigmoid(z), log_weights + logsigmoid(-z)
    log_below, log_above = below.logsumexp(-1), above.logsumexp(-1)
    # f over the smaller of F and 1 - F first: far out both are tiny, and their logarithms large and nearly the same.
    smaller = torch.where(log_below < log_above, log_below, log_above)
    larger = torch.where(log_below < log_above, log_above, log_below)
    log_density = (below + logsigmoid(-z) - smaller.unsqueeze(-1) - log_scales).logsumexp(-1)
    return log_below - log_above, log_density - larger


def _solve(y: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """x by bisection between the least and the greatest quantile of the components, constant for autograd."""
    y, parts = y.detach(), tuple(part.detach() for part in parts)  # type: ignore[assignment]
    _, means, log_scales = parts
    quantiles = means + log_scales.exp() * y.unsqueeze(-1)
    low, high = quantiles.amin(-1), quantiles.amax(-1)
    for _ in range(_BISECTIONS[y.dtype]):
        middle = low + (high - low) / 2
        less = _evaluate(middle, *parts)[0] < y
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return torch.where(y.isnan(), y, low + (high - low) / 2)


def _sum(ladj: Tensor, event_dims: int) -> Tensor:
    # sum over no dimensions would be a sum over all.
    return ladj.sum(tuple(range(-event_dims, 0))) if event_dims else ladj


def _transform(x: Tensor, parts: Sequence[Tensor], inverse: bool, event_dims: int) -> tuple[Tensor, Tensor]:
    dtype = arithmetic_dtype(x)
    value, mixture = x.to(dtype), _split(parts, dtype)
    if not inverse:
        y, ladj = _evaluate(value, *mixture)
        return y.to(x.dtype), _sum(ladj, event_dims)
    solution = _solve(value, mixture)
    # Newton steps of length zero, for their derivatives: the first gives those of first order, the second those of
    # second and third.
    for _ in range(2):
        y, ladj = _evaluate(solution, *mixture)
        step = (value - y) * (-ladj).clamp(max=LOG_SLOPE_LIMIT).exp()
        solution = solution + (step - step.detach())
    _, ladj = _evaluate(solution, *mixture)
    return solution.to(x.dtype), _sum(-ladj, event_dims)


def logistic_mixture_reference(
    x: Tensor, parameters: Tensor | Sequence[Tensor], *, inverse: bool = False, event_dims: int = 1
) -> tuple[Tensor, Tensor]:
    """`logistic_mixture` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    return _transform(x, _parts(x, parameters, event_dims), inverse, event_dims)


@_native.register_fake("logistic_mixture_forward")
@_native.register_fake("logistic_mixture_inverse")
def _logistic_mixture_fake(x: Tensor, parameters: Sequence[Tensor], event_dims: int) -> tuple[Tensor, Tensor]:
    ladj = x.new_empty(x.shape[: x.dim() - event_dims], dtype=arithmetic_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), ladj


@_native.register_fake("logistic_mixture_backward")
def _logistic_mixture_backward_fake(x: Tensor, parameters: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    same = all(part.dtype == parameters[0].dtype for part in parameters)
    grad_parameters = x.new_empty(
        (*x.shape, sum(part.shape[-1] for part in parameters)),
        dtype=parameters[0].dtype if same else arithmetic_dtype(x),
    )
    return torch.empty_like(x, memory_format=torch.contiguous_format), grad_parameters


def _backward_reference(
    x: Tensor, parts: Sequence[Tensor], grad_output: Tensor, grad_ladj: Tensor, inverse: bool, event_dims: int
) -> tuple[Tensor, ...]:
    """The first derivative from differentiable operations, for second derivatives. x is the value on the data side of
    the transform: its input going forward, its output going back."""
    dtype = arithmetic_dtype(x)
    # Views, so that the derivatives by the parameters do not run through an x that itself came from them.
    leaves = [v.view_as(v) if v.requires_grad else v.detach().requires_grad_() for v in (x, *parts)]
    y, ladj = _evaluate(leaves[0].to(dtype), *_split(leaves[1:], dtype))
    grad = grad_output.to(dtype)
    spread = grad_ladj.to(dtype).reshape(grad_ladj.shape + (1,) * event_dims).expand(x.shape)
    if not inverse:
        return torch.autograd.grad((y, ladj), leaves, (grad, spread), create_graph=True)
    # dx = (dy - y_theta dtheta) / y_x, and the log-determinant is minus that of the forward direction at x.
    (bend,) = torch.autograd.grad(ladj, leaves[0], torch.ones_like(ladj), create_graph=True)
    grad_input = (grad - spread * bend.to(dtype)) * (-ladj).clamp(max=LOG_SLOPE_LIMIT).exp()
    grads = torch.autograd.grad((y, ladj), leaves[1:], (-grad_input, -spread), create_graph=True)
    return grad_input.to(x.dtype), *grads


class _LogisticMixture(torch.autograd.Function):
    """Saves the value on the data side of the transform and the parameters, nothing else."""

    @staticmethod
    def forward(ctx: Any, inverse: bool, event_dims: int, x: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        kernels = _native.kernels_for(x)
        assert kernels is not None
        operator = kernels.logistic_mixture_inverse if inverse else kernels.logistic_mixture_forward
        y, ladj = operator(x, parts, event_dims)
        ctx.inverse, ctx.event_dims = inverse, event_dims
        ctx.save_for_backward(y if inverse else x, *parts)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        x, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _backward_reference(x, parts, grad_output, grad_ladj, ctx.inverse, ctx.event_dims)
            return None, None, *grads
        kernels = _native.kernels_for(x)
        assert kernels is not None
        grad_input, packed = kernels.logistic_mixture_backward(
            x, parts, grad_output, grad_ladj, ctx.event_dims, ctx.inverse
        )
        grads = packed.split([part.shape[-1] for part in parts], -1)
        return None, None, grad_input, *(grad.to(part.dtype) for grad, part in zip(grads, parts, strict=True))


def logistic_mixture(
    x: Tensor, parameters: Tensor | Sequence[Tensor], *, inverse: bool = False, event_dims: int = 1
) -> tuple[Tensor, Tensor]:
    """Map x elementwise through y = logit(F(x)), F the distribution function of a mixture of logistics, and sum the
    log-determinant over the event dimensions in the same pass. (Ho et al. 2019, Flow++, arXiv:1902.00275, eq. 11-13)

    The inverse has no closed form: it is solved by Halley's steps, with bisection wherever they do not help, inside the
    bracket of the components' own quantiles; its gradients are those of the implicit function at the solution.

    Args:
        x: (*batch, *event), float32, float64, bfloat16 or float16, any strides.
        parameters: logits, means mu and log scales s of K components (1 to 128) for each element, packed as
            (*x.shape, 3 K) = [K | K | K], or a tuple of three tensors (*x.shape, K). Broadcastable to these shapes, any
            floating dtypes, any strides.
        inverse: map y to x.
        event_dims: how many of the last dimensions the log-determinant is summed over.

    Returns:
        The transformed tensor, with x's shape and dtype, contiguous, and ladj (*batch) in nats of the direction taken,
        float32 (float64 for float64 x). Arithmetic is in float32 (float64 for float64). NaN in gives NaN in that
        element and row only. Both tails are exact to rounding, and finite x and parameters give finite results and
        gradients wherever |x - mu| e^{-s} is finite. Log scales beyond +-30 count as +-30, and have no gradient there.

    Raises:
        ValueError: for parameters whose number or shape does not fit, components outside 1 .. 128, or event_dims
            outside 0 .. x.dim().
        TypeError: for a dtype that is not floating.
    """
    parts = _parts(x, parameters, event_dims)
    kernels = _native.kernels_for(x)
    if kernels is None:
        return _transform(x, parts, inverse, event_dims)
    if _native.wants_gradient(x, *parts):
        y, ladj = _LogisticMixture.apply(inverse, event_dims, x, *parts)  # type: ignore[no-untyped-call]
        return y, ladj
    operator = kernels.logistic_mixture_inverse if inverse else kernels.logistic_mixture_forward
    y, ladj = operator(x, parts, event_dims)
    return y, ladj


def _parts(x: Tensor, parameters: Tensor | Sequence[Tensor], event_dims: int) -> tuple[Tensor, ...]:
    """The arguments checked, and the parameters expanded to x: one packed tensor, or three."""
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, but expected float32, float64, bfloat16 or float16")
    if not 0 <= event_dims <= x.dim():
        raise ValueError(f"event_dims is {event_dims}, but x has {x.dim()} dimensions")
    parts = (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)
    if len(parts) not in (1, _PER_COMPONENT):
        raise ValueError(f"parameters has {len(parts)} tensors, but expected one, or logits, means and log scales")
    names = ("parameters",) if len(parts) == 1 else _NAMES
    parts = tuple(expand(name, part, x, part.shape[-1:] or (1,)) for name, part in zip(names, parts, strict=True))
    counts = [part.shape[-1] for part in parts]
    k = counts[0] // _PER_COMPONENT if len(parts) == 1 else counts[0]
    if sum(counts) != _PER_COMPONENT * k or any(count != counts[0] for count in counts):
        came = " + ".join(str(count) for count in counts)
        raise ValueError(
            f"parameters has {came} values for an element, but expected as many logits as means as log scales"
        )
    if not 1 <= k <= MAX_COMPONENTS:
        raise ValueError(f"parameters are for {k} components, but expected 1 to {MAX_COMPONENTS}")
    return parts
