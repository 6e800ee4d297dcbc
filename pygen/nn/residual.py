"""Residual convolutional networks between pictures and vectors, shared by the GAN and the VAE.

Block: y = skip(x) + conv(act(modulate(conv(act(x))))), the pre-activation residual of He et al. 2016
(arXiv:1603.05027, fig. 4e) without normalisation; the last convolution starts at zero, so that a fresh network is
close to linear whatever its depth (Zhang et al. 2019, arXiv:1901.09321, section 3).
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

SLOPE = 0.2  # of the leaky ReLU below zero
COARSEST = 4  # a pyramid stops at the first size that fits into a square of this side

Size = tuple[int, int]


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU, x (...) to (...)."""
    return functional.leaky_relu(x, SLOPE)


def widen(x: Tensor) -> Tensor:
    """x (...) in float32, or float64 where it is float64: what losses and densities are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pyramid(height: int, width: int) -> list[Size]:
    """The sizes a picture passes through, finest first: halved, rounding up, until both sides are at most 4.

    (8, 8) gives [(8, 8), (4, 4)]; (28, 28) gives [(28, 28), (14, 14), (7, 7), (4, 4)].
    """
    sizes = [(height, width)]
    while max(sizes[-1]) > COARSEST:
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


def channel_counts(stages: int, width: int) -> list[int]:
    """Channels at each size of a pyramid, finest first: `width`, doubled per stage up to four times."""
    return [width * min(2**stage, 4) for stage in range(stages)]


def initialise(layer: nn.Conv2d | nn.Linear) -> None:
    """Weights that keep the variance through a leaky ReLU (He et al. 2015, eq. 15); zero bias."""
    nn.init.kaiming_normal_(layer.weight, a=SLOPE)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def downsample(x: Tensor) -> Tensor:
    """Mean over 2x2 cells, (n, c, h, w) to (n, c, ceil(h/2), ceil(w/2)); a cell cut by the border is its own mean."""
    return functional.avg_pool2d(x, 2, ceil_mode=True)


def upsample(x: Tensor, size: Size) -> Tensor:
    """Each value repeated over 2x2 cells and cropped to `size`, (n, c, h, w) to (n, c, *size); undoes `downsample`."""
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")[..., : size[0], : size[1]]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a skip, optionally halving or doubling the size and modulated by a vector.

    The vector sets scale and shift of each channel between the convolutions (Perez et al. 2018, arXiv:1709.07871,
    eq. 2), starting at the identity.

    inputs, outputs: channels. condition: length of the vector, 0 for none.
    resample: "down" halves height and width at the end, "up" doubles them at the start.
    """

    def __init__(
        self, inputs: int, outputs: int, *, condition: int = 0, resample: Literal["down", "up"] | None = None
    ) -> None:
        super().__init__()
        self.resample = resample
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        self.modulation = nn.Linear(condition, 2 * outputs) if condition else None
        initialise(self.first)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]
        if isinstance(self.skip, nn.Conv2d):
            nn.init.kaiming_normal_(self.skip.weight, nonlinearity="linear")
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None, size: Size | None = None) -> Tensor:
        """x (n, inputs, h, w), condition (n, condition); `size` is where "up" arrives, twice (h, w) by default."""
        h = activate(x)
        # The 1x1 skip commutes with repetition and with the mean: it is applied where there are fewer pixels.
        if self.resample == "up":
            size = size or (2 * x.shape[-2], 2 * x.shape[-1])
            x, h = upsample(self.skip(x), size), upsample(h, size)
        h = self.first(h)
        if self.modulation is not None:
            scale, shift = self.modulation(condition)[..., None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        h = self.second(activate(h))
        if self.resample == "down":
            x, h = downsample(x), downsample(h)
        return h + (x if self.resample == "up" else self.skip(x))


class ResidualEncoder(nn.Module):
    """From a picture (n, channels, height, width) to a vector (n, features), one block per size.

    shape: (channels, height, width) of the picture. width: channels at full size. condition: length of the vector
    that modulates every block, 0 for none. blocks: residual blocks at each size.
    """

    def __init__(
        self, shape: tuple[int, int, int], features: int, *, width: int, condition: int = 0, blocks: int = 1
    ) -> None:
        super().__init__()
        sizes = pyramid(*shape[1:])
        counts = channel_counts(len(sizes), width)
        self.entry = nn.Conv2d(shape[0], width, 3, padding=1)
        self.blocks = nn.ModuleList()
        for here, below in itertools.pairwise(counts):
            self.blocks.extend(ResidualBlock(here, here, condition=condition) for _ in range(blocks - 1))
            self.blocks.append(ResidualBlock(here, below, condition=condition, resample="down"))
        self.blocks.extend(ResidualBlock(counts[-1], counts[-1], condition=condition) for _ in range(blocks))
        self.exit = nn.Linear(counts[-1] * sizes[-1][0] * sizes[-1][1], features)
        initialise(self.entry)
        initialise(self.exit)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x (n, channels, height, width), condition (n, condition) to (n, features)."""
        h = self.entry(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.exit(activate(h).flatten(1))  # type: ignore[no-any-return]


class ResidualDecoder(nn.Module):
    """From a vector (n, features) to a map (n, channels, height, width), one block per size; mirrors the encoder."""

    def __init__(
        self, features: int, shape: tuple[int, int, int], *, width: int, condition: int = 0, blocks: int = 1
    ) -> None:
        super().__init__()
        self.sizes = pyramid(*shape[1:])[::-1]
        counts = channel_counts(len(self.sizes), width)[::-1]
        self.channels = counts[0]
        self.entry = nn.Linear(features, counts[0] * self.sizes[0][0] * self.sizes[0][1])
        self.blocks = nn.ModuleList(ResidualBlock(counts[0], counts[0], condition=condition) for _ in range(blocks))
        self.block_sizes = [self.sizes[0]] * blocks
        for (below, here), size in zip(itertools.pairwise(counts), self.sizes[1:], strict=True):
            self.blocks.append(ResidualBlock(below, here, condition=condition, resample="up"))
            self.blocks.extend(ResidualBlock(here, here, condition=condition) for _ in range(blocks - 1))
            self.block_sizes.extend([size] * blocks)
        self.exit = nn.Conv2d(counts[-1], shape[0], 3, padding=1)
        initialise(self.entry)
        nn.init.kaiming_normal_(self.exit.weight, nonlinearity="linear")
        nn.init.zeros_(self.exit.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """z (n, features), condition (n, condition) to (n, channels, height, width)."""
        h = self.entry(z).unflatten(1, (self.channels, *self.sizes[0]))
        for block, size in zip(self.blocks, self.block_sizes, strict=True):
            h = block(h, condition, size)
        return self.exit(activate(h))  # type: ignore[no-any-return]
