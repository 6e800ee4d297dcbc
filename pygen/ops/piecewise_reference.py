"""The monotone piecewise polynomial splines in plain PyTorch: specification, fallback and oracle of piecewise.py.

Every bin is a cubic of Hermite's form, with theta = (x - x_k) / w_k, r = 1 - theta and delta = h_k / w_k:
y = y_k + w_k (d_k theta r^2 + (3 delta - d_k') theta^2 r + delta theta^3),
dy/dx = d_k r^2 + 2 (3 delta - d_k - d_k') theta r + d_k' theta^2.
The parameters decide w, h and the slopes d, d' at a bin's ends: linear d = d' = delta and quadratic
delta = (d + d') / 2 (Mueller et al. 2019, Neural Importance Sampling, arXiv:1808.03856, section 4.1-4.2), cubic as
Steffen (1990, Astronomy and Astrophysics 239, eq. 11) makes it monotone (Durkan et al. 2019, Cubic-Spline Flows,
arXiv:1906.02145).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pygen.ops.arguments import arithmetic_dtype

# Added to the softplus of a quadratic spline's heights.
LEAST_HEIGHT = 1e-3
# Steps from the first guess of a cubic's root to all digits: each at least triples those that are right.
_STEPS = {torch.float32: 5, torch.float64: 7}


class Spline(NamedTuple):
    """What every element shares, in the order of the operators' arguments."""

    degree: int
    bins: int
    tails: bool
    bounds: tuple[float, float, float, float]  # left, right, bottom, top
    minimums: tuple[float, float]  # bin width, bin height
    end_weight: float  # of the end bins in the end heights under linear tails
    scale: float
    event_dims: int


class Bins(NamedTuple):
    """The bins of each element in the unit square, (..., K) each: sizes, and the slopes at both ends."""

    widths: Tensor
    heights: Tensor
    slopes0: Tensor
    slopes1: Tensor


def counts(degree: int, bins: int, tails: bool) -> tuple[int, ...]:
    """How many parameters of each kind an element has."""
    return {1: (bins,), 2: (bins, bins - 1 if tails else bins + 1), 3: (bins, bins, 1, 1)}[degree]


def _shares(u: Tensor, minimum: float, spline: Spline) -> Tensor:
    """Shares of 1: (..., K), each at least the minimum."""
    return minimum + (1 - minimum * spline.bins) * (u * spline.scale).softmax(-1)


def _linear_bins(parts: Sequence[Tensor], spline: Spline) -> Bins:
    heights = _shares(parts[0], spline.minimums[1], spline)
    slopes = heights * spline.bins
    return Bins(torch.full_like(heights, 1 / spline.bins), heights, slopes, slopes)


def _quadratic_bins(parts: Sequence[Tensor], spline: Spline) -> Bins:
    widths = _shares(parts[0], spline.minimums[0], spline)
    # Not `softplus`, which turns linear at 20 and loses half the digits of float64 there.
    slopes = torch.logaddexp(parts[1] * spline.scale, parts[1].new_zeros(())) + LEAST_HEIGHT
    if spline.tails:
        ends = spline.end_weight * torch.stack((widths[..., 0], widths[..., -1]))
        inner = ((slopes[..., :-1] + slopes[..., 1:]) / 2 * widths[..., 1:-1]).sum(-1)
        end = (ends[0] * slopes[..., 0] + ends[1] * slopes[..., -1] + inner) / (1 - ends[0] - ends[1])
        slopes = torch.cat((end.unsqueeze(-1), slopes, end.unsqueeze(-1)), -1)
    area = ((slopes[..., :-1] + slopes[..., 1:]) / 2 * widths).sum(-1, keepdim=True)
    slopes = spline.minimums[1] + (1 - spline.minimums[1]) * (slopes / area)
    slopes0, slopes1 = slopes[..., :-1], slopes[..., 1:]
    return Bins(widths, (slopes0 + slopes1) / 2 * widths, slopes0, slopes1)


def _cubic_bins(parts: Sequence[Tensor], spline: Spline) -> Bins:
    widths, heights = (_shares(u, minimum, spline) for u, minimum in zip(parts, spline.minimums, strict=False))
    deltas = heights / widths
    w0, w1, delta0, delta1 = widths[..., :-1], widths[..., 1:], deltas[..., :-1], deltas[..., 1:]
    inner = torch.minimum(2 * torch.minimum(delta0, delta1), (w1 * delta0 + w0 * delta1) / (w0 + w1))
    least = torch.finfo(deltas.dtype).eps
    left = 3 * deltas[..., :1] * parts[2].sigmoid().clamp_min(least)
    right = 3 * deltas[..., -1:] * parts[3].sigmoid().clamp_min(least)
    return Bins(widths, heights, torch.cat((left, inner), -1), torch.cat((inner, right), -1))


