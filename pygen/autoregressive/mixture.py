"""Pixels from a discretized mixture of logistics, whose parameters a network reads off the pixels before.

The components are the pixel's; a colour is drawn from the component's logistic, rounded to a level, where the component
has the probability that the earlier colours leave it, and they move its mean (Salimans et al. 2017, PixelCNN++,
arXiv:1701.05517, eq. 1-3; `ops.discretized_logistics_log_prob`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pygen import ops
from pygen.autoregressive.config import AutoregressiveConfig
from pygen.autoregressive.mixture_state import MixtureState
from pygen.autoregressive.model import AutoregressiveModel
from pygen.autoregressive.sampling import Sampling
from pygen.autoregressive.state import PrefixState, State
from pygen.ops.logistics import level_log_prob


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig(AutoregressiveConfig):
    """What a model of pixels from a mixture of logistics needs to know.

    mixtures: components of the mixture.
    """

    mixtures: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape[0] not in (1, 3):
            raise ValueError(f"shape has {self.shape[0]} channels, but expected 1 or 3")
        self.require_positive("mixtures")

    @property
    def parameters(self) -> int:
        """Parameters of the mixture of one pixel."""
        return (3 if self.shape[0] == 1 else 10) * self.mixtures


class MixtureModel(AutoregressiveModel):
    """An exact probability of discrete pictures, and samples element by element, by mixtures of logistics.

    `forward` returns the parameters (n, parameters, height, width) of each pixel, as
    `ops.discretized_logistics_log_prob` takes them. Elements are drawn from the mixture itself, by
    `ops.sample_discretized_logistics`; with a temperature or a filter, from the logits of their levels.
    """

    logistics = True
    uniform_word = 2  # the first two words of a draw choose the component, the others the value
    config: MixtureConfig

    def logits(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """(n, length, vocabulary) log-probabilities of each element given those before it, all at once."""
        x = self.check_pictures(x)
        parameters = self(x, self.check_condition(condition, len(x)))
        by_level = level_log_prob(x, parameters, levels=self.config.levels)
        return by_level.permute(0, 3, 4, 1, 2).flatten(1, 3)

    def token_log_prob(self, tokens: Tensor, *, condition: Tensor | None = None) -> Tensor:
        x = self.pictures(self.check_tokens(tokens))
        parameters = self(x, self.check_condition(condition, len(x)))
        return ops.discretized_logistics_log_prob(x, parameters, levels=self.config.levels).flatten(1).sum(1)

    @torch.no_grad()
    def start(
        self, n: int, *, condition: Tensor | None = None, guidance: float | None = None, length: int | None = None
    ) -> State:
        self.check_start(n, guidance, length)
        condition = self.check_condition(condition, n)
        converted = self.converted()
        if converted is not None:
            return converted.start(n, condition=condition)
        levels = torch.arange(self.config.levels, device=self.device)
        network = PrefixState(self, n, condition, self._pixel_parameters)
        return MixtureState(network, self.config.shape[0], self.dequantize(levels))

    def draw(self, logits: Tensor, state: State, how: Sampling, position: int) -> tuple[Tensor, Tensor]:
        if how.filtered or not isinstance(state, MixtureState):
            return super().draw(logits, state, how, position)
        colours, levels = self.config.shape[0], self.config.levels
        colour = position % colours
        x = state.pixel()
        drawn, log_prob = ops.sample_discretized_logistics(
            state.parameters, seed=how.seed, sample_ids=how.ids, position=position - colour, colours=colours,
            levels=levels, x=x, known=(torch.arange(colours, device=x.device) < colour).expand_as(x),
        )  # fmt: skip
        value = drawn[:, colour]
        return torch.where(value.isnan(), -1, self.quantize(value)), log_prob[:, colour]

    def _pixel_parameters(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        """The parameters of each token's pixel, (n, length, parameters)."""
        parameters = self(self.pictures(tokens), condition).flatten(2).transpose(1, 2)
        return parameters.repeat_interleave(self.config.shape[0], dim=1)  # type: ignore[no-any-return]
