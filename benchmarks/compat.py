"""nflows and normflows on pygen's kernels against themselves: a training step, coupling layers, sampling.

`ours` is the converted model. "patched" is the library's own model under `patch()`: its stand-ins are let through, or
passed by, so that turns may alternate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import normflows
import torch
from measure import Case
from nflows import distributions, flows, transforms
from nflows.nn.nets import ResidualNet
from nflows.utils import create_alternating_binary_mask
from torch import Tensor, nn

from pygen.compat import nflows as nflows_drop_in
from pygen.compat import normflows as normflows_drop_in

BATCH = 512


def cases(device: torch.device) -> Iterator[Case]:
    """A spline flow's training, the couplings' own share of their layer, sampling, and a step of Glow."""
    yield from training(device)
    yield from couplings(device)
    yield from sampling(device)
    yield from normflows_steps(device)


def nsf(features: int, layers: int, hidden: int, bins: int) -> flows.Flow:
    """The spline flow of nflows' examples: permutation, LU, and coupling, with its unconditional splines."""
    parts: list[nn.Module] = []
    for layer in range(layers):
        parts += [
            transforms.RandomPermutation(features),
            transforms.LULinear(features),
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                create_alternating_binary_mask(features, even=layer % 2 == 0),
                partial(ResidualNet, hidden_features=hidden, num_blocks=2),
                num_bins=bins, tails="linear", tail_bound=3.0, apply_unconditional_transform=True,
            ),
        ]  # fmt: skip
    return flows.Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([features]))


def stepper(model: nn.Module, loss: Callable[[nn.Module], Tensor], fused: bool = False) -> Callable[[], None]:
    """A training step: gradients cleared, loss, backward, Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return step


def training(device: torch.device) -> Iterator[Case]:
    x = torch.randn(BATCH, 8, device=device)

    def loss(model: Any) -> Tensor:
        return -model.log_prob(x).mean()

    theirs = nsf(8, layers=10, hidden=128, bins=8).to(device)
    ours = converted(theirs)
    patched = in_turn(stepper(copy.deepcopy(theirs), loss))
    nets = [part for part in copy.deepcopy(ours).modules() if isinstance(part, ResidualNet)]
    halves = [torch.randn(BATCH, 4, device=device, requires_grad=True) for _ in nets]

    def conditioners() -> None:
        """What no spline can make faster: the networks, and the optimizer."""
        outputs = [net(half) for net, half in zip(nets, halves, strict=True)]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    rivals = {
        "nflows": stepper(copy.deepcopy(theirs), loss),
        "patched": patched,
        "its conditioners alone": conditioners,
        "its optimizer alone": optimizer_of(copy.deepcopy(ours)),
    }
    shape = f"({BATCH}, 8), 10 layers"
    yield Case("NSF step, forward + backward", shape, stepper(ours, loss), rivals, targets={"nflows": 3.0})
    yield Case(
        "NSF step, forward + backward, fused Adam", shape, stepper(copy.deepcopy(ours), loss, fused=True),
        {"nflows": stepper(copy.deepcopy(theirs), loss, fused=True)},
    )  # fmt: skip


def optimizer_of(model: nn.Module) -> Callable[[], Any]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return optimizer.step


def converted(model: nn.Module, drop_in: Any = nflows_drop_in) -> Any:
    """A copy on pygen's kernels."""
    ours = copy.deepcopy(model)
    drop_in.convert(ours)
    return ours


