"""What a noisy value says of its level: probabilities that sum to one, moments against the sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pygen.diffusion.levels import (
    NODES,
    LevelMoments,
    level_log_prob,
    level_logits,
    level_moments,
    level_values,
    window_nodes,
    window_sizes,
)


def noisy(levels: int, log_snr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, alpha and sigma in double, a row for each ratio: noise of up to six deviations on values to both ends."""
    alpha, sigma = torch.sigmoid(log_snr.double()).sqrt(), torch.sigmoid(-log_snr.double()).sqrt()
    noise = torch.linspace(-6, 6, 49, dtype=torch.float64)
    x = level_values(levels, noise)[(torch.arange(49) * 31) % levels]
    x = torch.cat((x, torch.ones_like(noise)))
    alpha, sigma = alpha[:, None], sigma[:, None]
    return alpha * x + sigma * noise.repeat(2), alpha, sigma


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


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_decoder_against_the_softmax_in_double(levels):
    z, alpha, sigma = noisy(levels, torch.linspace(-12, 15, 28))
    k = torch.arange(z.numel()).view(z.shape) % levels
    softmax = level_logits(z, alpha, sigma, level_values(levels, z)).log_softmax(-1)
    expected = softmax.gather(-1, k.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(level_log_prob(z, alpha, sigma, k, levels), expected, rtol=1e-10, atol=1e-10)
    single = level_log_prob(z.float(), alpha.float(), sigma.float(), k, levels)
    assert torch.allclose(single.double(), expected, rtol=1e-4, atol=1e-4)


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


# From more noise than the schedules have to less, in steps that meet every window.
RATIOS = torch.linspace(-12, 20, 257)


@pytest.mark.parametrize("levels", [2, 17, 20, 21, 64, 256, 1000])
def test_moments_of_many_levels_against_the_sum_over_each(levels):
    z, alpha, sigma = noisy(levels, RATIOS)
    expected = level_moments(z, alpha, sigma, levels)
    in_double = LevelMoments(levels)
    if levels > NODES:
        in_double._sizes = window_sizes(levels)
        in_double._nodes, in_double._weights = window_nodes(in_double._sizes)
    for got, want in zip(in_double(z, alpha, sigma), expected, strict=True):
        assert (got - want).abs().max() < 2e-7
    for got, want in zip(LevelMoments(levels)(z.float(), alpha.float(), sigma.float()), expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() < 1e-5


def test_few_levels_are_summed_as_ever():
    z, alpha, sigma = (tensor.float() for tensor in noisy(17, RATIOS))
    for got, want in zip(LevelMoments(17)(z, alpha, sigma), level_moments(z, alpha, sigma, 17), strict=True):
        assert torch.equal(got, want)


def test_moments_stay_among_the_levels_however_far_the_value():
    z = torch.tensor([[-1e6, -50.0, 50.0, 1e6]])
    for log_snr in RATIOS[::16]:
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        mean, deviation = LevelMoments(256)(z, alpha.view(1, 1), sigma.view(1, 1))
        assert (mean.abs() <= 1 + 1e-6).all()
        assert (deviation >= 0).all()
        assert (deviation <= 1).all()


def test_nodes_are_exact_for_polynomials():
    sizes = window_sizes(256)
    nodes, weights = window_nodes(sizes)
    assert sizes[0] == NODES
    assert sizes[-1] == 256
    # The smallest window is the levels themselves.
    assert torch.allclose(nodes[0], torch.arange(NODES, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(weights[0], torch.ones(NODES, dtype=torch.float64), atol=1e-9)
    for size, node, weight in zip(sizes, nodes, weights, strict=True):
        centre = (size - 1) / 2
        levels = (torch.arange(int(size), dtype=torch.float64) - centre) / centre
        for power in range(0, 2 * NODES, 2):
            got = (weight * ((node - centre) / centre) ** power).sum()
            assert got.item() == pytest.approx((levels**power).sum().item(), rel=1e-9)


def test_moments_of_many_levels_have_the_slope_of_the_sum():
    z, alpha, sigma = noisy(256, RATIOS[::8])
    slopes = []
    for moments in (LevelMoments(256).double(), lambda *given: level_moments(*given, 256)):
        leaf = z.clone().requires_grad_()
        moments(leaf, alpha, sigma)[0].sum().backward()
        slopes.append(leaf.grad * sigma)
    assert torch.allclose(*slopes, atol=1e-4)
