"""Affine coupling against eager PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from measure import Case, compiled
from torch import Tensor

from pygen import ops


def eager(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """What a flow library does: three elementwise passes and a sum."""
    return x * raw_scale.exp() + shift, raw_scale.sum(-1)


def nflows_style(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of nflows: sigmoid(u + 2) + 1e-3."""
    scale = torch.sigmoid(raw_scale + 2) + 1e-3
    return x * scale + shift, scale.log().sum(-1)


def cases(device: torch.device) -> Iterator[Case]:
    """Small calls, a training batch and a sampling batch."""
    shapes = [(4, 8), (64, 3072), (64, 49_152)]
    if device.type == "cuda":
        shapes.append((256, 65_536))
    for rows, width in shapes:
        x, raw, shift = (torch.randn(rows, width, device=device) for _ in range(3))
        targets = {"eager": 2.0, "compiled": 1.0} if width == 49_152 else {}
        if width == 8:
            targets = {"call": 10.0}
        moved = 4 * (4 * x.numel() + rows)
        yield Case(
            "affine forward", f"({rows}, {width})",
            lambda x=x, raw=raw, shift=shift: ops.affine(x, raw, shift),
            {
                "eager": lambda x=x, raw=raw, shift=shift: eager(x, raw, shift),
                "compiled": partial(compiled(eager), x, raw, shift),
            },
            moved, targets,
        )  # fmt: skip
        if width == 8:
            continue
        yield Case(
            "affine forward, sigmoid + epsilon", f"({rows}, {width})",
            lambda x=x, raw=raw, shift=shift: ops.affine(
                x, raw, shift, activation="sigmoid", offset=2.0, epsilon=1e-3
            ),
            {
                "eager": lambda x=x, raw=raw, shift=shift: nflows_style(x, raw, shift),
                "compiled": partial(compiled(nflows_style), x, raw, shift),
            },
            moved,
        )  # fmt: skip
        leaves = [t.requires_grad_() for t in (torch.randn(rows, width, device=device) for _ in range(3))]
        grad_y, grad_ladj = torch.randn(rows, width, device=device), torch.randn(rows, device=device)

        def train(function: object, leaves: list[Tensor] = leaves, grads: tuple[Tensor, Tensor] = (grad_y, grad_ladj)):
            return torch.autograd.grad(function(*leaves), leaves, grads)

        yield Case(
            "affine forward + backward", f"({rows}, {width})",
            lambda train=train: train(ops.affine),
            {
                "eager": lambda train=train: train(eager),
                "compiled": partial(train, compiled(eager)),
            },
            # forward 4, backward reads x, raw and grad_y, writes grad_x and grad_raw; grad_shift is grad_y itself
            4 * 9 * x.numel(),
        )  # fmt: skip
