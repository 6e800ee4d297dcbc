"""Zuko on pygen's kernels against zuko itself: splines, sampling from autoregressive flows, a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import Case, compiled
from torch import Tensor, nn

try:
    import zuko

    from pygen.compat.zuko import convert, transforms
except ModuleNotFoundError:
    zuko = None

BATCH = 64
# Of a sampling of D = 784, which zuko takes ten seconds for.
PASSES = 8


def forward(x: Tensor, *phi: Tensor) -> tuple[Tensor, Tensor]:
    """As zuko's flows do at each call: from unconstrained parameters."""
    return zuko.transforms.MonotonicRQSTransform(*phi).call_and_ladj(x)


def inverse(x: Tensor, *phi: Tensor) -> tuple[Tensor, Tensor]:
    return zuko.transforms.MonotonicRQSTransform(*phi).inv.call_and_ladj(x)


def ours(x: Tensor, *phi: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """What `patch()` makes of both."""
    spline = transforms.MonotonicRQSTransform(*phi)
    return (spline.inv if inverse else spline).call_and_ladj(x)


def train(function: Callable[..., Any], leaves: list[Tensor], grads: tuple[Tensor, ...]) -> Any:
    return torch.autograd.grad(function(*leaves), leaves, grads)


def cases(device: torch.device) -> Iterator[Case]:
    """The splines by themselves, sampling, and a training step; nothing where zuko is not installed."""
    if zuko is None:
        return
    yield from splines(device)
    yield from sampling(device)
    yield from steps(device)


def splines(device: torch.device) -> Iterator[Case]:
    for count, bins in ((65_536, 8), (65_536, 16), (1_048_576, 8)):
        x = 2 * torch.randn(count, device=device)
        phi = [torch.randn(count, number, device=device) for number in (bins, bins, bins - 1)]
        shape, floor = f"{count:,}, K={bins}", 4 * count * (3 * bins + 2)
        targets = {"compiled": 3.0 if bins == 8 else 2.5} if count == 65_536 else {}
        for name, theirs in (("forward", forward), ("inverse", inverse)):
            yield Case(
                f"zuko RQS {name}", shape, partial(ours, x, *phi, inverse=name == "inverse"),
                {"zuko": partial(theirs, x, *phi), "compiled": partial(compiled(theirs), x, *phi)}, floor, targets,
            )  # fmt: skip
        leaves = [leaf.clone().requires_grad_() for leaf in (x, *phi)]
        grads = (torch.randn_like(x), torch.randn_like(x))
        targets = {"compiled": 2.5 if bins == 8 else 2.0} if count == 65_536 else {}
        yield Case(
            "zuko RQS forward + backward", shape, partial(train, ours, leaves, grads),
            {
                "zuko": partial(train, forward, leaves, grads),
                "compiled": partial(train, compiled(forward), leaves, grads),
            },
            4 * count * (6 * bins + 2), targets,
        )  # fmt: skip


def both(flow: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A flow on pygen's kernels, and the same as zuko's."""
    theirs = copy.deepcopy(flow)
    convert(flow)
    return flow, theirs


def sampling(device: torch.device) -> Iterator[Case]:
    for cls, features, hidden in ((zuko.flows.MAF, 64, 512), (zuko.flows.NSF, 64, 512), (zuko.flows.MAF, 784, 1024)):
        flow, theirs = both(cls(features, transforms=1, hidden_features=(hidden, hidden)).to(device))
        z = torch.randn(BATCH, features, device=device)
        name, shape = f"zuko {cls.__name__} sampling", f"D={features}, H={hidden}, {BATCH}"
        rivals = {"zuko": lambda theirs=theirs, z=z: theirs().transform.inv(z)}
        if features == 784:
            some = copy.deepcopy(theirs)
            some.transform.transforms[0].passes = PASSES
            rivals = {f"zuko, {PASSES} of 784 passes": lambda some=some, z=z: some().transform.inv(z)}
        rivals["ours, log_prob"] = lambda flow=flow, z=z: flow().log_prob(z)
        yield Case(name, shape, lambda flow=flow, z=z: flow().transform.inv(z), rivals)
        if features != 784:
            yield Case(
                f"{name}, forward + backward", shape, partial(sample_and_differentiate, flow, z),
                {"zuko": partial(sample_and_differentiate, theirs, z)},
            )  # fmt: skip
    matrix, y = (
        torch.randn(64, 64, device=device) / 8 + torch.eye(64, device=device),
        torch.randn(512, 64, device=device),
    )
    lu, theirs = transforms.LULinearTransform(matrix), zuko.transforms.LULinearTransform(matrix)
    yield Case("zuko LU inverse", "(512, 64)", partial(lu.inv, y), {"zuko": partial(theirs.inv, y)})


def sample_and_differentiate(flow: nn.Module, z: Tensor) -> Any:
    x, ladj = flow().transform.inv.call_and_ladj(z)
    return torch.autograd.grad(x.square().sum() + ladj.sum(), list(flow.parameters()))


def steps(device: torch.device) -> Iterator[Case]:
    x = torch.randn(512, 8, device=device)
    made = {
        "NSF": zuko.flows.NSF(8, hidden_features=(128, 128)),
        "NSF coupling": coupling_flow(8, hidden_features=(128, 128)),
        "MAF": zuko.flows.MAF(8, hidden_features=(128, 128)),
        "RealNVP": zuko.flows.RealNVP(8, hidden_features=(128, 128)),
    }
    for name, flow in made.items():
        flow, theirs = both(flow.to(device))
        yield Case(
            f"zuko {name} step, forward + backward", "(512, 8), 3 transforms", stepper(flow, x),
            {
                "zuko": stepper(theirs, x),
                "compiled": stepper(copy.deepcopy(theirs), x, torch.compile),
                "its hyper networks": stepper(theirs, x, log_prob=of_hyper_networks),
            },
        )  # fmt: skip


def coupling_flow(features: int, **network: Any) -> nn.Module:
    layers = [
        zuko.flows.GeneralCouplingTransform(
            features, mask=torch.arange(features) % 2 == i % 2, univariate=zuko.transforms.MonotonicRQSTransform,
            shapes=[(8,), (8,), (7,)], **network,
        )
        for i in range(3)
    ]  # fmt: skip
    return zuko.lazy.Flow(layers, zuko.flows.MAF(features).base)


def log_prob(flow: nn.Module, x: Tensor) -> Tensor:
    return flow().log_prob(x).mean()


def of_hyper_networks(flow: nn.Module, x: Tensor) -> Tensor:
    """The part of a step that the kernels have no part in."""
    total = x.new_zeros(())
    for layer in flow.transform.transforms:
        total = total + layer.hyper(x[:, : layer.hyper.in_features]).mean()
    return total


def stepper(
    flow: nn.Module, x: Tensor, wrap: Callable[..., Any] = lambda function: function,
    log_prob: Callable[[nn.Module, Tensor], Tensor] = log_prob,
) -> Callable[[], None]:  # fmt: skip
    """A step of Adam on the likelihood of x."""
    optimizer = torch.optim.Adam(flow.parameters(), 1e-4)
    loss = wrap(log_prob)

    def step() -> None:
        optimizer.zero_grad()
        (-loss(flow, x)).backward()
        optimizer.step()

    return step