def in_turn(work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` under a patch that is in force only meanwhile, without the search for what to replace."""
    nflows_drop_in.patch()
    changes = nflows_drop_in._patch._changes
    changes.in_force = False

    @contextmanager
    def let_through() -> Iterator[None]:
        changes.in_force = True
        try:
            yield
        finally:
            changes.in_force = False

    return let_through()(work)


class Fixed(nn.Module):
    """A conditioner that costs nothing: its output is a parameter."""

    def __init__(self, rows: int, outputs: int) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.randn(rows, outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.outputs


def couplings(device: torch.device) -> Iterator[Case]:
    for rows, features in ((64, 3072), (64, 49_152)):
        targets = {"nflows": 2.0 if features == 3072 else 2.5}
        for name, mask in (("alternating", create_alternating_binary_mask(features)), ("random", shuffled(features))):
            theirs = transforms.AffineCouplingTransform(mask, lambda _, outputs, rows=rows: Fixed(rows, outputs))
            theirs = theirs.to(device)
            ours = converted(theirs)
            x = torch.randn(rows, features, device=device)
            shape = f"({rows}, {features}), {name}"
            yield Case(
                "affine coupling layer forward", shape, partial(ours, x), {"nflows": partial(theirs, x)},
                targets=targets,
            )  # fmt: skip
            grads = torch.randn_like(x), torch.randn(rows, device=device)
            yield Case(
                "affine coupling layer forward + backward", shape, partial(differentiate, ours, x, grads),
                {"nflows": partial(differentiate, theirs, x, grads)}, targets=targets,
            )  # fmt: skip


def shuffled(features: int) -> Tensor:
    mask = torch.zeros(features)
    mask[torch.randperm(features)[: features // 2]] = 1
    return mask


def differentiate(layer: nn.Module, x: Tensor, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], grads)


def sampling(device: torch.device) -> Iterator[Case]:
    """End to end, from noise to samples, in evaluation."""
    made = {
        "RealNVP": (flows.SimpleRealNVP(64, 128, 8, 2), "D=64, H=128, 8 layers", BATCH),
        "NSF": (nsf(8, layers=10, hidden=128, bins=8), "D=8, H=128, 10 layers", BATCH),
        "MAF": (flows.MaskedAutoregressiveFlow(64, 512, 5, 2), "D=64, H=512, 5 layers", 64),
    }
    for name, (model, shape, count) in made.items():
        theirs = model.to(device).eval()
        ours = converted(theirs)
        yield Case(
            f"nflows {name} sampling", f"{count}, {shape}", partial(ours.sample, count),
            {"nflows": partial(theirs.sample, count)},
        )  # fmt: skip
        x = torch.randn(count, 64 if name != "NSF" else 8, device=device)
        yield Case(
            f"nflows {name} log_prob", f"{count}, {shape}", partial(ours.log_prob, x),
            {"nflows": partial(theirs.log_prob, x)},
        )  # fmt: skip


def normflows_steps(device: torch.device) -> Iterator[Case]:
    x = torch.randn(BATCH, 8, device=device)
    parts: list[nn.Module] = []
    for layer in range(10):
        parts += [
            normflows.flows.CoupledRationalQuadraticSpline(8, 2, 128, reverse_mask=layer % 2 == 1),
            normflows.flows.LULinearPermute(8),
        ]
    base = normflows.distributions.DiagGaussian(8, trainable=False)
    theirs = normflows.NormalizingFlow(base, parts).to(device)
    ours = converted(theirs, normflows_drop_in)
    yield Case(
        "normflows NSF step, forward + backward", f"({BATCH}, 8), 10 layers",
        stepper(ours, lambda model: model.forward_kld(x)),
        {"normflows": stepper(copy.deepcopy(theirs), lambda model: model.forward_kld(x))}, targets={"normflows": 3.0},
    )  # fmt: skip

    pictures = torch.randn(64, 12, 16, 16, device=device)
    for mode in ("channel", "checkerboard"):
        block = normflows.flows.GlowBlock(12, 64, split_mode=mode).to(device)
        with torch.no_grad():
            block.inverse(pictures)
        fast = converted(block, normflows_drop_in)

        def loss(model: Any) -> Tensor:
            z, ladj = model.inverse(pictures)
            return z.square().sum() - ladj.sum()

        yield Case(
            f"Glow block, {mode}, forward + backward", "(64, 12, 16, 16)", stepper(fast, loss),
            {"normflows": stepper(copy.deepcopy(block), loss)},
        )  # fmt: skip
