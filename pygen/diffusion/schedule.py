"""Noise schedules as log signal-to-noise ratios, and every sampling step as one row of coefficients.

x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 = sigmoid(lambda_t), sigma_t^2 = sigmoid(-lambda_t), where lambda_t is
the log signal-to-noise ratio (Kingma et al. 2021, arXiv:2107.00630, section 3.1). Times are t = 1 .. T; t = 0 is the
clean picture, alpha_0 = 1, sigma_0 = 0, lambda_0 = infinity.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Prediction = Literal["v", "epsilon"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
Schedule = Literal["cosine", "linear"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def cosine_log_snr(timesteps: int, *, lowest: float, highest: float) -> Tensor:
    """lambda_0 .. lambda_T, float64 (timesteps + 1,): -2 log tan(pi u / 2), u evenly spaced between the two ends.

    This is the cosine schedule of Nichol & Dhariwal 2021 (arXiv:2102.09672, eq. 17) cut to lambda_1 = highest and
    lambda_T = lowest instead of being shifted and clipped.
    """
    first, last = (math.atan(math.exp(-end / 2)) for end in (highest, lowest))
    angle = torch.linspace(first, last, timesteps, dtype=torch.float64)
    return torch.cat((angle.new_tensor([math.inf]), -2 * torch.log(torch.tan(angle))))


def linear_log_snr(timesteps: int) -> Tensor:
    """lambda_0 .. lambda_T, float64 (timesteps + 1,), of betas that rise linearly (Ho et al. 2020, section 4).

    beta_t runs from 1e-4 to 0.02 at T = 1000; at another T both ends are scaled by 1000 / T and capped at 0.999, so
    that the chain ends at about the same noise.
    """
    scale = 1000 / timesteps
    beta = torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64).clamp(max=0.999)
    log_alpha_squared = torch.log1p(-beta).cumsum(0)
    log_snr = log_alpha_squared - torch.log(-torch.expm1(log_alpha_squared))
    return torch.cat((log_snr.new_tensor([math.inf]), log_snr))


def log_snr_table(schedule: str, timesteps: int, levels: int) -> Tensor:
    """lambda_0 .. lambda_T of a named schedule for pictures of `levels` values.

    The cosine schedule starts where the levels' spacing 2 / (levels - 1) is nine standard deviations of the noise, so
    that x_1 still says which level each value had, and ends at lambda = -10, where it says nothing.
    """
    if schedule == "cosine":
        return cosine_log_snr(timesteps, lowest=-10.0, highest=2 * math.log(4.5 * (levels - 1)))
    if schedule == "linear":
        return linear_log_snr(timesteps)
    raise ValueError(f"schedule is {schedule!r}, but expected one of {', '.join(SCHEDULES)}")


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of a log signal-to-noise ratio, of its shape."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def spaced_times(timesteps: int, steps: int) -> Tensor:
    """0 = t_0 < t_1 < ... < t_steps = timesteps, int64 (steps + 1,), as evenly spaced as whole numbers can be.

    Raises ValueError unless 1 <= steps <= timesteps.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps is {steps}, but expected 1 to {timesteps}, the number of time steps of the model")
    return (2 * timesteps * torch.arange(steps + 1) + steps) // (2 * steps)


def time_shares(log_snr: Tensor) -> Tensor:
    """How often each time t = 1 .. T should be drawn, float64 (T,), summing to one.

    Half of the draws are even in t. Half are even in lambda where a picture is left, alpha_t (lambda_(t-1) - lambda_t):
    that is where the terms of the bound are, and even draws in t would put one in ten there.
    """
    alpha, _ = alpha_sigma(log_snr[1:])
    fall = alpha * torch.cat((log_snr.new_zeros(1), -log_snr[1:].diff()))
    return 0.5 / len(fall) + 0.5 * fall / fall.sum()


def denoising_coefficients(log_snr: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """c0 and c1 in x_0 = c0 x_t + c1 e, where e is the model output at the times of `log_snr`.

    epsilon: e = eps (Ho et al. 2020, eq. 15).
    v: e = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D).
    """
    alpha, sigma = alpha_sigma(log_snr)
    if prediction == "v":
        return alpha, -sigma
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    raise ValueError(f"prediction is {prediction!r}, but expected one of {', '.join(PREDICTIONS)}")


def step_coefficients(log_snr: Tensor, source: Tensor, target: Tensor, *, prediction: str, eta: float) -> Tensor:
    """The table of `ops.diffusion_step` for steps from time source[i] to time target[i], float32 (steps, 6).

    With m0 the predicted x_0 and eps = (x - alpha_s m0) / sigma_s its noise, s the source and t the target, a step is

        x' = alpha_t m0 + sqrt(sigma_t^2 - eta^2 w^2) eps + eta w z,   w^2 = (1 - e^(lambda_s - lambda_t)) sigma_t^2

    (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16). eta = 1 is the ancestral step, whose mean is the posterior mean
    of Ho et al. 2020, eq. 7; eta = 0 is deterministic and may also go towards more noise. eps is that of the clamped
    m0, so c4 is 0.

    log_snr: float64 (T + 1,), entry 0 infinite. source, target: int64 (steps,), source >= 1.
    """
    from_snr, to_snr = log_snr[source], log_snr[target]
    (from_alpha, from_sigma), (to_alpha, to_sigma) = alpha_sigma(from_snr), alpha_sigma(to_snr)
    c0, c1 = denoising_coefficients(from_snr, prediction)
    spread = eta * (-torch.expm1(from_snr - to_snr)).clamp(min=0).sqrt() * to_sigma
    direction = (to_sigma.square() - spread.square()).clamp(min=0).sqrt() / from_sigma
    columns = (c0, c1, to_alpha - direction * from_alpha, direction, torch.zeros_like(c0), spread)
    return torch.stack(columns, 1).float()


def sampling_steps(log_snr: Tensor, steps: int, *, prediction: str, eta: float) -> tuple[Tensor, Tensor]:
    """The times t_steps .. t_1 at which the network is called, int64 (steps,), and the table down to t = 0."""
    times = spaced_times(len(log_snr) - 1, steps).flip(0)
    return times[:-1], step_coefficients(log_snr, times[:-1], times[1:], prediction=prediction, eta=eta)


def inversion_steps(log_snr: Tensor, steps: int, *, prediction: str) -> tuple[Tensor, Tensor]:
    """The times 1, t_1 .. t_(steps-1), int64 (steps,), and the table of DDIM steps up to t = T.

    A clean picture has no noise to scale, so the way up takes it for x_1, which differs from it by less than a level.
    """
    times = spaced_times(len(log_snr) - 1, steps)
    source = torch.cat((times.new_ones(1), times[1:-1]))
    return source, step_coefficients(log_snr, source, times[1:], prediction=prediction, eta=0.0)
