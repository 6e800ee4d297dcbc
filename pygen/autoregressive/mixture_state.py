"""Steps through the levels of pixels that are drawn from a discretized mixture of logistics; see mixture.py."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pygen.autoregressive.state import State
from pygen.ops.logistics import level_log_prob


class MixtureState(State):
    """The state of a network, whose outputs are the parameters of the pixel of each element, and what is drawn of the
    pixels; its logits are those of the element's levels.

    network: gives outputs (rows, block, parameters). values: (levels,), what each token is as a colour.
    parameters: (rows, parameters) of the pixel whose element comes next. tokens: int64 (rows, length).
    """

    def __init__(self, network: State, colours: int, values: Tensor) -> None:
        super().__init__(network.rows, network.length)
        self.network, self.colours, self.values = network, colours, values
        self.tokens = torch.zeros(self.rows, self.length, dtype=torch.int64, device=values.device)
        self.parameters = values.new_zeros(self.rows, 0)

    def first(self) -> Tensor:
        self.parameters = self.network.advance(None)
        return self._logits(self.parameters[:, None], 0)[:, 0]

    def feed(self, tokens: Tensor) -> Tensor:
        begin, end = self.position, self.position + tokens.shape[1]
        self.tokens[:, begin:end] = tokens
        parameters = self.network.advance(tokens)
        self.parameters = parameters[:, -1]
        return self._logits(parameters, begin + 1)

    def forget(self, position: int) -> None:
        self.network.crop(position)

    def copy(self) -> MixtureState:
        other = copy.copy(self)
        other.network = self.network.copy()
        return other

    def select(self, index: Tensor) -> None:
        self.network.reorder(index)
        index = index.to(self.tokens.device)
        self.tokens, self.parameters = self.tokens[index], self.parameters[index]

    def pixel(self) -> Tensor:
        """The colours (rows, colours) in [-1, 1] of the pixel whose element comes next; those that are not there yet
        are whatever."""
        return self._pixel(self.position)

    def _pixel(self, element: int) -> Tensor:
        """The colours (rows, colours) of the pixel of an element."""
        begin = element // self.colours * self.colours
        return self.values[self.tokens[:, begin : begin + self.colours]]

    def _logits(self, parameters: Tensor, begin: int) -> Tensor:
        """The logits (rows, block, levels) of the elements from `begin` on, from (rows, block, parameters).

        One pixel at a time: PyTorch's sums over other shapes round otherwise, and the bits are not to depend on how
        many tokens are fed at once. Elements of a pixel have its parameters in common, and do not read later ones.
        """
        colours, end = self.colours, begin + parameters.shape[1]
        found = []
        for first in range(begin // colours * colours, end, colours):
            own = parameters[:, max(first - begin, 0)].contiguous()
            every = level_log_prob(self._pixel(first), own, levels=len(self.values))
            found.append(every[:, max(begin - first, 0) : end - first])
        return torch.cat(found, dim=1)
