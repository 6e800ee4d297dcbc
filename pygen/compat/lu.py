"""The LU-factored linear layer of nflows, which normflows took over: y = L U x + bias.

L has ones on its diagonal, U has softplus + epsilon there. Both are filled by one gather, and multiplied first where
the batch is larger than they are. (Kingma & Dhariwal 2018, Glow, arXiv:1807.03039, section 3.2)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def lower_upper(layer: Any) -> tuple[Tensor, Tensor]:
    """L and U, (features, features) each."""
    diagonal = layer.upper_diag
    constants = diagonal.new_tensor((0.0, 1.0))
    entries = torch.cat((layer.lower_entries, layer.upper_entries, diagonal, constants))
    lower, upper = entries[_places(layer.features, diagonal.device)]
    return lower, upper


def multiply(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, features) -> y like x, ladj (n,)."""
    lower, upper = lower_upper(layer)
    if len(x) >= layer.features:
        y = F.linear(x, lower @ upper, layer.bias)
    else:
        y = F.linear(F.linear(x, upper), lower, layer.bias)
    return y, layer.logabsdet().repeat(len(x))


def solve(layer: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """y (n, features) -> x like y, ladj (n,)."""
    lower, upper = lower_upper(layer)
    x = torch.linalg.solve_triangular(lower, (y - layer.bias).t(), upper=False, unitriangular=True)
    x = torch.linalg.solve_triangular(upper, x, upper=True)
    return x.t(), (-layer.logabsdet()).repeat(len(y))


def weight_inverse(layer: Any) -> Tensor:
    """(L U)^-1."""
    lower, upper = lower_upper(layer)
    identity = torch.eye(layer.features, dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
    inverse = torch.linalg.solve_triangular(upper, inverse, upper=True)
    return inverse


def _places(features: int, device: torch.device) -> Tensor:
    """(2, features, features): where each entry of L and U is in [lower | upper | diagonal of U | 0 | 1]."""
    if torch.compiler.is_compiling():
        return _number(features, device)
    # A tensor made in inference mode could not be used in a later call outside of it.
    with torch.inference_mode(False):
        return _numbered(features, device)


def _number(features: int, device: torch.device) -> Tensor:
    below = features * (features - 1) // 2
    zero, one = 2 * below + features, 2 * below + features + 1
    column = torch.arange(features, device=device)
    row = column.unsqueeze(1)
    before = row * (row - 1) // 2  # entries below the diagonal in the rows before
    lower = torch.where(column < row, before + column, zero)
    upper = torch.where(column > row, below + row * (features - 1) - before + column - row - 1, zero)
    diagonal = column == row
    return torch.stack((torch.where(diagonal, one, lower), torch.where(diagonal, 2 * below + row, upper)))


_numbered = functools.lru_cache(_number)
