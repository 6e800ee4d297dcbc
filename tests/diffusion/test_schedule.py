"""The noise schedules against the papers' own formulas, and the coefficient tables against what a step must do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pygen import ops
from pygen.diffusion.schedule import (
    PREDICTIONS,
    SCHEDULES,
    alpha_sigma,
    cosine_log_snr,
    denoising_coefficients,
    inversion_steps,
    linear_log_snr,
    log_snr_table,
    sampling_steps,
    spaced_times,
    step_coefficients,
    time_shares,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [2, 10, 1000])
def test_the_ratio_falls_from_a_clean_picture_to_noise(schedule, timesteps):
    log_snr = log_snr_table(schedule, timesteps, 17)
    assert log_snr.shape == (timesteps + 1,)
    assert log_snr.dtype == torch.float64
    assert log_snr[0] == math.inf
    assert log_snr[1:].isfinite().all()
    assert (log_snr.diff() < 0).all()
    alpha, sigma = alpha_sigma(log_snr)
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones_like(alpha), atol=1e-12)
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert alpha[-1] < 0.04


def test_cosine_is_evenly_spaced_in_angle_between_its_ends():
    log_snr = cosine_log_snr(101, lowest=-8.0, highest=6.0)[1:]
    assert log_snr[0].item() == pytest.approx(6.0)
    assert log_snr[-1].item() == pytest.approx(-8.0)
    alpha, _ = alpha_sigma(log_snr)
    assert alpha.acos().diff().std() < 1e-12


def test_cosine_starts_at_the_spacing_of_the_levels():
    for levels in (2, 17, 256):
        alpha, sigma = alpha_sigma(log_snr_table("cosine", 1000, levels)[1])
        assert (2 / (levels - 1) * alpha / sigma).item() == pytest.approx(9.0)


def test_linear_is_the_product_of_the_betas():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    alpha, _ = alpha_sigma(linear_log_snr(1000)[1:])
    assert torch.allclose(alpha.square(), alpha_bar, rtol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_time_has_its_share_of_the_draws(schedule):
    share = time_shares(log_snr_table(schedule, 1000, 17))
    assert share.sum().item() == pytest.approx(1)
    assert share.min() >= 0.5 / 1000
    # The level spacing is resolved at lambda 4 to 7, which even draws in t would hardly visit.
    log_snr = log_snr_table(schedule, 1000, 17)[1:]
    assert share[(log_snr > 4) & (log_snr < 7)].sum() > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eta_one_is_the_posterior_of_ddpm(schedule, prediction):
    log_snr = log_snr_table(schedule, 100, 17)
    times, table = sampling_steps(log_snr, 100, prediction=prediction, eta=1.0)
    assert times.tolist() == list(range(100, 0, -1))
    # Ho et al. 2020, eq. 6 and 7, from the betas.
    alpha_bar = torch.sigmoid(log_snr)
    now, before = alpha_bar[times], alpha_bar[times - 1]
    beta = 1 - now / before
    on_clean = before.sqrt() * beta / (1 - now)
    on_noisy = (1 - beta).sqrt() * (1 - before) / (1 - now)
    deviation = ((1 - before) / (1 - now) * beta).sqrt()
    for column, expected in ((2, on_clean), (3, on_noisy), (4, torch.zeros_like(now)), (5, deviation)):
        assert torch.allclose(table[:, column].double(), expected, rtol=1e-6, atol=1e-7), column


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_v_and_epsilon_are_the_same_picture(prediction):
    log_snr = log_snr_table("cosine", 50, 17)[1:]
    alpha, sigma = alpha_sigma(log_snr)
    clean, noise = torch.randn(2, 50, dtype=torch.float64)
    output = alpha * noise - sigma * clean if prediction == "v" else noise
    c0, c1 = denoising_coefficients(log_snr, prediction)
    assert torch.allclose(c0 * (alpha * clean + sigma * noise) + c1 * output, clean, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), prediction=st.sampled_from(PREDICTIONS), schedule=st.sampled_from(SCHEDULES))
def test_with_the_true_noise_a_step_lands_on_the_same_picture_and_noise(data, prediction, schedule):
    log_snr = log_snr_table(schedule, 60, 17)
    source = data.draw(st.integers(1, 60))
    target = data.draw(st.integers(0, 60))
    clean, noise = torch.rand(4, 3) * 2 - 1, torch.randn(4, 3)
    (a, s), (a2, s2) = (tuple(map(float, alpha_sigma(log_snr[t]))) for t in (source, target))
    output = a * noise - s * clean if prediction == "v" else noise
    times = torch.tensor([source]), torch.tensor([target])
    table = step_coefficients(log_snr, *times, prediction=prediction, eta=0.0)
    moved = ops.diffusion_step(a * clean + s * noise, output, table, step=0)
    # Near T the picture is all but gone, and eps as the output loses it to rounding.
    assert torch.allclose(moved, a2 * clean + s2 * noise, atol=2e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 7, 60])
def test_with_the_true_picture_noisy_steps_keep_the_marginal_distribution(eta, steps):
    log_snr = log_snr_table("cosine", 60, 17)
    times, table = sampling_steps(log_snr, steps, prediction="epsilon", eta=eta)
    variance = torch.ones((), dtype=torch.float64) * torch.sigmoid(-log_snr[-1])
    targets = [*times.tolist()[1:], 0]
    for row, target in zip(table.double(), targets, strict=True):
        variance = row[3].square() * variance + row[5].square()
        assert variance.item() == pytest.approx(torch.sigmoid(-log_snr[target]).item(), abs=1e-6)
    assert table[-1].tolist()[2:] == [1, 0, 0, 0]


@settings(max_examples=100, deadline=None)
@given(timesteps=st.integers(1, 1000), data=st.data())
def test_times_are_distinct_even_and_end_at_both_ends(timesteps, data):
    steps = data.draw(st.integers(1, timesteps))
    times = spaced_times(timesteps, steps)
    assert len(times) == steps + 1
    assert times[0] == 0
    assert times[-1] == timesteps
    gaps = times.diff()
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_steps_outside_the_chain_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, but expected 1 to 10"):
        spaced_times(10, steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_way_up_undoes_the_way_down_for_a_fixed_picture(prediction):
    log_snr = log_snr_table("cosine", 40, 17)
    up_times, up = inversion_steps(log_snr, 8, prediction=prediction)
    down_times, down = sampling_steps(log_snr, 8, prediction=prediction, eta=0.0)
    assert up_times.tolist() == [1, *down_times.flip(0).tolist()[:-1]]
    for i in range(1, 8):
        # x' = c2 m + c3 x there and x = c2 m + c3 x' back.
        there, back = up[i].double(), down[7 - i].double()
        assert (there[3] * back[3]).item() == pytest.approx(1, abs=1e-5)
        assert (back[2] + back[3] * there[2]).item() == pytest.approx(0, abs=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="schedule is 'sigmoid', but expected one of cosine, linear"):
        log_snr_table("sigmoid", 10, 17)
    with pytest.raises(ValueError, match="prediction is 'score', but expected one of v, epsilon"):
        denoising_coefficients(torch.zeros(1), "score")
