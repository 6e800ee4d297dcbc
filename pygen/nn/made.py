"""Masked networks whose output i reads the inputs before i alone (Germain et al. 2015, MADE, arXiv:1502.03509).

Each unit has a degree: how many of the inputs, in their order, it may depend on. A weight from degree a to degree b is
allowed where b >= a, and into an output of input number d (from 1) where d > a (eq. 13-14). Residual blocks keep the
degrees of what they add to (Nash & Durkan 2019, ResMADE, arXiv:1904.05626, section 4.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.ops.masked_network import MaskedNetwork

DEGREES = ("sequential", "random")


class MaskedLinear(nn.Linear):
    """x (*, in) -> x (weight * mask)^T + bias (*, out). mask: bool (out, in), True where a weight counts."""

    mask: Tensor

    def __init__(self, mask: Tensor, *, bias: bool = True) -> None:
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}, but expected (out, in), torch.bool"
            )
        super().__init__(mask.shape[1], mask.shape[0], bias=bias)
        # Fixed by the arguments, so not part of a checkpoint.
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """x (n, features) -> (n, features * per_input), the parameters of an input side by side; zero at the start.

    width: units of each hidden layer. blocks: residual blocks of two layers, or without `residual` hidden layers.
    per_input: outputs of each input, such as 2 for a raw scale and a shift.
    context: length of a context (n, context) of features; or classes: number of labels of a context int64 (n,).
    activation: a key of `pygen.ops.masked_units.ACTIVATIONS`.
    degrees: of the hidden units, "sequential" (1, 2, ... over and over) or "random" (uniform, drawn by `seed`). With a
        context they begin at 0.
    order: the inputs, each once, in the order in which they come; 0, 1, ... where left out.

    `network` is what `pygen.ops.masked_inverse` takes. Where parameters get no gradient, their products with the masks
    are kept until one changes; after writing through `.data`, call `train()` or `eval()`.

    ValueError: a number is out of its range, a name is unknown, or order does not have each input once.
    """

    def __init__(
        self,
        features: int,
        *,
        width: int = 64,
        blocks: int = 2,
        per_input: int = 2,
        residual: bool = True,
        context: int = 0,
        classes: int | None = None,
        activation: str = "relu",
        degrees: str = "sequential",
        order: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("features", features, 1), ("width", width, 1), ("blocks", blocks, 0), ("per_input", per_input, 1),
            ("context", context, 0), ("classes", 1 if classes is None else classes, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} is {value}, but expected a number of at least {least}")
        if context and classes is not None:
            raise ValueError(f"context is {context} and classes is {classes}, but expected one of them at most")
        if degrees not in DEGREES:
            raise ValueError(f"degrees is {degrees!r}, but expected one of {', '.join(DEGREES)}")
        if order is not None and sorted(order) != list(range(features)):
            raise ValueError(f"order is {list(order)}, but expected each of 0 to {features - 1} once")
        self.features = features
        self.classes = classes
        self.residual = residual
        self.activation = activation
        generator = torch.Generator().manual_seed(seed)
        conditions = context if classes is None else classes
        # No output may read the last input; only units of degree 0 bring the context to the first.
        top, lowest = features - 1, 0 if conditions else min(1, features - 1)

        def draw() -> Tensor:
            if degrees == "random":
                return torch.randint(lowest, top + 1, (width,), generator=generator)
            return torch.arange(width) % (top + 1 - lowest) + lowest

        own = torch.arange(1, features + 1)
        if order is not None:
            own = torch.empty_like(own).scatter_(0, torch.tensor(order), own)
        outputs = own.repeat_interleave(per_input)
        hidden = [draw() for _ in range(1 + blocks)]
        self.first = _masked(own, hidden[0])
        self.layers = nn.ModuleList()
        for below, above in itertools.pairwise(hidden):
            if residual:
                self.layers += [_masked(hidden[0], above), _silent(_masked(above, hidden[0]))]
            else:
                self.layers.append(_masked(below, above))
        last = hidden[0] if residual else hidden[-1]
        self.last = _silent(MaskedLinear(outputs[:, None] > last))
        self.contexts = nn.ModuleList(
            nn.Linear(conditions, width, bias=False) for _ in range(1 + blocks if conditions else 0)
        )
        self.network = self._describe(MaskedNetwork(features, conditions))

    def _describe(self, network: MaskedNetwork) -> MaskedNetwork:
        contexts = iter(self.contexts)

        def conditioned(h: int) -> int:
            layer = next(contexts, None)
            return h if layer is None else network.add(h, network.linear(network.context, layer))

        h = conditioned(network.linear(network.x, self.first))
        step = 2 if self.residual else 1
        for k in range(0, len(self.layers), step):
            t = conditioned(network.linear(network.activation(h, self.activation), self.layers[k]))
            if self.residual:
                t = network.linear(network.activation(t, self.activation), self.layers[k + 1])
            h = network.add(h, t) if self.residual else t
        network.linear(network.activation(h, self.activation), self.last)
        return network

    def features_of(self, context: Tensor | None) -> Tensor | None:
        """The context as the network reads it: labels become vectors of zeros with a one."""
        if context is None or self.classes is None:
            return context
        if context.dtype != torch.int64:
            raise TypeError(f"context has dtype {context.dtype}, but expected int64 labels")
        return F.one_hot(context, self.classes).to(self.first.weight.dtype)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The parameters (n, features * per_input) for x (n, features) and a context as described above."""
        if (context is not None) != (self.network.context_features > 0):
            given, expected = ("None", "one") if context is None else ("given", "none")
            raise ValueError(f"context is {given}, but the network was built for {expected}")
        return self.network(x, self.features_of(context))

    def train(self, mode: bool = True) -> MADE:
        self.network.forget()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"features={self.features}, residual={self.residual}, activation={self.activation!r}"


def _masked(below: Tensor, above: Tensor) -> MaskedLinear:
    return MaskedLinear(above[:, None] >= below)


def _silent(layer: MaskedLinear) -> MaskedLinear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
