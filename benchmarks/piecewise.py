"""Linear, quadratic and cubic splines against nflows and against the reference under torch.compile."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Case, compiled
from torch import Tensor

from pygen import ops

BINS = 8
FEATURES = 8  # of a row
Transform = Callable[..., tuple[Tensor, Tensor]]

HAS_NFLOWS = importlib.util.find_spec("nflows") is not None
ABSENT = "" if HAS_NFLOWS else "nflows is not installed: pip install pygen-torch[benchmark]"


def linear_nflows(x: Tensor, parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    from nflows.transforms.splines.linear import linear_spline

    y, ladj = linear_spline(x, parameters, inverse=inverse)
    return y, ladj.sum(-1)


def quadratic_nflows(x: Tensor, parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    from nflows.transforms.splines.quadratic import quadratic_spline

    y, ladj = quadratic_spline(x, parameters[..., :BINS], parameters[..., BINS:], inverse=inverse)
    return y, ladj.sum(-1)


def cubic_nflows(x: Tensor, parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    from nflows.transforms.splines.cubic import cubic_spline

    y, ladj = cubic_spline(x, *parameters.split((BINS, BINS, 1, 1), -1), inverse=inverse)
    return y, ladj.sum(-1)


# Name -> parameters of an element, ours, its reference, nflows'.
SPLINES: dict[str, tuple[int, Transform, Transform, Transform]] = {
    "linear": (BINS, ops.linear_spline, ops.linear_spline_reference, linear_nflows),
    "quadratic": (2 * BINS + 1, ops.quadratic_spline, ops.quadratic_spline_reference, quadratic_nflows),
    "cubic": (2 * BINS + 2, ops.cubic_spline, ops.cubic_spline_reference, cubic_nflows),
}


def train(transform: Transform, leaves: list[Tensor], grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward, from gradients of both outputs to those of both inputs."""
    return torch.autograd.grad(transform(*leaves), leaves, grads)


def cases(device: torch.device) -> Iterator[Case]:
    """A training batch; on a GPU also sixteen million elements."""
    targets = {"nflows": 10.0, "compiled": 1.0}
    for elements in (65_536, 1 << 24) if device.type == "cuda" else (65_536,):
        for name, (count, ours, reference, nflows) in SPLINES.items():
            x = torch.rand(elements // FEATURES, FEATURES, device=device)
            parameters = torch.randn(elements // FEATURES, FEATURES, count, device=device)
            grads = torch.randn_like(x), torch.randn(elements // FEATURES, device=device)
            leaves = [x.clone().requires_grad_(), parameters.clone().requires_grad_()]
            shape, floor = f"{elements:,} K={BINS}", 4 * (count + 2) * elements

            for inverse in (False, True):

                def rival(x: Tensor, parameters: Tensor, spline: Transform = reference, inverse: bool = inverse):
                    return spline(x, parameters, inverse=inverse)

                rivals = {"nflows": partial(nflows, inverse=inverse)} if HAS_NFLOWS else {}
                rivals["compiled"] = compiled(rival)
                own = partial(ours, inverse=inverse)
                direction = "inverse" if inverse else "forward"
                yield Case(
                    f"{name} spline {direction}", shape, partial(own, x, parameters),
                    {key: partial(call, x, parameters) for key, call in rivals.items()}, floor, targets, ABSENT,
                )  # fmt: skip
                yield Case(
                    f"{name} spline {direction} + backward", shape, partial(train, own, leaves, grads),
                    {key: partial(train, call, leaves, grads) for key, call in rivals.items()},
                    # forward reads x and the parameters and writes y; backward reads these and grad_y, and writes the
                    # gradients of both
                    floor + 4 * (2 * count + 3) * elements, targets, ABSENT,
                )  # fmt: skip
