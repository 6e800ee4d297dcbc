"""The discretized logistic: a distribution over the levels, exact in the tails, and what its draws follow."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pygen.vae.likelihood import discretized_logistic_draw, discretized_logistic_log_prob


def grid(levels, dtype=torch.float32):
    return 2 * torch.arange(levels, dtype=dtype) / (levels - 1) - 1


def exact(x, mean, log_scale, levels):
    """The definition, with digits enough for e^-800: the difference of two logistic functions."""
    with mpmath.workdps(400):
        half, scale = mpmath.mpf(1) / (levels - 1), mpmath.exp(log_scale)
        k = round((x + 1) * (levels - 1) / 2)
        x = mpmath.mpf(2 * k) / (levels - 1) - 1
        upper = mpmath.mpf(1) if k == levels - 1 else 1 / (1 + mpmath.exp(-(x + half - mean) / scale))
        lower = mpmath.mpf(0) if k == 0 else 1 / (1 + mpmath.exp(-(x - half - mean) / scale))
        return float(mpmath.log(upper - lower))


@given(
    st.sampled_from([2, 3, 17, 256]), st.floats(-1.5, 1.5), st.floats(-9, 9), st.sampled_from(["float32", "float64"])
)
def test_probabilities_sum_to_one(levels, mean, log_scale, dtype):
    dtype = getattr(torch, dtype)
    x = grid(levels, dtype)
    log_prob = discretized_logistic_log_prob(
        x, torch.tensor(mean, dtype=dtype), torch.tensor(log_scale, dtype=dtype), levels=levels
    )
    assert log_prob.dtype == dtype
    assert log_prob.shape == (levels,)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("mean", [-1.4, -1.0, 0.03, 1.2])
@pytest.mark.parametrize("log_scale", [-5.0, -2.0, 0.0, 4.0])
def test_log_prob_is_the_definition_far_into_the_tails(levels, mean, log_scale):
    x = grid(levels, torch.float64)
    arguments = x, torch.tensor(mean, dtype=torch.float64), torch.tensor(log_scale, dtype=torch.float64)
    expected = torch.tensor([exact(v, mean, log_scale, levels) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(
        discretized_logistic_log_prob(*arguments, levels=levels), expected, rtol=1e-10, atol=1e-12
    )
    # float32 rounds (x - mean) to 1e-7 before the division by the scale, and no worse.
    single = discretized_logistic_log_prob(*(a.float() for a in arguments), levels=levels)
    torch.testing.assert_close(single.double(), expected, rtol=2e-6, atol=4e-7 * math.exp(-log_scale) + 1e-5)


def test_bfloat16_arguments_are_computed_in_float32():
    x, mean, log_scale = grid(17)[:, None], torch.tensor([0.5, -0.25]), torch.tensor([-2.0, -3.0])
    low = discretized_logistic_log_prob(x, mean.bfloat16(), log_scale.bfloat16(), levels=17)
    assert low.dtype == torch.float32
    assert torch.equal(low, discretized_logistic_log_prob(x, mean, log_scale, levels=17))


def test_gradients_are_those_of_finite_differences_and_finite_in_the_tails():
    x = grid(17, torch.float64)
    mean = torch.full((17,), 0.2, dtype=torch.float64, requires_grad=True)
    log_scale = torch.full((17,), -2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, s: discretized_logistic_log_prob(x, m, s, levels=17), (mean, log_scale), eps=1e-6
    )
    mean = torch.tensor([50.0, -50.0], requires_grad=True)
    log_scale = torch.tensor([-7.0, -20.0], requires_grad=True)
    discretized_logistic_log_prob(torch.zeros(2), mean, log_scale, levels=17).sum().backward()
    assert mean.grad.isfinite().all()
    assert log_scale.grad.isfinite().all()
    # Far below its mean a value gains as the mean comes down.
    assert mean.grad[0] < 0 < mean.grad[1]


def test_a_bad_number_of_levels_is_named():
    with pytest.raises(ValueError, match="levels is 1, but expected at least 2"):
        discretized_logistic_log_prob(*torch.zeros(3, 1), levels=1)


@pytest.mark.parametrize(("levels", "mean", "log_scale"), [(2, 0.3, 0.0), (5, -0.4, -1.0), (17, 0.9, -2.0)])
def test_draws_follow_the_probabilities(levels, mean, log_scale):
    # A fine even grid of quantiles counts each cell to one part in a million: no statistics.
    count = 2**20
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    mean, log_scale = torch.tensor(mean), torch.tensor(log_scale)
    drawn = discretized_logistic_draw(uniform, mean, log_scale, levels=levels)
    index = ((drawn + 1) * (levels - 1) / 2).round().long()
    frequency = torch.bincount(index, minlength=levels) / count
    probability = discretized_logistic_log_prob(grid(levels), mean, log_scale, levels=levels).exp()
    torch.testing.assert_close(frequency, probability, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.float(), grid(levels)[index], rtol=0, atol=1e-6)


def test_draws_at_the_ends_of_the_unit_interval_are_values():
    drawn = discretized_logistic_draw(torch.tensor([0.0, 1.0]), torch.zeros(2), torch.zeros(2), levels=17)
    assert drawn.tolist() == [-1.0, 1.0]
