"""The logistic mixture against eager PyTorch and torch.compile of the reference; its inverse against the bisection that
Flow++ implementations sample with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Case, compiled
from torch import Tensor

from pygen import ops
from pygen.ops.mixture import logistic_mixture_reference

ELEMENTS = (512, 128)
BISECTIONS = 100


def eager(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    return logistic_mixture_reference(x, parameters)


def halve(
    low: Tensor, high: Tensor, target: Tensor, weights: Tensor, means: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of a bisection: the distribution function in the middle of the bracket."""
    middle = (low + high) / 2
    less = (weights * torch.sigmoid((middle.unsqueeze(-1) - means) * scales)).sum(-1) < target
    return torch.where(less, middle, low), torch.where(less, high, middle)


def bisection(
    y: Tensor, parameters: Tensor, step: Callable[..., tuple[Tensor, Tensor]] = halve
) -> tuple[Tensor, Tensor]:
    """The inverse as it is usually written."""
    logits, means, log_scales = parameters.chunk(3, -1)
    mixture = (y.sigmoid(), logits.softmax(-1), means, (-log_scales).exp())
    quantiles = means + y.unsqueeze(-1) * log_scales.exp()
    low, high = quantiles.amin(-1), quantiles.amax(-1)
    for _ in range(BISECTIONS):
        low, high = step(low, high, *mixture)
    x = (low + high) / 2
    return x, -eager(x, parameters)[1]


def cases(device: torch.device) -> Iterator[Case]:
    """Flow++'s number of components, 32, and 8; parameters as a trained coupling proposes them."""
    for components in (8, 32):
        x = torch.randn(ELEMENTS, device=device)
        spread = torch.tensor([1.0, 1.5, 0.5], device=device).repeat_interleave(components)
        parameters = torch.randn(*ELEMENTS, 3 * components, device=device) * spread
        parameters[..., 2 * components :] -= 1
        shape = f"{x.numel()} x K={components}"
        moved = 4 * x.numel() * (3 * components + 2)
        yield Case(
            "mixture forward", shape,
            lambda x=x, p=parameters: ops.logistic_mixture(x, p),
            {
                "eager": lambda x=x, p=parameters: eager(x, p),
                "compiled": partial(compiled(eager), x, parameters),
            },
            moved,
        )  # fmt: skip
        yield Case(
            "mixture inverse", shape,
            lambda x=x, p=parameters: ops.logistic_mixture(x, p, inverse=True),
            {
                "bisection": lambda x=x, p=parameters: bisection(x, p),
                "compiled steps": partial(bisection, x, parameters, compiled(halve)),
            },
            moved,
        )  # fmt: skip
        leaves = [x.clone().requires_grad_(), parameters.clone().requires_grad_()]
        grads = [torch.randn_like(x), torch.randn(len(x), device=device)]

        def train(
            function: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor] = leaves, grads: list[Tensor] = grads
        ) -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*leaves), leaves, grads)

        yield Case(
            "mixture forward + backward", shape,
            lambda train=train: train(ops.logistic_mixture),
            {"eager": lambda train=train: train(eager), "compiled": partial(train, compiled(eager))},
            # forward, then the backward reads x, parameters and grad_y, and writes grad_x and the parameters' gradient
            4 * x.numel() * (9 * components + 5),
        )  # fmt: skip
