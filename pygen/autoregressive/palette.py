"""A palette: few colours that stand for all, found by k-means (Chen et al. 2020, Generative Pretraining from Pixels,
section 3.1; Lloyd 1982; seeding by Arthur & Vassilvitskii 2007, k-means++).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pygen.autoregressive.arguments import check_count, check_tensor

_CHUNK = 2**24  # distances at once


def fit_palette(pictures: Tensor, colours: int, *, iterations: int = 20, seed: int = 0) -> Tensor:
    """`colours` colours (colours, channels) that are near the pixels of pictures (n, channels, height, width).

    iterations: of Lloyd's, at most. seed: of the first guess. A colour that no pixel is nearest to stays where it was;
    there are such colours where there are fewer in the pictures.

    ValueError: colours is less than 1, there is no pixel, or one that is not finite.
    """
    check_tensor("pictures", pictures)
    colours = check_count("colours", colours, 1)
    pixels = pictures.detach().movedim(1, -1).flatten(0, -2).float()
    if not len(pixels):
        raise ValueError(f"pictures has shape {tuple(pictures.shape)}, but expected at least one pixel")
    if not bool(pixels.isfinite().all()):  # the seeding waits for the device in any case
        raise ValueError("pictures has values that are NaN or infinite, but expected finite ones")
    # Equal pixels are one with a weight: pictures of few levels have few colours.
    pixels, weight = pixels.unique(dim=0, return_counts=True)
    palette = _spread(pixels, weight, colours, seed)
    for _ in range(iterations):
        nearest = nearest_colour(pixels, palette)
        total = torch.zeros_like(palette).index_add_(0, nearest, pixels * weight[:, None])
        count = torch.zeros_like(palette[:, 0]).index_add_(0, nearest, weight.to(palette.dtype))
        moved = torch.where(count[:, None] > 0, total / count[:, None].clamp_min(1), palette)
        if torch.equal(moved, palette):
            break
        palette = moved
    return palette


def nearest_colour(pixels: Tensor, palette: Tensor) -> Tensor:
    """The number, int64 (n,), of the colour of palette (colours, channels) that is nearest to each of pixels (n,
    channels); of several, the first."""
    rows = max(1, _CHUNK // len(palette))
    return torch.cat([torch.cdist(part, palette).argmin(1) for part in pixels.split(rows)])


def _spread(pixels: Tensor, weight: Tensor, colours: int, seed: int) -> Tensor:
    """The first guess: pixels, each drawn with a probability proportional to its squared distance to those before."""
    generator = torch.Generator().manual_seed(seed)
    distance = torch.full_like(pixels[:, 0], torch.inf)
    chance = weight.double().cpu()
    chosen = []
    for _ in range(colours):
        index = int(torch.multinomial(chance, 1, generator=generator))
        chosen.append(pixels[index])
        distance = torch.minimum(distance, (pixels - pixels[index]).square().sum(1))
        chance = distance.double().cpu() * weight.double().cpu()
        if not chance.any():  # every colour is in the palette
            chance = weight.double().cpu()
    return torch.stack(chosen)
