"""Addressed noise against torch.randn and torch.rand, which promise less: their numbers depend on batch and device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measure import Case

from pygen import ops


def cases(device: torch.device) -> Iterator[Case]:
    """Noise of small samples, of a latent, of pictures; the floor is one write of the output."""
    shapes = [(64, 8, 8), (1, 4, 64, 64), (8, 4, 64, 64), (4, 3, 256, 256), (16, 16, 128, 128)]
    if device.type == "cuda":
        shapes.append((64, 16, 128, 128))
    for shape in shapes:
        ids = torch.arange(shape[0], device=device)
        yield Case(
            "noise", str(shape),
            lambda shape=shape, ids=ids: ops.noise(ids, shape[1:], seed=3),
            {"torch.randn": lambda shape=shape: torch.randn(shape, device=device)},
            4 * ids.numel() * torch.Size(shape[1:]).numel(),
        )  # fmt: skip
    shape = (4, 3, 256, 256)
    ids = torch.arange(4, device=device)
    elements = 4 * 3 * 256 * 256
    yield Case(
        "noise, bfloat16", str(shape),
        lambda: ops.noise(ids, shape[1:], seed=3, dtype=torch.bfloat16),
        {"torch.randn": lambda: torch.randn(shape, device=device, dtype=torch.bfloat16)},
        2 * elements,
    )  # fmt: skip
    yield Case(
        "uniform noise", str(shape),
        lambda: ops.uniform(ids, shape[1:], seed=3),
        {"torch.rand": lambda: torch.rand(shape, device=device)},
        4 * elements,
    )  # fmt: skip
