"""The discretized logistic distribution over `levels` values of [-1, 1]: the logistic's mass in the value's cell.

log P(x) = log(s(a) - s(b)), a = (x + h - mean) / scale, b = (x - h - mean) / scale, h = 1 / (levels - 1), with s the
logistic function; the first cell reaches down to -infinity and the last up to +infinity (Kingma et al. 2016,
arXiv:1606.04934, appendix C.3; Salimans et al. 2017, arXiv:1701.05517, eq. 2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pygen.nn.residual import widen

LOG_SCALE_RANGE = (-7.0, 7.0)


def discretized_logistic_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor, *, levels: int) -> Tensor:
    """log P(x) in nats of each value of a picture, in float32 (float64 where an argument is).

    x: (...), values 2 k / (levels - 1) - 1 with k in 0 .. levels-1. mean, log_scale: (...), location and log-scale
    of the logistic; they broadcast with x, and log_scale is clamped to [-7, 7].

    Over the levels the probabilities sum to one. Raises ValueError where levels is below 2.
    """
    if levels < 2:
        raise ValueError(f"levels is {levels}, but expected at least 2")
    x, mean, log_scale = widen(x), widen(mean), widen(log_scale)
    half = 1 / (levels - 1)
    inverse_scale = torch.exp(-log_scale.clamp(*LOG_SCALE_RANGE))
    upper = (x - mean + half) * inverse_scale
    lower = (x - mean - half) * inverse_scale
    # s(a) - s(b) = s(a) s(-b) (1 - e^(b-a)): each factor keeps its digits in the tails, where the difference loses all.
    inside = logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(-2 * half * inverse_scale))
    return torch.where(x < -1 + half, logsigmoid(upper), torch.where(x > 1 - half, logsigmoid(-lower), inside))


def discretized_logistic_draw(uniform: Tensor, mean: Tensor, log_scale: Tensor, *, levels: int) -> Tensor:
    """The value whose cell holds the logistic's quantile at `uniform` in [0, 1); shapes (...) broadcast."""
    quantile = widen(mean) + widen(log_scale).clamp(*LOG_SCALE_RANGE).exp() * torch.logit(widen(uniform))
    cells = (levels - 1) / 2
    return ((quantile.clamp(-1, 1) + 1) * cells).round() / cells - 1
