"""How a drop-in is held against the library it stands in for: outputs, log-determinants and gradients.

In float64 both must agree. In float32 the drop-in may not be further from the library's float64 than the library's own
float32 is, give or take what the rounding of the inputs and parameters makes of the result, and of a few operations.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 2.0**-23
# What a result may be off beside that, in units of its size.
ROUNDINGS = 100 * EPSILON


def results(layer: nn.Module, method: str, x: Tensor, *more: Any, seed: int = 0) -> list[Tensor]:
    """y, ladj, and the gradients of both together by x and by the layer's parameters."""
    x = x.detach().requires_grad_()
    y, ladj = getattr(layer, method)(x, *more)
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum()
        for out in (y, ladj)
    )
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    zeros = (torch.zeros_like(p) if g is None else g for g, p in zip(gradients, wanted, strict=True))
    return [y.detach(), ladj.detach(), *zeros]


def assert_same(ours: list[Tensor], theirs: list[Tensor], *, tolerance: float = 1e-8) -> None:
    """Agreement in float64, relative to the size of each result."""
    assert len(ours) == len(theirs)
    for position, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.shape == other.shape, f"result {position}: {tuple(mine.shape)} and {tuple(other.shape)}"
        assert mine.dtype == other.dtype, f"result {position}: {mine.dtype} and {other.dtype}"
        size = max(1.0, error(other, torch.zeros(())))
        assert error(mine, other) <= tolerance * size, f"result {position} differs by {error(mine, other)}"


def error(value: Tensor, exact: Tensor) -> float:
    """The largest difference."""
    return float((value.detach().double() - exact.detach().double()).abs().max()) if value.numel() else 0.0


def compare(
    layer: nn.Module,
    use: Callable[[nn.Module], Any],
    method: str,
    x: Tensor,
    *more: Tensor | None,
    tolerance: float = 1e-8,
    undo: str | None = None,
) -> None:
    """Hold a layer of float64 against itself with the drop-in in use: `use(layer)` returns the handle.

    undo: the method that undoes this one, where the drop-in makes gradients of the result: what the result's rounding
        makes of them counts then, too.
    """

    def of(dtype: torch.dtype, with_drop_in: bool, noise: float = 0.0, x: Tensor = x) -> list[Tensor]:
        copied = copy.deepcopy(layer)
        tensors = [None if tensor is None else tensor.clone() for tensor in (x, *more)]
        if noise:
            with torch.no_grad():
                for tensor in (*tensors, *copied.parameters()):
                    if tensor is not None:
                        tensor.mul_(1 + noise * torch.randn_like(tensor))
        copied = copied.to(dtype)
        inputs = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        if not with_drop_in:
            return results(copied, method, *inputs)
        with use(copied):
            return results(copied, method, *inputs)

    exact = of(torch.float64, False)
    assert_same(of(torch.float64, True), exact, tolerance=tolerance)
    inexact = [of(torch.float32, False), *(of(torch.float64, False, EPSILON) for _ in range(2))]
    if undo is not None:
        for _ in range(5):
            with torch.no_grad():
                # Of the result, and of what it is held against, such as a spline's knot.
                y = exact[0] * (1 + 2 * EPSILON * torch.randn_like(exact[0]))
                moved = getattr(copy.deepcopy(layer), undo)(y, *more)[0]
            inexact.append(of(torch.float64, False, x=moved))
    for position, (mine, true, *others) in enumerate(zip(of(torch.float32, True), exact, *inexact, strict=True)):
        size = max(1.0, error(true, torch.zeros(())))
        allowed = 3 * max(error(other, true) for other in others) + ROUNDINGS * size
        assert error(mine, true) <= allowed, f"result {position}: off by {error(mine, true)}, allowed are {allowed}"


def attributes(library: str) -> dict[tuple[str, str], int]:
    """The identity of everything that the modules and classes of a library hold."""
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == library}
    owners = modules | {
        f"{value.__module__}.{value.__qualname__}": value
        for module in modules.values()
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.partition(".")[0] == library
    }
    return {(path, name): id(value) for path, owner in owners.items() for name, value in vars(owner).items()}


def state(model: nn.Module) -> dict[str, tuple[int, type]]:
    """What of a model an undone conversion must not have touched: every tensor, and every module's class."""
    tensors = {name: (tensor.data_ptr(), type(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}
    modules = {
        f"{name}: {key}": (id(value), type(module))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }
    return tensors | modules
