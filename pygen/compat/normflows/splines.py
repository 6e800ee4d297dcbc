"""The functional splines of normflows (`normflows.utils.splines`) on pygen's kernels.

Signatures, layouts and tails are normflows'; where its formulas fail by rounding these do not. A sequence of tails has
one of "linear" and "circular" for each of the last dimension's elements; outside of the bounds normflows then
returns zeros, and so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pygen import ops
from pygen.compat.domain import check_binned

Result = tuple[Tensor, Tensor]
Tails = str | Sequence[str] | None
Bound = float | Tensor

# What pygen's kernels take. The functions answer NotImplemented to the rest, and the call goes to normflows' own.
_BINS = range(2, 129)
_TAILS = (None, "linear", "circular")


def served(bins: int, tails: Any) -> bool:
    """Whether pygen has kernels for this spline."""
    if isinstance(tails, list | tuple):
        return bins in _BINS and all(tail in _TAILS for tail in tails)
    return bins in _BINS and tails in _TAILS


def bins_of(layer: Any) -> int | None:
    """How many bins a spline layer has; None for other layers."""
    parameters = getattr(layer, "unnormalized_widths", None)
    return getattr(layer, "num_bins", None) if parameters is None else int(parameters.shape[-1])


def through(
    x: Tensor,
    parameters: Tensor | Sequence[Tensor],
    *,
    inverse: bool,
    tails: Tails,
    tail_bound: Bound,
    event_dims: int,
    **options: Any,
) -> Result:
    """x (*batch, *event) through the spline with normflows' tails -> y like x, ladj (*batch)."""
    if tails is None:
        check_binned(x, 0.0, 1.0)
        return ops.rational_quadratic_spline(x, parameters, inverse=inverse, event_dims=event_dims, **options)
    y, ladj = ops.rational_quadratic_spline(
        x, parameters, inverse=inverse, tails=tails, domain=(-tail_bound, tail_bound), event_dims=event_dims, **options
    )
    if not isinstance(tails, str):
        y = torch.where(x.abs() > tail_bound, 0.0, y)
    return y, ladj


def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: Any = 0.0,
    right: Any = 1.0,
    bottom: Any = 0.0,
    top: Any = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> Result:
    """inputs (...), parameters (..., K), (..., K), (..., K + 1) -> outputs and log-determinants like inputs.

    Bounds that are tensors, one for each input, stay normflows'.
    """
    if not served(unnormalized_widths.shape[-1], None) or isinstance(left, Tensor):
        return NotImplemented  # type: ignore[no-any-return]
    low, high = (bottom, top) if inverse else (left, right)
    check_binned(inputs, low, high)
    y, ladj = ops.rational_quadratic_spline(
        inputs, (unnormalized_widths, unnormalized_heights, unnormalized_derivatives), inverse=inverse,
        domain=(left, right), image=(bottom, top), min_bin_width=min_bin_width, min_bin_height=min_bin_height,
        min_derivative=min_derivative, event_dims=0,
    )  # fmt: skip
    return y, ladj.to(y.dtype)


def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: Tails = "linear",
    tail_bound: Bound = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> Result:
    """inputs (...), parameters (..., K), (..., K), (..., D) -> outputs and log-determinants like inputs, where D is
    K - 1 with "linear", K with "circular" and K + 1 with a sequence.

    tail_bound: a number, or a tensor that broadcasts to the last dimension; other tensors stay normflows'.
    """
    if tails is None or not served(unnormalized_widths.shape[-1], tails) or not _of_last_dimension(tail_bound, inputs):
        return NotImplemented  # type: ignore[no-any-return]
    y, ladj = through(
        inputs, (unnormalized_widths, unnormalized_heights, unnormalized_derivatives), inverse=inverse, tails=tails,
        tail_bound=tail_bound, event_dims=0, min_bin_width=min_bin_width, min_bin_height=min_bin_height,
        min_derivative=min_derivative,
    )  # fmt: skip
    return y, ladj.to(y.dtype)


FUNCTIONS = {
    function.__name__: function for function in (rational_quadratic_spline, unconstrained_rational_quadratic_spline)
}


def _of_last_dimension(bound: Bound, x: Tensor) -> bool:
    return not isinstance(bound, Tensor) or bound.numel() == 1 or (bound.dim() == 1 and len(bound) == x.shape[-1])
