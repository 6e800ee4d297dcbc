"""Pixels from a discretized mixture of logistics, whose parameters a network reads off the pixels before.

A colour c with value x falls into its level with probability sum_m w_m [s((x + d - mu_m) / s_m) - s((x - d - mu_m) /
s_m)], s the logistic function, d half a level; the lowest and the highest level reach to infinity. The components are
the pixel's, the means of later colours are linear in the earlier ones, and w_m is the component's probability given
these (Salimans et al. 2017, PixelCNN++, arXiv:1701.05517, eq. 1-3).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen.autoregressive.model import AutoregressiveConfig, AutoregressiveModel

_LEAST_LOG_SCALE = -7.0


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

    `forward` returns the parameters (n, parameters, height, width) of each pixel: `mixtures` logits, then for each
    colour as many means, log-scales and, for three colours, coefficients of the earlier colours.
    """

    config: MixtureConfig

    def logits(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """(n, length, vocabulary) log-probabilities of each element given those before it, all at once."""
        x = self.check_pictures(x)
        parameters = self(x, self.check_condition(condition, len(x)))
        return level_log_prob(x, parameters, self.config.levels).permute(0, 3, 4, 1, 2).flatten(1, 3)


def level_log_prob(x: Tensor, parameters: Tensor, levels: int) -> Tensor:
    """log P(level | the colours before it at the pixel), (n, colours, levels, height, width), in nats.

    x: (n, colours, height, width), colours 1 or 3, in [-1, 1]. parameters: (n, 3 M or 10 M, height, width).

    Arithmetic is in float32 (float64 for float64).
    """
    colours = x.shape[1]
    compute = torch.float64 if parameters.dtype == torch.float64 else torch.float32
    x, parameters = x.to(compute), parameters.to(compute)
    mixtures = parameters.shape[1] // (3 if colours == 1 else 10)
    weight = parameters[:, :mixtures].log_softmax(1)
    of_colours = parameters[:, mixtures:].unflatten(1, (colours, -1, mixtures))
    level = torch.arange(levels - 1, device=x.device, dtype=compute)
    # The upper end of every level but the last, as (levels - 1, 1, 1, 1) beside (n, 1, mixtures, height, width).
    edges = ((2 * level + 1) / (levels - 1) - 1)[:, None, None, None]
    found = []
    for colour in range(colours):
        mean, log_scale = of_colours[:, colour, 0], of_colours[:, colour, 1].clamp_min(_LEAST_LOG_SCALE)
        for before in range(colour):
            # Coefficients are those of green on red, blue on red and blue on green.
            mean = mean + of_colours[:, colour + before - 1, 2].tanh() * x[:, before : before + 1]
        inverse_scale = (-log_scale).exp()
        at_edge = (edges - mean[:, None]) * inverse_scale[:, None]
        below, above = F.logsigmoid(at_edge), F.logsigmoid(-at_edge)
        # s(b) - s(a) = s(b) s(-a) (1 - e^(a - b)), where b - a is the same for every level but the two at the ends.
        share = torch.log(-torch.expm1(-2 / (levels - 1) * inverse_scale))[:, None]
        inner = below[:, 1:] + above[:, :-1] + share
        by_component = torch.cat((below[:, :1], inner, above[:, -1:]), dim=1)
        found.append((weight[:, None] + by_component).logsumexp(2) - weight[:, None].logsumexp(2))
        if colour + 1 < colours:
            own = ((x[:, colour].clamp(-1, 1) + 1) * ((levels - 1) / 2)).round().long()
            index = own[:, None, None].expand(-1, -1, mixtures, -1, -1)
            weight = weight + by_component.gather(1, index).squeeze(1)
    return torch.stack(found, dim=1)
