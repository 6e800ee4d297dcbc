"""What one noisy value says of the grey level under it: p(k | z) = softmax over k of -(z - alpha x_k)^2 / (2 sigma^2).

The levels x_k = 2 k / (K - 1) - 1 are taken as equally likely and the values as independent. Diffusion uses it twice:
as the decoder of the variational bound (Kingma et al. 2021, arXiv:2107.00630, eq. 6), and as the first guess that the
network corrects.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Nodes that stand for all levels in `LevelMoments`; up to this many levels are summed one by one.
NODES = 20
# What the nodes cover, in standard deviations of the noise to either side; with NODES, the moments err by 1e-7.
_REACH = 5.5
# How far from the levels, in the same unit, a value is told apart: noise does not get there, but a caller's z may.
_FAR = 12.0
# Nodes, and levels of the decoder, that are worked on at once: few calls, and arrays that stay in a CPU's caches.
_NODES_AT_ONCE = 4
_LEVELS_AT_ONCE = 32


def level_values(levels: int, like: Tensor) -> Tensor:
    """x_0 .. x_(levels-1), evenly spaced in [-1, 1], with the dtype and device of `like`."""
    return torch.linspace(-1, 1, levels, dtype=like.dtype, device=like.device)


def level_logits(z: Tensor, alpha: Tensor, sigma: Tensor, values: Tensor) -> Tensor:
    """log p(k | z) up to a constant in k, in nats: (*z.shape, len(values)), for alpha and sigma that broadcast to z."""
    return -0.5 * ((z.unsqueeze(-1) - alpha.unsqueeze(-1) * values) / sigma.unsqueeze(-1)).square()


def nearest_level(z: Tensor, alpha: Tensor, levels: int) -> Tensor:
    """The most likely level given z, a whole number of the dtype of z."""
    return ((z / alpha + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1)


def level_log_prob(z: Tensor, alpha: Tensor, sigma: Tensor, k: Tensor, levels: int) -> Tensor:
    """log p(k | z) in nats, of the shape of z, for levels k (int64, the shape of z).

    Summed over every level, a few at a time, so that it is a distribution over the levels whatever the noise.
    """
    values = level_values(levels, z)
    peak = nearest_level(z, alpha, levels) * (2 / (levels - 1)) - 1
    peak = -0.5 * ((z - alpha * peak) / sigma).square()
    total = torch.zeros_like(z)
    for some in values.split(_LEVELS_AT_ONCE):
        total = total + (level_logits(z, alpha, sigma, some) - peak.unsqueeze(-1)).exp().sum(-1)
    return -0.5 * ((z - alpha * values[k]) / sigma).square() - peak - total.log()


def level_moments(z: Tensor, alpha: Tensor, sigma: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x given z, both of the shape of z, by the sum over every level."""
    values = level_values(levels, z)
    weights = level_logits(z, alpha, sigma, values).softmax(-1)
    # A matrix product would be rounded to bfloat16 under autocast.
    mean = (weights * values).sum(-1)
    # Around the mean, not as a difference of squares: deep in the schedule the deviation is 1e-4 of the mean.
    variance = (weights * (values - mean.unsqueeze(-1)).square()).sum(-1)
    return mean, variance.sqrt()


def window_sizes(levels: int) -> Tensor:
    """Numbers of consecutive levels, from NODES to all, each at most a few percent above the last; float64."""
    powers = torch.linspace(math.log2(NODES), math.log2(levels), 64, dtype=torch.float64)
    sizes: Tensor = powers.exp2().round().unique()
    return sizes


def window_nodes(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of NODES-point Gauss quadrature of sums over 0 .. size-1, float64 (len(sizes), NODES) each.

    A sum of a polynomial of degree below 2 NODES over the whole numbers is exact, and of a normal curve nearly so.
    Nodes and weights are eigenvalues and squared first components of the eigenvectors of the Jacobi matrix of the
    discrete Chebyshev polynomials (Golub & Welsch 1969; Gautschi 2004, Orthogonal Polynomials, section 1.5.2).
    """
    n = torch.arange(1, NODES, dtype=torch.float64)
    beside = n / 2 * ((sizes[:, None].square() - n.square()) / (4 * n.square() - 1)).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1))
    return nodes + (sizes[:, None] - 1) / 2, vectors[:, 0].square() * sizes[:, None]


class LevelMoments(nn.Module):
    """`level_moments` at a cost that does not grow with the number of levels.

    Of many levels, only those within a few standard deviations of the noise count. The smallest window of consecutive
    levels that has them is chosen by the noise and laid around the nearest level, and the sum over it is taken by
    quadrature: NODES nodes, whatever the window. The result is within 1e-5 of the sum over every level for values that
    the noise can reach; no bound rests on that, as any mean and deviation make a valid model.
    """

    _sizes: Tensor
    _nodes: Tensor
    _weights: Tensor

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels
        if levels > NODES:
            sizes = window_sizes(levels)
            nodes, weights = window_nodes(sizes)
            for name, table in (("_sizes", sizes), ("_nodes", nodes), ("_weights", weights)):
                self.register_buffer(name, table.float(), persistent=False)

    def forward(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x given z, both of the shape of z; alpha and sigma (n, 1, ...) as z (n, ...).

        Differentiable in z, but not through the choice of the window.
        """
        if self.levels <= NODES:
            return level_moments(z, alpha, sigma, self.levels)
        limit = alpha + _FAR * sigma
        z = z.clamp(-limit, limit)  # farther, the weights of all nodes would vanish
        spacing = 2 / (self.levels - 1)
        ratio = alpha * spacing / sigma
        row = torch.searchsorted(self._sizes, 1 + 2 * _REACH / ratio).clamp(max=len(self._sizes) - 1)
        size = self._sizes[row]
        nearest = nearest_level(z, alpha, self.levels)
        start = torch.minimum((nearest - (size - 1) / 2).floor().clamp(min=0), self.levels - size)
        # Everything is counted in levels from the nearest one. Its exponent is the largest and taken as zero, and the
        # difference of squares at the end loses nothing: deep in the schedule both are nearly zero.
        first = start - nearest
        slope = (z - alpha * (nearest * spacing - 1)) * ratio / sigma
        curvature = 0.5 * ratio.square()
        total = mean = square = torch.zeros_like(z)
        nodes, weights = (table[row].movedim(-1, 0).split(_NODES_AT_ONCE) for table in (self._nodes, self._weights))
        for node, weight in zip(nodes, weights, strict=True):
            away = first + node
            mass = weight * (away * (slope - curvature * away)).exp()
            total = total + mass.sum(0)
            mass = mass * away
            mean = mean + mass.sum(0)
            square = square + (mass * away).sum(0)
        mean = mean / total
        variance = (square / total - mean.square()).clamp(min=0)
        return (nearest + mean) * spacing - 1, variance.sqrt() * spacing
