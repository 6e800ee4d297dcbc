"""The diffusion step against eager PyTorch and torch.compile, without noise, with addressed noise, and backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from measure import Case, compiled
from torch import Tensor

from pygen import ops

# x_t -> x_s of DDIM: all but the noise.
ROW = [1.2, -0.7, 0.8, 0.0, 0.5, 0.3]


def eager(x: Tensor, e: Tensor, c: list[float]) -> Tensor:
    """What a scheduler does with coefficients that it has as Python numbers."""
    m0 = (c[0] * x + c[1] * e).clamp(-1, 1)
    return c[2] * m0 + c[3] * x + c[4] * e


def eager_noisy(x: Tensor, e: Tensor, c: list[float]) -> Tensor:
    """The same with PyTorch's own noise."""
    return eager(x, e, c) + c[5] * torch.randn_like(x)


def eager_table(x: Tensor, e: Tensor, table: Tensor, step: Tensor) -> Tensor:
    """Coefficients gathered from a table on the device, one row per sample, as training with mixed timesteps needs."""
    c = table[step].t().reshape(6, -1, 1, 1, 1)
    m0 = (c[0] * x + c[1] * e).clamp(-1, 1)
    return c[2] * m0 + c[3] * x + c[4] * e


def cases(device: torch.device) -> Iterator[Case]:
    """A call on a small tensor, a latent, a batch of latents, pictures."""
    table = torch.tensor([ROW] * 4, device=device)
    x, e = (torch.randn(4, 8, device=device) for _ in range(2))
    yield Case(
        "diffusion step", "(4, 8)",
        lambda: ops.diffusion_step(x, e, table, step=1, clip=1.0),
        {"eager": lambda: eager(x, e, ROW), "compiled": partial(compiled(eager), x, e, ROW)},
        targets={"call": 10.0},
    )  # fmt: skip
    shapes = [(1, 4, 64, 64), (8, 4, 64, 64), (4, 3, 256, 256), (16, 16, 128, 128)]
    if device.type == "cuda":
        shapes.append((64, 16, 128, 128))
    for shape in shapes:
        yield from on_shape(shape, device, table)


def on_shape(shape, device, table) -> Iterator[Case]:
    x, e = (torch.randn(shape, device=device) for _ in range(2))
    name = str(shape)
    moved = 3 * 4 * x.numel()
    target = {"compiled": 1.2, "eager": 2.0} if shape == (4, 3, 256, 256) else {}
    yield Case(
        "diffusion step", name,
        lambda: ops.diffusion_step(x, e, table, step=1, clip=1.0),
        {"eager": lambda: eager(x, e, ROW), "compiled": partial(compiled(eager), x, e, ROW)},
        moved, target,
    )  # fmt: skip
    steps = torch.arange(shape[0], device=device) % 4
    yield Case(
        "diffusion step, a step per sample", name,
        lambda: ops.diffusion_step(x, e, table, step=steps, clip=1.0),
        {
            "eager": lambda: eager_table(x, e, table, steps),
            "compiled": partial(compiled(eager_table), x, e, table, steps),
        },
        moved,
    )  # fmt: skip
    ids = torch.arange(shape[0], device=device)
    yield Case(
        "diffusion step, addressed noise", name,
        lambda: ops.diffusion_step(x, e, table, step=1, clip=1.0, seed=3, sample_ids=ids),
        {"eager, randn": lambda: eager_noisy(x, e, ROW), "compiled, randn": partial(compiled(eager_noisy), x, e, ROW)},
        moved,
    )  # fmt: skip
    half, half_e = x.bfloat16(), e.bfloat16()
    yield Case(
        "diffusion step, bfloat16", name,
        lambda: ops.diffusion_step(half, half_e, table, step=1, clip=1.0),
        {"eager": lambda: eager(half, half_e, ROW), "compiled": partial(compiled(eager), half, half_e, ROW)},
        moved // 2,
    )  # fmt: skip
    leaves = [torch.randn(shape, device=device).requires_grad_() for _ in range(2)]
    grad = torch.randn(shape, device=device)

    def train(function):
        return torch.autograd.grad(function(), leaves, grad)

    yield Case(
        "diffusion step forward + backward", name,
        lambda: train(lambda: ops.diffusion_step(*leaves, table, step=1, clip=1.0)),
        {
            "eager": lambda: train(lambda: eager(*leaves, ROW)),
            "compiled": partial(train, partial(compiled(eager), *leaves, ROW)),
        },
        # forward 3, backward reads x, e and the gradient and writes two
        8 * 4 * x.numel(),
    )  # fmt: skip
