"""Networks of linear layers that read a vector and, where there is one, a context: conditioners of flows on tables.

The last layer starts at zero, so that a coupling starts as the identity. A context, labels or features, is added before
the first nonlinearity, and in each block of a residual network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class ContextLayer(nn.Module):
    """The context as a vector (n, width) that starts small: an embedding of labels, or a linear map of features.

    features: of a context (n, features). classes: number of labels of a context int64 (n,). Without either there is no
        context, and the layer says so when it is given one.
    """

    def __init__(self, width: int, *, features: int = 0, classes: int | None = None) -> None:
        super().__init__()
        if features < 0:
            raise ValueError(f"features is {features}, but expected a number of at least 0")
        if features and classes is not None:
            raise ValueError(f"features is {features} and classes is {classes}, but expected one of them at most")
        self.layer: nn.Module | None = None
        if features:
            self.layer = nn.Linear(features, width)
        elif classes is not None:
            self.layer = nn.Embedding(classes, width)
            nn.init.normal_(self.layer.weight, std=width**-0.5)

    def add(self, hidden: Tensor, context: Tensor | None) -> Tensor:
        """hidden (n, width) plus what the context says, (n, width)."""
        if (context is None) != (self.layer is None):
            has, expected = ("None", "one") if context is None else ("given", "none")
            raise ValueError(f"context is {has}, but the network was built for {expected}")
        return hidden if self.layer is None else hidden + self.layer(context)


class MLP(nn.Module):
    """(n, inputs) -> (n, outputs) by linear layers and rectifiers, zero at the start of training.

    hidden: the width of each hidden layer. context, classes: see `ContextLayer`.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: Sequence[int], *, context: int = 0, classes: int | None = None
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("hidden is empty, but expected the width of at least one layer")
        sizes = (inputs, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, hidden, strict=False))
        self.context = ContextLayer(hidden[0], features=context, classes=classes)
        self.head = _silent(nn.Linear(hidden[-1], outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (n, inputs); context (n, features), int64 labels (n,), or None."""
        first, *others = self.hidden
        hidden = F.relu(self.context.add(first(x), context))
        for layer in others:
            hidden = F.relu(layer(hidden))
        return cast(Tensor, self.head(hidden))


class ResidualMLP(nn.Module):
    """(n, inputs) -> (n, outputs) by pre-activation residual blocks, zero at the start of training.

    width: of the hidden layers. blocks: residual blocks. dropout: inside each block. context, classes: see
    `ContextLayer`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 64,
        blocks: int = 2,
        dropout: float = 0.0,
        context: int = 0,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.context = ContextLayer(width, features=context, classes=classes)
        self.blocks = nn.ModuleList(
            ResidualMLPBlock(width, dropout, context=context, classes=classes) for _ in range(blocks)
        )
        self.head = _silent(nn.Linear(width, outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (n, inputs); context (n, features), int64 labels (n,), or None."""
        hidden = self.context.add(self.stem(x), context)
        for block in self.blocks:
            hidden = block(hidden, context)
        return cast(Tensor, self.head(hidden))


class ResidualMLPBlock(nn.Module):
    """x + linear(dropout(relu(linear(relu(x)) + context))), shape (n, width)."""

    def __init__(self, width: int, dropout: float, *, context: int, classes: int | None) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.context = ContextLayer(width, features=context, classes=classes)
        self.dropout = dropout
        self.second = _silent(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.context.add(self.first(F.relu(x)), context)
        return x + self.second(F.dropout(F.relu(hidden), self.dropout, self.training))  # type: ignore[no-any-return]


def _silent(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
