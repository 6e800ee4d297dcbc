"""Inputs outside of a spline without tails: pygen's splines extrapolate where the libraries raise."""

from __future__ import annotations

import torch
from torch import Tensor

# The libraries widen the last bin by so much.
_MARGIN = 1e-6


def check_binned(inputs: Tensor, low: float, high: float) -> None:
    """Raise RuntimeError where an input is in none of the bins from `low` to `high`, as the libraries do when they look
    up the bin: on a GPU, as there, without waiting for it. NaN passes. Under a transform of `torch.func` all do."""
    if inputs.device.type not in ("cpu", "cuda") or torch._C._are_functorch_transforms_active():
        return
    outside = (inputs < low) | (inputs > high + _MARGIN)
    torch._assert_async(~outside.any(), f"inputs has values outside of [{low:g}, {high:g}], where the bins are")
