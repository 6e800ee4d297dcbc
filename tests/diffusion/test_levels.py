"""What a noisy value says of its level: probabilities that sum to one, moments against the sums written out."""

from __future__ import annotations

import pytest
import torch

from pygen.diffusion.levels import level_log_prob, level_moments


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0])
def test_the_decoder_is_a_distribution_over_the_levels(levels, sigma):
    torch.manual_seed(0)
    z = torch.randn(5, 7)
    alpha, sigma = torch.tensor(0.9), torch.tensor(sigma)
    total = sum(
        level_log_prob(z, alpha, sigma, torch.full_like(z, k, dtype=torch.int64), levels).exp() for k in range(levels)
    )
    assert torch.allclose(total, torch.ones_like(z), atol=1e-5)


def test_a_value_at_a_level_with_little_noise_is_that_level():
    k = torch.arange(17)
    x = k / 8.0 - 1
    log_prob = level_log_prob(0.99 * x, torch.tensor(0.99), torch.tensor(0.0139), k, 17)
    assert (log_prob > -1e-6).all()
    mean, deviation = level_moments(0.99 * x, torch.tensor(0.99), torch.tensor(0.0139), 17)
    assert torch.allclose(mean, x, atol=1e-6)
    assert (deviation < 1e-4).all()


def test_moments_against_sums_in_double():
    torch.manual_seed(0)
    z = torch.randn(64) * 1.5
    alpha, sigma = torch.rand(64).sqrt(), torch.rand(64) * 0.5 + 0.02
    mean, deviation = level_moments(z, alpha, sigma, 5)
    for i in range(64):
        x = torch.tensor([-1, -0.5, 0, 0.5, 1], dtype=torch.float64)
        exponent = -((z[i].double() - alpha[i].double() * x) ** 2) / (2 * sigma[i].double() ** 2)
        weight = torch.exp(exponent - exponent.max())
        weight = weight / weight.sum()
        expected = (weight * x).sum()
        assert mean[i].item() == pytest.approx(expected.item(), abs=1e-5)
        spread = (weight * (x - expected) ** 2).sum().sqrt()
        assert deviation[i].item() == pytest.approx(spread.item(), rel=1e-3, abs=1e-6)
