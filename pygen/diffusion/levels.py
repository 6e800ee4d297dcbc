"""What one noisy value says of the grey level under it: p(k | z) = softmax over k of -(z - alpha x_k)^2 / (2 sigma^2).

The levels x_k = 2 k / (K - 1) - 1 are taken as equally likely and the values as independent. Diffusion uses it twice:
as the decoder of the variational bound (Kingma et al. 2021, arXiv:2107.00630, eq. 6), and as the first guess that the
network corrects.
"""

from __future__ import annotations

import torch
from torch import Tensor


def level_values(levels: int, like: Tensor) -> Tensor:
    """x_0 .. x_(levels-1), evenly spaced in [-1, 1], with the dtype and device of `like`."""
    return torch.linspace(-1, 1, levels, dtype=like.dtype, device=like.device)


def level_logits(z: Tensor, alpha: Tensor, sigma: Tensor, levels: int) -> Tensor:
    """log p(k | z) up to a constant in k, in nats: (*z.shape, levels), for alpha and sigma that broadcast to z."""
    values = level_values(levels, z)
    return -0.5 * ((z.unsqueeze(-1) - alpha.unsqueeze(-1) * values) / sigma.unsqueeze(-1)).square()


def level_log_prob(z: Tensor, alpha: Tensor, sigma: Tensor, k: Tensor, levels: int) -> Tensor:
    """log p(k | z) in nats, of the shape of z, for levels k (int64, the shape of z)."""
    log_probs = level_logits(z, alpha, sigma, levels).log_softmax(-1)
    return log_probs.gather(-1, k.unsqueeze(-1)).squeeze(-1)


def level_moments(z: Tensor, alpha: Tensor, sigma: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x given z, both of the shape of z."""
    values = level_values(levels, z)
    weights = level_logits(z, alpha, sigma, levels).softmax(-1)
    # A matrix product would be rounded to bfloat16 under autocast.
    mean = (weights * values).sum(-1)
    # Around the mean, not as a difference of squares: deep in the schedule the deviation is 1e-4 of the mean.
    variance = (weights * (values - mean.unsqueeze(-1)).square()).sum(-1)
    return mean, variance.sqrt()
