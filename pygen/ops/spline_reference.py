"""The monotone rational-quadratic splines in plain PyTorch: specification, fallback and oracle of spline.py.

Inside bin k, with theta = (x - x_k) / w_k, t = theta (1 - theta) and delta = h_k / w_k,
y = y_k + h_k (delta theta^2 + d_k t) / D,  dy/dx = delta^2 (d_k+1 theta^2 + 2 delta t + d_k (1 - theta)^2) / D^2,
D = delta (1 - 2 t) + (d_k + d_k+1) t. (Durkan et al. 2019, Neural Spline Flows, arXiv:1906.04032, eq. 4-8)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pygen.ops.arguments import arithmetic_dtype

# In the order of `enum class Parametrization` in csrc/spline.h.
PARAMETRIZATIONS = ("softplus", "softclip")
# In the order of `enum class Tails` in csrc/spline.h; a sequence of tails is PER_DIMENSION.
TAILS = (None, "linear", "circular")
PER_DIMENSION = len(TAILS)


class Spline(NamedTuple):
    """What every element shares, in the order of the operators' arguments."""

    bins: int
    tails: int
    bounds: tuple[float, float, float, float]  # left, right, bottom, top
    minimums: tuple[float, float, float]  # bin width, bin height, derivative
    parametrization: int
    sharpness: float  # softplus: its beta; softclip: |ln slope|
    boundary_slope: float
    scale: float
    event_dims: int


def _softclip(u: Tensor, limit: float) -> Tensor:
    return u / (1 + (u / limit).abs())


def _fractions(u: Tensor, minimum: float, spline: Spline) -> Tensor:
    """The bins' shares of the domain: (..., K), adding to 1."""
    u = u * spline.scale
    if spline.parametrization == 1:
        u = _softclip(u, spline.sharpness / 2)
    return minimum + (1 - minimum * spline.bins) * u.softmax(-1)


def _slopes(u: Tensor, circular: Tensor, linear: Tensor, spline: Spline) -> Tensor:
    """The derivatives at the K + 1 knots."""
    kind = spline.tails
    if kind == 1:
        u = functional.pad(u, (1, 1))
    elif kind == 2:
        u = torch.cat((u, u[..., :1]), -1)
    elif kind == PER_DIMENSION:
        last = torch.where(circular, u[..., 0], u[..., -1])
        u = torch.cat((u[..., :-1], last.unsqueeze(-1)), -1)
    if spline.parametrization == 0:
        # Not `softplus`, which turns linear at 20 and loses half the digits of float64 there.
        slopes = spline.minimums[2] + torch.logaddexp(u * spline.sharpness, u.new_zeros(())) / spline.sharpness
    else:
        slopes = _softclip(u, spline.sharpness).exp()
    if kind in (1, PER_DIMENSION):
        end = torch.zeros(spline.bins + 1, dtype=torch.bool, device=u.device)
        end[0] = end[-1] = True
        slopes = torch.where(linear.unsqueeze(-1) & end, spline.boundary_slope, slopes)
    return slopes


def evaluate(
    value: Tensor, parts: Sequence[Tensor], dimensions: Tensor | None, spline: Spline, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The transformed value, like `value`, and ladj summed over the event dimensions."""
    dtype, bins = arithmetic_dtype(value), spline.bins
    if len(parts) == 1:
        parts = parts[0].split((bins, bins, parts[0].shape[-1] - 2 * bins), -1)
    widths, heights, derivatives = (part.to(dtype) for part in parts)
    if dimensions is None:
        dimensions = torch.tensor((*spline.bounds, float(spline.tails)), dtype=dtype, device=value.device)
    left, right, bottom, top, tails = dimensions.to(dtype).unbind()
    slopes = _slopes(derivatives, tails == 2, tails == 1, spline)

    x = value.to(dtype)
    (low, high), searched = ((bottom, top), 1) if inverse else ((left, right), 0)
    inside = torch.minimum(torch.maximum(x, low), high)
    outside = (x < low) | (x > high)
    identity = outside & (tails != 0)

    widths = _fractions(widths, spline.minimums[0], spline) * (right - left).unsqueeze(-1)
    heights = _fractions(heights, spline.minimums[1], spline) * (top - bottom).unsqueeze(-1)
    lefts, bottoms = (
        low_end.unsqueeze(-1) + functional.pad(sizes.cumsum(-1)[..., :-1], (1, 0))
        for low_end, sizes in ((left, widths), (bottom, heights))
    )
    k = (inside.unsqueeze(-1) >= (lefts, bottoms)[searched][..., 1:]).sum(-1, keepdim=True)

    def at(table: Tensor, index: Tensor) -> Tensor:
        return table.expand(*k.shape[:-1], -1).gather(-1, index).squeeze(-1)

    x_k, w, y_k, h = (at(table, k) for table in (lefts, widths, bottoms, heights))
    d0, d1 = at(slopes, k), at(slopes, k + 1)
    delta = h / w
    if inverse:
        # The discriminant as a sum of squares is never negative; of the two forms of the root, the one that adds.
        eta = ((inside - y_k) / h).clamp(0, 1)
        m = d0 * (1 - eta) - d1 * eta
        root = (m * m + 4 * delta * delta * eta * (1 - eta)).sqrt()
        near = 2 * delta * torch.where(m >= 0, eta, 1 - eta)
        near = near / (near + m.abs() + root)
        theta, rest = torch.where(m >= 0, near, 1 - near), torch.where(m >= 0, 1 - near, near)
        image = x_k + w * theta
    else:
        theta = ((inside - x_k) / w).clamp(0, 1)
        rest = 1 - theta
    t = theta * rest
    denominator = delta * (1 - 2 * t) + (d0 + d1) * t
    if not inverse:
        image = y_k + h * (theta * (delta * theta + d0 * rest) / denominator)
    ladj = (delta / denominator).square() * (d1 * theta * theta + 2 * delta * t + d0 * rest * rest)
    end_slope = torch.where(x < low, d0, d1)
    ladj = torch.where(outside, end_slope, ladj).log()

    excess = torch.where(identity, 0.0, x - inside)
    image = image + (excess / end_slope if inverse else excess * end_slope)
    y = torch.where(identity, x, image).to(value.dtype)
    ladj = torch.where(identity, 0.0, -ladj if inverse else ladj)
    # sum over no dimensions would be a sum over all.
    return y, ladj.sum(tuple(range(-spline.event_dims, 0))) if spline.event_dims else ladj
