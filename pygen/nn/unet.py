"""U-Net (Ronneberger et al. 2015, arXiv:1505.04597) of residual blocks that are told the time and the class.

Time and class become one embedding, and every block scales and shifts its normalized features by it
(Perez et al. 2018, arXiv:1709.07871; Dhariwal & Nichol 2021, arXiv:2105.05233, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def depth_for(height: int, width: int, deepest: int = 4) -> int:
    """How many resolutions a picture carries if each halves the last and the smaller side stays >= `deepest`."""
    return max(1, int(math.log2(max(1.0, min(height, width) / deepest))) + 1)


def normalization(channels: int) -> nn.GroupNorm:
    """Group normalization in at most 8 groups of at least 4 channels: one channel at one position has no spread."""
    groups = max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels // g >= 4))
    return nn.GroupNorm(groups, channels)


class TimeEmbedding(nn.Module):
    """Sines and cosines of a real-valued time at geometric frequencies (Vaswani et al. 2017, section 3.5), then an MLP.

    The frequencies run from 0.05 to 10 radians per unit, for times of order 1 to 20 such as log signal-to-noise ratios.
    """

    frequencies: Tensor

    def __init__(self, features: int, *, count: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(math.log10(0.05), 1.0, count), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * count, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, time: Tensor) -> Tensor:
        """(n, features) of times (n,)."""
        angle = time[:, None] * self.frequencies
        embedded: Tensor = self.mlp(torch.cat((angle.sin(), angle.cos()), 1))
        return embedded


class ConditionedBlock(nn.Module):
    """x + conv(film(norm(conv(norm(x))))), where film(h) = h (1 + scale) + shift of the embedding."""

    def __init__(self, in_channels: int, out_channels: int, features: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_in = normalization(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(features, 2 * out_channels)
        self.norm_out = normalization(out_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        # Each block starts as its shortcut, so that depth costs nothing at the start.
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, out_channels, height, width) of x (n, in_channels, height, width), embedding (n, features)."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, 1)
        h = F.silu(torch.addcmul(shift, self.norm_out(h), 1 + scale))
        out: Tensor = self.shortcut(x) + self.conv_out(self.dropout(h))
        return out


class SelfAttention(nn.Module):
    """x + attention among all positions of a feature map, with heads of 32 channels where they divide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 32) if channels % 32 == 0 else 1
        self.norm = normalization(channels)
        self.project_in = nn.Conv2d(channels, 3 * channels, 1)
        self.project_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.project_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as x (n, channels, height, width)."""
        n, channels, height, width = x.shape
        packed = self.project_in(self.norm(x)).reshape(n, 3, self.heads, channels // self.heads, height * width)
        query, key, value = packed.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = x + self.project_out(mixed.transpose(-1, -2).reshape(n, channels, height, width))
        return out


class UNet(nn.Module):
    """A map of pictures (n, in_channels, height, width) to (n, out_channels, height, width), given time and class.

    Any height and width >= 1: a halving rounds up, and the way back is resized to the picture it joins.

    width: channels at full resolution; `multipliers[i]` times as many at the i-th resolution.
    blocks: residual blocks at each resolution, on the way down and again on the way up.
    classes: number of labels, or None.
    attention: self-attention at the lowest resolution.
    dropout: of whole feature maps, in every block between its convolutions.
    The last layer starts at zero, and so does the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        classes: int | None = None,
        attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, width, blocks, len(multipliers), *multipliers) < 1:
            raise ValueError(
                f"in_channels, out_channels, width, blocks and multipliers are {in_channels}, {out_channels}, {width}, "
                f"{blocks} and {tuple(multipliers)}, but expected positive numbers"
            )
        features = 4 * width
        self.classes = classes
        self.time = TimeEmbedding(features)
        self.label = nn.Embedding(classes, features) if classes is not None else None
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)

        widths = [width * multiplier for multiplier in multipliers]
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        skips = []
        channels = width
        for level, level_width in enumerate(widths):
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(ConditionedBlock(channels, level_width, features, dropout=dropout))
                channels = level_width
                skips.append(channels)
            self.down.append(stage)
            if level + 1 < len(widths):
                self.shrink.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))

        self.middle = ConditionedBlock(channels, channels, features, dropout=dropout)
        self.attention = SelfAttention(channels) if attention else nn.Identity()

        self.up = nn.ModuleList()
        self.grow = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(ConditionedBlock(channels + skips.pop(), level_width, features, dropout=dropout))
                channels = level_width
            self.up.append(stage)
            if level > 0:
                self.grow.append(nn.Conv2d(channels, widths[level - 1], 3, padding=1))
                channels = widths[level - 1]

        self.norm = normalization(channels)
        self.head = nn.Conv2d(channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        """The output for x (n, in_channels, height, width) at times (n,), of order 1 to 20.

        condition: int64 (n,) labels; needed if and only if the network was built with classes.
        """
        if (condition is None) != (self.label is None):
            given = "None" if condition is None else "given"
            raise ValueError(f"condition is {given}, but the network was built with classes={self.classes}")
        embedding = self.time(time)
        if self.label is not None:
            embedding = embedding + self.label(condition)
        embedding = F.silu(embedding)

        h = self.stem(x)
        skips = []
        for level, stage in enumerate(self.down):
            for block in stage:  # type: ignore[attr-defined]
                h = block(h, embedding)
                skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.attention(self.middle(h, embedding))
        for level, stage in enumerate(self.up):
            for block in stage:  # type: ignore[attr-defined]
                h = block(torch.cat((h, skips.pop()), 1), embedding)
            if level < len(self.grow):
                h = self.grow[level](F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest"))
        out: Tensor = self.head(F.silu(self.norm(h)))
        return out
