"""Rational-quadratic splines against nflows, normflows, and zuko eager and under torch.compile.

The peers' own splines on the peers' own layout; ours on the packed parameters that the conditioner gave.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Case, compiled
from torch import Tensor

from pygen import ops

BOUND = 3.0
FEATURES = 8  # of a row
Transform = Callable[..., tuple[Tensor, Tensor]]

# (elements, bins) -> rival -> the ratio aimed at.
FORWARD_TARGETS = {
    (65_536, 8): {"nflows": 12.0, "zuko compiled": 3.0},
    (65_536, 16): {"nflows": 6.0, "zuko compiled": 2.5},
    (1_048_576, 8): {"nflows": 16.0},
    (1_048_576, 16): {"nflows": 16.0},
}
BACKWARD_TARGETS = {
    (65_536, 8): {"nflows": 8.0, "zuko compiled": 2.5},
    (65_536, 16): {"nflows": 5.5, "zuko compiled": 2.0},
}


def split(parameters: Tensor) -> tuple[Tensor, ...]:
    """Packed parameters as widths, heights and the derivatives between them."""
    bins = (parameters.shape[-1] + 1) // 3
    return parameters.split((bins, bins, bins - 1), -1)


def ours(
    x: Tensor, parameters: Tensor, inverse: bool = False, parametrization: str = "softplus"
) -> tuple[Tensor, Tensor]:
    return ops.rational_quadratic_spline(
        x, parameters, tails="linear", domain=(-BOUND, BOUND), inverse=inverse, parametrization=parametrization
    )


def nflows(x: Tensor, parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline as spline

    y, ladj = spline(x, *split(parameters), inverse=inverse, tail_bound=BOUND)
    return y, ladj.sum(-1)


def normflows(x: Tensor, parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    from normflows.utils.splines import unconstrained_rational_quadratic_spline as spline

    y, ladj = spline(x, *split(parameters), inverse=inverse, tail_bound=BOUND)
    return y, ladj.sum(-1)


def zuko(x: Tensor, parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    from zuko.transforms import MonotonicRQSTransform

    transform = MonotonicRQSTransform(*split(parameters), bound=BOUND)
    y, ladj = (transform.inv if inverse else transform).call_and_ladj(x)
    return y, ladj.sum(-1)


PEERS = {name: peer for name, peer in (("nflows", nflows), ("normflows", normflows), ("zuko", zuko))
         if importlib.util.find_spec(name)}  # fmt: skip
ABSENT = "" if len(PEERS) == 3 else "not all peers are installed: pip install pygen-torch[benchmark]"


def train(transform: Transform, leaves: list[Tensor], grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward, from gradients of both outputs to those of both inputs."""
    return torch.autograd.grad(transform(*leaves), leaves, grads)


def saved_bytes(transform: Transform, leaves: list[Tensor]) -> float:
    """Bytes per element that autograd keeps for the backward, each storage once, views as what they view."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        transform(*leaves)
    return sum(storages.values()) / leaves[0].numel()


def error(transform: Transform, leaves: list[Tensor], grads: tuple[Tensor, Tensor]) -> str:
    """Mean relative error of y, ladj and both gradients against the same in float64; absolute below one."""

    def all_of(tensors: list[Tensor], weights: tuple[Tensor, Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            tensors = [tensor.detach().requires_grad_() for tensor in tensors]
            outputs = transform(*tensors)
            return [*outputs, *torch.autograd.grad(outputs, tensors, weights)]

    rounded = all_of(leaves, grads)
    exact = all_of([leaf.double() for leaf in leaves], (grads[0].double(), grads[1].double()))
    errors = [float(((a - b).abs() / b.abs().clamp_min(1)).mean()) for a, b in zip(rounded, exact, strict=True)]
    return " ".join(f"{value:.1e}" for value in errors)


def cases(device: torch.device) -> Iterator[Case]:
    """A small call, a training batch and a sampling batch; on a GPU also sixteen million elements."""
    sizes = [(32, 8), *FORWARD_TARGETS]
    if device.type == "cuda":
        sizes.append((1 << 24, 8))
    for elements, bins in sizes:
        x = torch.randn(elements // FEATURES, FEATURES, device=device)
        parameters = torch.randn(elements // FEATURES, FEATURES, 3 * bins - 1, device=device)
        grads = torch.randn_like(x), torch.randn(elements // FEATURES, device=device)
        shape = f"{elements:,} K={bins}"
        floor = 4 * (3 * bins + 2) * elements
        compile_zuko = "zuko" in PEERS and elements == 65_536
        for inverse in (False, True):
            rivals = {name: partial(peer, x, parameters, inverse) for name, peer in PEERS.items()}
            if compile_zuko:
                rivals["zuko compiled"] = partial(compiled(zuko), x, parameters, inverse)
            targets = FORWARD_TARGETS.get((elements, bins), {})
            yield Case(
                f"RQ spline {'inverse' if inverse else 'forward'}", shape, partial(ours, x, parameters, inverse),
                rivals, floor, {name: ratio for name, ratio in targets.items() if name in rivals}, ABSENT,
            )  # fmt: skip
        yield Case(
            "RQ spline forward, zuko's parameters", shape, partial(ours, x, parameters, parametrization="softclip"),
            {name: partial(peer, x, parameters) for name, peer in PEERS.items() if name == "zuko"}, floor,
        )  # fmt: skip
        leaves = [x.clone().requires_grad_(), parameters.clone().requires_grad_()]
        rivals = {name: partial(train, peer, leaves, grads) for name, peer in PEERS.items()}
        note = ABSENT
        if elements == 65_536:
            everyone = {"ours": ours, **PEERS}
            note = "; ".join(
                f"{name}: {saved_bytes(transform, leaves):.0f} bytes an element saved, "
                f"mean error of y, ladj and gradients {error(transform, leaves, grads)}"
                for name, transform in everyone.items()
            )
        if compile_zuko:
            rivals["zuko compiled"] = partial(train, compiled(zuko), leaves, grads)
        yield Case(
            "RQ spline forward + backward", shape, partial(train, ours, leaves, grads), rivals,
            4 * (9 * bins + 4) * elements, BACKWARD_TARGETS.get((elements, bins), {}), note,
        )  # fmt: skip
