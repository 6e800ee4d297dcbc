"""A training step of a Glow stack: its time and its peak memory against depth, for what training may keep.

The memory is that of the step's own allocations at their highest, less the gradients of the parameters, which are there
whatever is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measure import Case, Work, peak_bytes

from pygen.flows import ActNorm, AffineCoupling, InvertibleLinear, Stack
from pygen.flows.glow import GlowConditioner
from pygen.flows.memory import MODES

DEPTHS = (8, 16, 32, 64)
WIDTH = 64


def glow_stack(depth: int, channels: int, memory: str) -> Stack:
    """Steps of a Glow with random couplings, those of a fresh one being identities."""
    torch.manual_seed(0)
    layers = []
    for _ in range(depth):
        conditioner = GlowConditioner(channels // 2, channels, WIDTH)
        torch.nn.init.normal_(conditioner.last.weight, std=0.01)
        coupling = AffineCoupling(conditioner, activation="sigmoid", offset=2.0)
        layers += [ActNorm(channels), InvertibleLinear(channels), coupling]
    return Stack(layers, memory=memory)


def cases(device: torch.device) -> Iterator[Case]:
    """8 to 64 steps on pictures of CIFAR's size, squeezed once. Fewer of them on a CPU."""
    n, channels, size = (64 if device.type == "cuda" else 16), 12, 16
    x = torch.randn(n, channels, size, size, device=device)

    def step(stack: Stack) -> None:
        stack.zero_grad(set_to_none=True)
        z, ladj = stack(x)
        (0.5 * z.square().sum() - ladj.sum()).backward()

    for depth in DEPTHS:
        stacks = {memory: glow_stack(depth, channels, memory).to(device) for memory in MODES}

        def peak(work: Work, stacks: dict[str, Stack] = stacks) -> int:
            for stack in stacks.values():
                stack.zero_grad(set_to_none=True)
            gradients = sum(p.numel() * p.element_size() for p in stacks["store"].parameters())
            return peak_bytes(work, device) - gradients

        works = {memory: lambda stack=stack: step(stack) for memory, stack in stacks.items()}
        yield Case(
            "Glow stack, forward + backward", f"{depth} steps, {n}x{channels}x{size}x{size}",
            works.pop("recompute"),
            works,
            peak=peak,
            peak_targets={"store": 10.0} if depth >= 32 else {},
        )  # fmt: skip
