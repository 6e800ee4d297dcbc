"""The metrics against closed forms, an independent formula and the prdc package."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pygen.workbench.metrics import class_coverage, frechet_distance, manifold_scores

pytest.importorskip("torchmetrics")


def features(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frechet_by_symmetric_roots(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The same distance by another road: tr (S S')^(1/2) = tr (S^(1/2) S' S^(1/2))^(1/2), both by eigh."""
    a, b = torch.atleast_2d(torch.cov(real.T)), torch.atleast_2d(torch.cov(fake.T))
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return float((real.mean(0) - fake.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross)


def whiten(x: torch.Tensor) -> torch.Tensor:
    """The rows moved and mixed to mean zero and covariance one exactly, so that closed forms hold exactly."""
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    real = whiten(features(500, 6, 0))
    scales = torch.tensor([0.5, 1.0, 2.0, 3.0, 1.5, 0.1], dtype=torch.float64)
    shift = torch.arange(6, dtype=torch.float64)
    expected = float(shift.square().sum() + (scales - 1).square().sum())
    assert frechet_distance(real, real * scales + shift) == pytest.approx(expected, rel=1e-9)


@given(n=st.integers(3, 60), m=st.integers(3, 60), d=st.integers(1, 32), seed=st.integers(0, 99))
def test_frechet_distance_agrees_with_symmetric_roots(n: int, m: int, d: int, seed: int) -> None:
    real, fake = features(n, d, seed) * 3 + 40, features(m, d, seed + 1) + 40
    expected = frechet_by_symmetric_roots(real, fake)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_frechet_distance_of_equal_sets_is_zero_and_of_collapsed_samples_finite() -> None:
    real = features(300, 8, 1) + 100
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)
    collapsed = real.mean(0).expand(50, 8)
    assert frechet_distance(real, collapsed) == pytest.approx(float(torch.cov(real.T).trace()), rel=1e-6)


@pytest.mark.parametrize(("neighbours", "chunk"), [(3, 2048), (5, 7), (1, 1)])
def test_manifold_scores_agree_with_prdc(neighbours: int, chunk: int) -> None:
    prdc = pytest.importorskip("prdc")
    real, fake = features(90, 4, 2), features(110, 4, 3) * 0.7 + 0.5
    expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=neighbours)
    scores = manifold_scores(real, fake, neighbours=neighbours, chunk=chunk)
    assert scores == pytest.approx(
        (expected["precision"], expected["recall"], expected["density"], expected["coverage"]), abs=1e-12
    )


def test_manifold_scores_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    fake = torch.tensor([[0.5], [0.6], [50.0], [50.1]])
    scores = manifold_scores(real, fake, neighbours=1)
    # Real balls: [-1, 1], [0, 2], [1, 3], [2, 18]; fake balls: radius 0.1 about each.
    assert scores == pytest.approx((0.5, 0.0, 1.0, 0.5), abs=1e-9)


def test_equal_sets_have_full_precision_and_recall_and_distant_sets_none() -> None:
    real = features(80, 5, 4)
    same = manifold_scores(real, real)
    assert (same.precision, same.recall, same.neighbour_coverage) == (1, 1, 1)
    assert manifold_scores(real, real + 1000) == (0, 0, 0, 0)


def test_class_coverage_counts_classes_with_half_their_share() -> None:
    real = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    assert class_coverage(real, real, 3) == 1
    assert class_coverage(real, torch.tensor([0] * 75 + [1] * 15 + [2] * 10), 3) == 1
    assert class_coverage(real, torch.tensor([0] * 76 + [1] * 15 + [2] * 9), 3) == pytest.approx(2 / 3)
    assert class_coverage(real, torch.zeros(10, dtype=torch.int64), 3) == pytest.approx(1 / 3)
    assert class_coverage(torch.tensor([0, 1]), torch.tensor([0, 1]), 10) == 1


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (torch.zeros(5), torch.zeros(5, 2), r"real has shape \(5,\), but expected \(n, d\) with n at least"),
        (torch.zeros(5, 2), torch.zeros(1, 2), r"fake has shape \(1, 2\), but expected \(n, d\) with n at least"),
        (torch.zeros(5, 2), torch.full((5, 2), math.nan), "fake holds values that are not finite"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "fake has 3 features, but expected 2 as in real"),
    ],
)
def test_bad_features_get_one_sentence(real: torch.Tensor, fake: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(real, fake)
    with pytest.raises(ValueError, match=message):
        manifold_scores(real, fake)


def test_bad_neighbours_and_labels_get_one_sentence() -> None:
    with pytest.raises(ValueError, match="neighbours is 0, but expected at least 1"):
        manifold_scores(torch.zeros(5, 2), torch.zeros(5, 2), neighbours=0)
    with pytest.raises(ValueError, match=r"fake has shape \(0,\)"):
        class_coverage(torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 10)
