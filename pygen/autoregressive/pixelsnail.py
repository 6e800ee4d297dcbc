"""PixelSNAIL: gated residual blocks of causal convolutions, each few followed by attention to all pixels before.

Keys and values are of the pixels themselves and of what the convolutions made of them, queries of the latter; a pixel
attends to those strictly before it in raster order (Chen et al. 2018, arXiv:1712.09763, section 3 and figure 3).
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pygen.autoregressive.mixture import MixtureConfig, MixtureModel
from pygen.nn.gated_residual import GatedResidual, pointwise
from pygen.nn.masked import CausalConv2d, shift_down, shift_right


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelSNAILConfig(MixtureConfig):
    """What a PixelSNAIL is made of; the defaults are those of the paper's model of CIFAR-10.

    blocks: of convolutions and attention. layers: gated residual blocks of convolutions in each.
    width: channels. keys, values: channels of the keys and of the values of the attention.
    dropout: inside each residual block.
    """

    blocks: int = 12
    layers: int = 4
    width: int = 256
    keys: int = 16
    values: int = 128
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("blocks", "layers", "width", "keys", "values")
        self.require_probability("dropout")


class AttentionBlock(nn.Module):
    """Residual convolutions, then what attention finds among the pixels before.

    inputs: channels of the picture. places: height and width.
    """

    def __init__(self, config: PixelSNAILConfig) -> None:
        super().__init__()
        width, inputs = config.width, config.shape[0]
        options = {"classes": config.classes, "dropout": config.dropout}
        self.convolutions = nn.ModuleList(
            GatedResidual(width, before, **options)  # type: ignore[arg-type]
            for _ in range(config.layers)
        )
        of_content, of_query = inputs + width + 2, width + 2
        self.content = GatedResidual(of_content, pointwise, dropout=config.dropout)
        self.key_and_value = pointwise(of_content, config.keys + config.values)
        self.question = GatedResidual(of_query, pointwise, dropout=config.dropout)
        self.query = pointwise(of_query, config.keys)
        self.merge = GatedResidual(width, pointwise, skip=config.values, **options)  # type: ignore[arg-type]
        self.sizes = config.keys, config.values

    def forward(self, x: Tensor, picture: Tensor, place: Tensor, seen: Tensor, condition: Tensor | None) -> Tensor:
        """x (n, width, height, width') to the same shape; picture and place (n, channels, height, width'), seen bool
        (height * width', height * width'), which pixels each may attend to."""
        for block in self.convolutions:
            x = block(x, None, condition)
        key, value = self.key_and_value(self.content(torch.cat((picture, x, place), dim=1))).split(self.sizes, dim=1)
        query = self.query(self.question(torch.cat((x, place), dim=1)))
        query, key, value = (each.flatten(2).transpose(1, 2) for each in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return cast("Tensor", self.merge(x, found.transpose(1, 2).unflatten(2, x.shape[2:]), condition))


class PixelSNAIL(MixtureModel):
    """An exact probability of discrete pictures, and samples element by element; see `AutoregressiveModel`."""

    convolutional = True
    config: PixelSNAILConfig
    place: Tensor
    seen: Tensor

    def __init__(self, config: PixelSNAILConfig | None = None) -> None:
        config = config or PixelSNAILConfig()
        super().__init__(config)
        colours, height, width = config.shape
        self.row_above = weight_norm(CausalConv2d(colours + 1, config.width, (1, 3), centred=True))
        self.to_the_left = weight_norm(CausalConv2d(colours + 1, config.width, (2, 1), centred=False))
        self.blocks = nn.ModuleList(AttentionBlock(config) for _ in range(config.blocks))
        self.head = pointwise(config.width, config.parameters)
        rows, columns = torch.linspace(-0.5, 0.5, height), torch.linspace(-0.5, 0.5, width)
        place = torch.stack((rows[:, None].expand(height, width), columns.expand(height, width)))
        # Fixed by the configuration, so not part of a checkpoint.
        self.register_buffer("place", place, persistent=False)
        seen = torch.ones(height * width, height * width, dtype=torch.bool).tril(-1)
        self.register_buffer("seen", seen, persistent=False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The parameters of the mixture at each pixel; see `MixtureModel`."""
        # The ones tell the pixels from the zeros around the picture.
        picture = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
        state = shift_down(self.row_above(picture)) + shift_right(self.to_the_left(picture))
        place = self.place.expand(len(x), -1, -1, -1)
        for block in self.blocks:
            state = block(state, x, place, self.seen, condition)
        return cast("Tensor", self.head(F.elu(state)))


def before(in_channels: int, out_channels: int) -> nn.Module:
    """A convolution that reads the pixel, the one to its left, and the two above these."""
    return cast("nn.Module", weight_norm(CausalConv2d(in_channels, out_channels, (2, 2), centred=False)))
