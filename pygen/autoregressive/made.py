"""MADE of pictures: one masked network gives the logits of every element given those before it in raster order
(Germain et al. 2015, arXiv:1502.03509, section 4).

A hidden unit of degree d reads the first d elements. Sampling computes each unit once, when element d is known.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen.autoregressive.config import AutoregressiveConfig
from pygen.autoregressive.model import AutoregressiveModel
from pygen.autoregressive.state import State
from pygen.nn.made import DEGREES, MADE, MaskedLinear


@dataclasses.dataclass(frozen=True, kw_only=True)
class MADEConfig(AutoregressiveConfig):
    """What a MADE of pictures is made of.

    width: units of each hidden layer. layers: hidden layers.
    degrees: of the hidden units, "sequential" or "random"; see `pygen.nn.made.MADE`.
    """

    width: int = 500
    layers: int = 2
    degrees: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("width", "layers")
        if self.degrees not in DEGREES:
            raise ValueError(f"degrees is {self.degrees!r}, but expected one of {', '.join(DEGREES)}")


class MaskedAutoencoder(AutoregressiveModel):
    """An exact probability of discrete pictures, and samples element by element; see `AutoregressiveModel`."""

    config: MADEConfig

    def __init__(self, config: MADEConfig | None = None) -> None:
        config = config or MADEConfig()
        super().__init__(config)
        self.network = MADE(
            config.dimensions,
            width=config.width,
            blocks=config.layers - 1,
            per_input=config.levels,
            residual=False,
            classes=config.classes,
            degrees=config.degrees,
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(n, length, levels): the logits of each element in raster order; x as for `AutoregressiveModel.forward`."""
        out = self.network(x.movedim(1, -1).flatten(1), condition)
        return cast("Tensor", out.unflatten(1, (self.length, self.vocabulary)))

    @torch.no_grad()
    def start(
        self, n: int, *, condition: Tensor | None = None, guidance: float | None = None, length: int | None = None
    ) -> State:
        self.check_start(n, guidance, length)
        return MADEState(self, n, self.check_condition(condition, n))


class MADEState(State):
    """The elements (rows, length) so far, in [-1, 1], and the hidden units that they decide: (rows, width) a layer."""

    def __init__(self, model: MaskedAutoencoder, rows: int, condition: Tensor | None) -> None:
        super().__init__(rows, model.length)
        self.model = model
        network = model.network
        layers = [cast("MaskedLinear", layer) for layer in (network.first, *network.layers)]
        self.weights = [layer.weight * layer.mask for layer in layers]
        self.head = network.last.weight * network.last.mask
        context = network.features_of(condition)
        # What a unit starts from: its bias, and what the label adds, one row for all or one for each sample.
        self.offsets = [
            cast("Tensor", layer.bias).expand(rows, -1) if context is None else layer.bias + each(context)
            for layer, each in zip(layers, network.contexts if context is not None else layers, strict=True)
        ]
        degree = layers[0].mask.sum(1)
        self.units: list[list[Tensor]] = []  # by layer and degree
        for number, layer in enumerate(layers):
            if number:
                degree = torch.where(layer.mask, degree, 0).amax(1)
            by_degree = degree.argsort(stable=True)
            self.units.append(list(by_degree.split(torch.bincount(degree, minlength=model.length).tolist())))
        self.hidden = [torch.zeros_like(offset) for offset in self.offsets]
        self.x = self.hidden[0].new_zeros(rows, model.length)

    def first(self) -> Tensor:
        return self._logits(0)

    def feed(self, tokens: Tensor) -> Tensor:
        if self.position == 0:
            self._logits(0)
        found = []
        for number, token in enumerate(tokens.unbind(1), self.position + 1):
            self.x[:, number - 1] = self.model.dequantize(token)
            found.append(self._logits(number))
        return torch.stack(found, dim=1)

    def select(self, index: Tensor) -> None:
        index = index.to(self.x.device)
        self.x = self.x[index]
        self.hidden = [hidden[index] for hidden in self.hidden]
        self.offsets = [offset[index] for offset in self.offsets]

    def _logits(self, number: int) -> Tensor:
        """The logits (rows, vocabulary) of element `number`, after the units that the one before it completes."""
        below = self.x
        for weight, offset, hidden, units in zip(self.weights, self.offsets, self.hidden, self.units, strict=True):
            now = units[number]
            hidden[:, now] = F.relu(offset[:, now] + F.linear(below, weight[now]))
            below = hidden
        levels = self.model.vocabulary
        of_element = slice(number * levels, (number + 1) * levels)
        return F.linear(below, self.head[of_element], cast("Tensor", self.model.network.last.bias)[of_element])
