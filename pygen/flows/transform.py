"""Invertible maps that know their log-determinant, and how they compose.

For y = f_k(... f_1(x)), log |det dy/dx| is the sum of the log-determinants of the steps. A transform's `forward` goes
from data to the prior, its `inverse` from the prior to data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from pygen.flows.memory import MODES, run
from pygen.model import Stage


class Transform(nn.Module):
    """`transform(x) -> (y, ladj)` and `transform.inverse(y) -> (x, ladj)`.

    x is (n, ...); ladj is (n,), in nats, float32 (float64 for float64), and of the direction taken: that of `inverse`
    at y is minus that of `forward` at x. `context` is what the map is conditioned on, with n rows: labels, features or
    pictures, as the conditioner inside takes them. A transform without a conditioner ignores it.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From data to the prior: y and log |det dy/dx|."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From the prior to data: x and log |det dx/dy|."""
        raise NotImplementedError(f"{type(self).__name__} does not define inverse")

    def steps(self) -> list[Transform]:
        """The parts that this transform runs one after another; itself where it is one step."""
        return [self]

    def lay_out(self, y: Tensor) -> Tensor:
        """y with its values where they came from in x, for a transform that moves values about (a squeeze, a
        permutation); y itself for one that changes them in place."""
        return y

    def arrange(self, x: Tensor) -> Tensor:
        """x with its values where they go to in y: what `lay_out` undoes."""
        return x

    def inverse_path(self, y: Tensor, context: Tensor | None = None) -> Iterator[Stage]:
        """The states on the way back from y, laid out as x is; the last is x."""
        yield Stage(type(self).__name__, self.inverse(y, context)[0])

    def __call__(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", super().__call__(x, context))


class Reshape(Transform):
    """A transform that moves values about and changes none: a subclass defines `arrange` and `lay_out`."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.arrange(x), _no_change(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.lay_out(y), _no_change(y)


class Inverse(Transform):
    """The same transform with its directions exchanged: an IAF out of a MAF, an unsqueeze out of a squeeze."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(y, context)

    def steps(self) -> list[Transform]:
        parts = self.transform.steps()
        return [self] if parts == [self.transform] else [Inverse(part) for part in reversed(parts)]

    def lay_out(self, y: Tensor) -> Tensor:
        return self.transform.arrange(y)

    def arrange(self, x: Tensor) -> Tensor:
        return self.transform.lay_out(x)


class Stack(Transform):
    """Transforms one after another, and what their training keeps in memory.

    memory:
        "store": what autograd keeps, activations of every layer. The fastest.
        "recompute": the input and the output alone. Backward rebuilds each step's input from its output by the
            inverse, so that memory does not grow with depth, for about one inverse and one forward more. Gradients are
            exact up to the round-off of the inverse; see `tolerance`.
        "checkpoint": the input of each step; what is inside a step is run again. For stacks whose inverse is inexact
            or expensive.
        Under `torch.compile`, which cannot trace the rebuilding, "recompute" does what "checkpoint" does; under the
        transforms of `torch.func` both do what "store" does.
    tolerance: with "recompute", how far a rebuilt sample may be from the real one, relative to its largest value (at
        least 1); under autocast at least four units of the narrow dtype. Beyond it the gradients are not to be trusted,
        and backward raises `RuntimeError`. None leaves the check out, and with it one comparison that on a GPU waits
        for the device.

    ValueError: memory is none of the three, or tolerance is negative.
    """

    def __init__(
        self, transforms: Iterable[Transform], *, memory: str = "store", tolerance: float | None = 1e-3
    ) -> None:
        super().__init__()
        if memory not in MODES:
            raise ValueError(f"memory is {memory!r}, but expected one of {', '.join(map(repr, MODES))}")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance is {tolerance}, but expected a number >= 0 or None")
        self.transforms = nn.ModuleList(transforms)
        self.memory = memory
        self.tolerance = tolerance

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        steps = list(self) if self.memory == "store" else self.steps()
        return run(steps, x, context, inverse=False, memory=self.memory, tolerance=self.tolerance)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        steps = list(self) if self.memory == "store" else self.steps()
        return run(steps[::-1], y, context, inverse=True, memory=self.memory, tolerance=self.tolerance)

    def steps(self) -> list[Transform]:
        return [step for transform in self for step in transform.steps()]

    def lay_out(self, y: Tensor) -> Tensor:
        for transform in reversed(list(self)):
            y = transform.lay_out(y)
        return y

    def arrange(self, x: Tensor) -> Tensor:
        for transform in self:
            x = transform.arrange(x)
        return x

    def inverse_path(self, y: Tensor, context: Tensor | None = None) -> Iterator[Stage]:
        transforms = list(self)
        for position in reversed(range(len(transforms))):
            for label, state in transforms[position].inverse_path(y, context):
                y = shown = state
                for earlier in reversed(transforms[:position]):
                    shown = earlier.lay_out(shown)
                yield Stage(f"{position + 1} {label}", shown)

    def __iter__(self) -> Iterator[Transform]:
        return cast("Iterator[Transform]", iter(self.transforms))

    def __len__(self) -> int:
        return len(self.transforms)

    def extra_repr(self) -> str:
        return f"memory={self.memory!r}"


class Step(Stack):
    """Transforms that count as one stop on the way: a normalization, a mixing of channels and a coupling, say."""

    def __init__(self, transforms: Iterable[Transform], name: str) -> None:
        super().__init__(transforms)
        self.name = name

    def inverse_path(self, y: Tensor, context: Tensor | None = None) -> Iterator[Stage]:
        yield Stage(self.name, self.inverse(y, context)[0])

    def extra_repr(self) -> str:
        return f"name={self.name!r}"


class FirstHalf(Transform):
    """A transform of the first ceil(c / 2) channels; the others stay as they are.

    Around what follows in a stack this is the factoring-out of Dinh et al. 2017 (arXiv:1605.08803, section 3.6): the
    second half has reached the prior.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, second = _halves(x)
        y, ladj = self.transform(first, context)
        return torch.cat((y, second), dim=1), ladj

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, second = _halves(y)
        x, ladj = self.transform.inverse(first, context)
        return torch.cat((x, second), dim=1), ladj

    def steps(self) -> list[Transform]:
        parts = self.transform.steps()
        if parts == [self.transform]:
            return [self]
        # Between steps both halves must have the shape that they have here: what reshapes the first half goes around
        # each of its steps.
        steps, around = [], list[Transform]()
        for part in parts:
            if around and _undoes(part, around[-1]):
                around.pop()
            elif _reshapes(part):
                around.append(part)
            else:
                steps.append([*around, part, *(Inverse(each) for each in reversed(around))])
        if around:
            steps.append(around)
        return [FirstHalf(step[0] if len(step) == 1 else Stack(step)) for step in steps]

    def lay_out(self, y: Tensor) -> Tensor:
        first, second = _halves(y)
        return torch.cat((self.transform.lay_out(first), second), dim=1)

    def arrange(self, x: Tensor) -> Tensor:
        first, second = _halves(x)
        return torch.cat((self.transform.arrange(first), second), dim=1)

    def inverse_path(self, y: Tensor, context: Tensor | None = None) -> Iterator[Stage]:
        first, second = _halves(y)
        for label, state in self.transform.inverse_path(first, context):
            yield Stage(label, torch.cat((state, second), dim=1))


def _reshapes(part: Transform) -> bool:
    return isinstance(part.transform if isinstance(part, Inverse) else part, Reshape)


def _undoes(part: Transform, other: Transform) -> bool:
    return (isinstance(part, Inverse) and part.transform is other) or (
        isinstance(other, Inverse) and other.transform is part
    )


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() < 2 or x.shape[1] < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, c, ...) with at least two channels")
    first, second = x.tensor_split(((x.shape[1] + 1) // 2,), dim=1)
    return first, second


def _no_change(x: Tensor) -> Tensor:
    return x.new_zeros(len(x), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
