"""How far samples are from real data, measured on features (n, d) of both.

Frechet distance: |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of the two means and covariances (Heusel et al. 2017,
arXiv:1706.08500, eq. 6). Precision and recall: Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1-3. Density and
coverage of the neighbourhoods: Naeem et al. 2020, arXiv:2002.09797, eq. 3-4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pygen.workbench import require


class Manifold(NamedTuple):
    """Four comparisons of the neighbourhoods of real and generated features; each is 1 or close to it at best."""

    precision: float  # share of generated points inside the real manifold
    recall: float  # share of real points inside the generated manifold
    density: float  # real neighbourhoods around a generated point, over the number expected; may pass 1
    neighbour_coverage: float  # share of real points with a generated point in their neighbourhood


class _Given(nn.Module):
    """A feature extractor for features that are already there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """The squared Frechet distance between Gaussians fitted to real (n, d) and fake (m, d) features, in float64.

    Computed by torchmetrics. It needs more rows than dimensions to mean much: with d dimensions and n rows even two
    draws of one distribution lie about d / n times their variance apart, so compare only equal numbers of rows.

    Raises ValueError for other shapes, fewer than two rows or values that are not finite.
    """
    _check(real, fake, rows=2)
    fid = require("torchmetrics.image.fid", "the Frechet distance")
    metric = fid.FrechetInceptionDistance(feature=_Given(real.shape[1])).set_dtype(torch.float64)
    # Both sets move to the mean of the real one, so that the covariances lose no digits to a far-off mean.
    centre = real.double().mean(0)
    metric.update(real.double() - centre, real=True)
    metric.update(fake.double() - centre, real=False)
    return max(float(metric.compute()), 0.0)


def manifold_scores(real: Tensor, fake: Tensor, *, neighbours: int = 3, chunk: int = 2048) -> Manifold:
    """Precision, recall, density and neighbourhood coverage of fake (m, d) against real (n, d) features.

    A point's neighbourhood is the ball around it that reaches its `neighbours`-th nearest point of its own set. `chunk`
    rows of distances are in memory at a time.

    Raises ValueError for other shapes, values that are not finite, or a set of `neighbours` rows or fewer.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}, but expected at least 1")
    _check(real, fake, rows=neighbours + 1)
    real, fake = real.double(), fake.double()
    real_radius, fake_radius = _radii(real, neighbours, chunk), _radii(fake, neighbours, chunk)
    inside_real = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    recalled, covered = [], []
    for rows, radius in zip(torch.split(real, chunk), torch.split(real_radius, chunk), strict=True):
        distance = _distances(rows, fake)
        inside_real += (distance <= radius[:, None]).sum(0)
        recalled.append((distance <= fake_radius).any(1))
        covered.append(distance.amin(1) <= radius)
    return Manifold(
        precision=float((inside_real > 0).double().mean()),
        recall=float(torch.cat(recalled).double().mean()),
        density=float(inside_real.double().mean()) / neighbours,
        neighbour_coverage=float(torch.cat(covered).double().mean()),
    )


def class_coverage(real: Tensor, fake: Tensor, classes: int) -> float:
    """The share of the classes that samples reach, given the classes (n,) of real and (m,) of generated pictures.

    A class counts as reached when its share of the samples is at least half of its share of the real pictures; a
    class that the real pictures do not show does not count at all.
    """
    for name, labels in (("real", real), ("fake", fake)):
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"{name} has shape {tuple(labels.shape)}, but expected (n,) with n at least 1")
    real_share = torch.bincount(real, minlength=classes).double() / len(real)
    fake_share = torch.bincount(fake, minlength=classes).double() / len(fake)
    shown = real_share > 0
    return float((fake_share[shown] >= real_share[shown] / 2).double().mean())


def _radii(points: Tensor, neighbours: int, chunk: int) -> Tensor:
    # The nearest point of each is itself, at distance zero: the k-th neighbour is number k + 1.
    return torch.cat(
        [_distances(rows, points).kthvalue(neighbours + 1, dim=1).values for rows in torch.split(points, chunk)]
    )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The shortcut by matrix multiplication would not give exactly zero for equal points.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check(real: Tensor, fake: Tensor, *, rows: int) -> None:
    for name, features in (("real", real), ("fake", fake)):
        if features.ndim != 2 or len(features) < rows:
            raise ValueError(f"{name} has shape {tuple(features.shape)}, but expected (n, d) with n at least {rows}")
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} holds values that are not finite")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"fake has {fake.shape[1]} features, but expected {real.shape[1]} as in real")