_BINS_OF = {1: _linear_bins, 2: _quadratic_bins, 3: _cubic_bins}


def _cubic(theta: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A bin scaled to the unit square, with end slopes a and b: its value, slope and curvature."""
    rest = 1 - theta
    value = theta * (rest * (a * rest + (3 - b) * theta) + theta * theta)
    slope = a * rest * rest + 2 * (3 - a - b) * theta * rest + b * theta * theta
    return value, slope, a * (6 * theta - 4) + b * (6 * theta - 2) + 6 * (1 - 2 * theta)


def _root(eta: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """theta with _cubic(theta, a, b) = eta, for eta in [0, 1] and a monotone cubic.

    From the nearer end, where the root has most digits: the root of a quadratic with the end's slope, then steps to the
    root of the parabola that has the cubic's value, slope and curvature (Halley's irrational method), with bisection of
    the bracket where a step would leave it.
    """
    with torch.no_grad():
        mirrored = eta > 0.5
        value, start, end = (
            torch.where(mirrored, 1 - eta, eta),
            torch.where(mirrored, b, a),
            torch.where(mirrored, a, b),
        )
        bend = (3 - 2 * start - end).clamp_min(0.3)
        theta = (2 * value / (start + (start * start + 4 * bend * value).sqrt())).clamp_max(1)
        low, high = torch.zeros_like(theta), torch.ones_like(theta)
        for _ in range(_STEPS[theta.dtype]):
            at, slope, curvature = _cubic(theta, start, end)
            above = at > value
            low, high = torch.where(above, low, theta), torch.where(above, theta, high)
            excess = 2 * (at - value)
            step = theta - excess / (slope + (slope * slope - excess * curvature).clamp_min(0).sqrt())
            theta = torch.where((step < low) | (step > high), (low + high) / 2, step)
        theta = torch.where(mirrored, 1 - theta, theta)
    # Newton steps of length zero, for their derivatives: the first gives those of first order, the second those of
    # second and third.
    for _ in range(2):
        at, slope, _ = _cubic(theta, a, b)
        step = (eta - at) / slope
        theta = theta + (step - step.detach())
    return theta


def evaluate(value: Tensor, parts: Sequence[Tensor], spline: Spline, inverse: bool) -> tuple[Tensor, Tensor]:
    """The transformed value, like `value`, and ladj summed over the event dimensions."""
    dtype = arithmetic_dtype(value)
    if len(parts) == 1:
        parts = parts[0].split(counts(spline.degree, spline.bins, spline.tails), -1)
    bins = _BINS_OF[spline.degree]([part.to(dtype) for part in parts], spline)
    left, right, bottom, top = spline.bounds
    low, high = (bottom, top) if inverse else (left, right)
    stretch = (top - bottom) / (right - left)

    x = value.to(dtype)
    below, above = x < low, x > high
    inside = ((x - low) / (high - low)).clamp(0, 1)
    lefts, bottoms = (pad(sizes.cumsum(-1)[..., :-1], (1, 0)) for sizes in (bins.widths, bins.heights))
    k = (inside.unsqueeze(-1) >= (bottoms if inverse else lefts)[..., 1:]).sum(-1, keepdim=True)
    x_k, y_k, w, h, d0, d1 = (table.gather(-1, k).squeeze(-1) for table in (lefts, bottoms, *bins))
    delta = h / w
    theta = ((inside - y_k) / h if inverse else (inside - x_k) / w).clamp(0, 1)
    if inverse:
        theta = _root(theta, d0 / delta, d1 / delta)
    # Outside of the domain the point is that end, whatever rounding made of the last knot.
    theta = torch.where(below, 0.0, torch.where(above, 1.0, theta))
    height, slope, _ = _cubic(theta, d0 / delta, d1 / delta)
    slope = slope * delta * stretch

    identity = (below | above) & spline.tails
    excess = torch.where(identity, 0.0, torch.where(below, x - low, torch.where(above, x - high, 0.0)))
    if inverse:
        image = left + (right - left) * (x_k + w * theta) + excess / slope
    else:
        image = bottom + (top - bottom) * (y_k + h * height) + excess * slope
    y = torch.where(identity, x, image).to(value.dtype)
    ladj = torch.where(identity, 0.0, -slope.log() if inverse else slope.log())
    # sum over no dimensions would be a sum over all.
    return y, ladj.sum(tuple(range(-spline.event_dims, 0))) if spline.event_dims else ladj
