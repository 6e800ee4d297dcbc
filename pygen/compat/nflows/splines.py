"""The functional splines of nflows (`nflows.transforms.splines`) on pygen's kernels.

Signatures, layouts, tails and errors are nflows'; what its formulas assert on data is computed instead. So are its
faults where they show in results: the log-determinants of the linear, quadratic and cubic splines leave out
log((top - bottom) / (right - left)), and with `enable_identity_init` linear tails meet a boundary slope that is not 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from nflows.transforms.base import InputOutsideDomain
from torch import Tensor

from pygen import ops
from pygen.compat.domain import check_binned

Result = tuple[Tensor, Tensor]
Spline = Callable[..., Result]

# What pygen's kernels take. The other functions answer NotImplemented, and the call goes to nflows' own.
_BINS = range(2, 129)


def served(bins: int, tails: str | None) -> bool:
    """Whether pygen has kernels for this spline."""
    return bins in _BINS and tails in (None, "linear")


def bins_of(layer: Any) -> int | None:
    """How many bins a spline layer has; None for other layers."""
    parameters = getattr(layer, "unnormalized_pdf", getattr(layer, "unnormalized_widths", None))
    return getattr(layer, "num_bins", None) if parameters is None else int(parameters.shape[-1])


def check_inside(inputs: Tensor, left: float, right: float) -> None:
    """Raise nflows' InputOutsideDomain where a spline without tails has an input outside, in either direction."""
    if inputs.numel():
        low, high = inputs.detach().aminmax()
        if low < left or high > right:
            raise InputOutsideDomain(f"inputs are in [{low:g}, {high:g}], but expected [{left:g}, {right:g}]")


def boundary_slope(min_derivative: float, identity_init: bool) -> float:
    """The slope at the ends under linear tails: 1, except that nflows finds the parameter of slope 1 for a plain
    softplus and with identity initialisation passes it to one of another sharpness."""
    if not identity_init:
        return 1.0
    sharpness = math.log(2) / (1 - min_derivative)
    return min_derivative + math.log1p(math.expm1(1 - min_derivative) ** sharpness) / sharpness


def through(
    spline: Spline, layer: Any, x: Tensor, parameters: Tensor | Sequence[Tensor], inverse: bool, **options: Any
) -> Result:
    """x (n, ...) through an operator, with the tails and the bound of a layer of nflows -> y like x, ladj (n,)."""
    tails = getattr(layer, "tails", None)
    if tails is None:
        check_inside(x, 0.0, 1.0)
    else:
        options = {"tails": tails, "domain": (-layer.tail_bound, layer.tail_bound), **options}
    return spline(x, parameters, inverse=inverse, event_dims=x.dim() - 1, **options)


def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    enable_identity_init: bool = False,
) -> Result:
    """inputs (...), parameters (..., K), (..., K), (..., K + 1) -> outputs and log-determinants like inputs."""
    if not served(unnormalized_widths.shape[-1], None):
        return NotImplemented  # type: ignore[no-any-return]
    _check_domain(inputs, inverse, left, right, bottom, top)
    return _elementwise(
        *ops.rational_quadratic_spline(
            inputs, (unnormalized_widths, unnormalized_heights, unnormalized_derivatives), inverse=inverse,
            domain=(left, right), image=(bottom, top), min_bin_width=min_bin_width, min_bin_height=min_bin_height,
            min_derivative=min_derivative, identity_init=enable_identity_init, event_dims=0,
        )
    )  # fmt: skip


def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    enable_identity_init: bool = False,
) -> Result:
    """inputs (...), parameters (..., K), (..., K), (..., K - 1) -> outputs and log-determinants like inputs."""
    if tails != "linear" or not served(unnormalized_widths.shape[-1], tails):
        return NotImplemented  # type: ignore[no-any-return]
    return _elementwise(
        *ops.rational_quadratic_spline(
            inputs, (unnormalized_widths, unnormalized_heights, unnormalized_derivatives), inverse=inverse,
            tails=tails, domain=(-tail_bound, tail_bound), min_bin_width=min_bin_width, min_bin_height=min_bin_height,
            min_derivative=min_derivative, identity_init=enable_identity_init,
            boundary_slope=boundary_slope(min_derivative, enable_identity_init), event_dims=0,
        )
    )  # fmt: skip


def linear_spline(
    inputs: Tensor,
    unnormalized_pdf: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
) -> Result:
    """inputs (...), parameters (..., K) -> outputs and log-determinants like inputs."""
    if not served(unnormalized_pdf.shape[-1], None):
        return NotImplemented  # type: ignore[no-any-return]
    _check_domain(inputs, inverse, left, right, bottom, top)
    outputs, ladj = ops.linear_spline(
        inputs, unnormalized_pdf, inverse=inverse, domain=(left, right), image=(bottom, top), event_dims=0
    )
    return _elementwise(outputs, _of_unit_square(ladj, inverse, left, right, bottom, top))


def unconstrained_linear_spline(
    inputs: Tensor, unnormalized_pdf: Tensor, inverse: bool = False, tail_bound: float = 1.0, tails: str = "linear"
) -> Result:
    """inputs (...), parameters (..., K) -> outputs and log-determinants like inputs."""
    if tails != "linear" or not served(unnormalized_pdf.shape[-1], tails):
        return NotImplemented  # type: ignore[no-any-return]
    return _elementwise(
        *ops.linear_spline(
            inputs, unnormalized_pdf, inverse=inverse, tails=tails, domain=(-tail_bound, tail_bound), event_dims=0
        )
    )


def quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
) -> Result:
    """inputs (...), parameters (..., K), (..., K + 1) -> outputs and log-determinants like inputs.

    With K - 1 heights the end heights are those of linear tails: pygen has that where domain and image agree.
    """
    bins = unnormalized_widths.shape[-1]
    ends_given = unnormalized_heights.shape[-1] != bins - 1
    if not served(bins, None) or not (ends_given or (left, right) == (bottom, top)):
        return NotImplemented  # type: ignore[no-any-return]
    _check_domain(inputs, inverse, left, right, bottom, top)
    outputs, ladj = ops.quadratic_spline(
        inputs, (unnormalized_widths, unnormalized_heights), inverse=inverse, tails=None if ends_given else "linear",
        domain=(left, right), image=(bottom, top) if ends_given else None, min_bin_width=min_bin_width,
        min_bin_height=min_bin_height, event_dims=0,
    )  # fmt: skip
    return _elementwise(outputs, _of_unit_square(ladj, inverse, left, right, bottom, top))


def unconstrained_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    inverse: bool = False,
    tail_bound: float = 1.0,
    tails: str = "linear",
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
) -> Result:
    """inputs (...), parameters (..., K), (..., K - 1) -> outputs and log-determinants like inputs."""
    if tails != "linear" or not served(unnormalized_widths.shape[-1], tails):
        return NotImplemented  # type: ignore[no-any-return]
    return _elementwise(
        *ops.quadratic_spline(
            inputs, (unnormalized_widths, unnormalized_heights), inverse=inverse, tails=tails,
            domain=(-tail_bound, tail_bound), min_bin_width=min_bin_width, min_bin_height=min_bin_height, event_dims=0,
        )
    )  # fmt: skip


def cubic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnorm_derivatives_left: Tensor,
    unnorm_derivatives_right: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    eps: float = 1e-5,
    quadratic_threshold: float = 1e-3,
) -> Result:
    """inputs (...), parameters (..., K), (..., K), (..., 1), (..., 1) -> outputs and log-determinants like inputs.

    eps and quadratic_threshold steer nflows' way to the root; pygen's needs neither.
    """
    if not served(unnormalized_widths.shape[-1], None):
        return NotImplemented  # type: ignore[no-any-return]
    _check_domain(inputs, inverse, left, right, bottom, top)
    parameters = (unnormalized_widths, unnormalized_heights, unnorm_derivatives_left, unnorm_derivatives_right)
    outputs, ladj = ops.cubic_spline(
        inputs, parameters, inverse=inverse, domain=(left, right), image=(bottom, top), min_bin_width=min_bin_width,
        min_bin_height=min_bin_height, event_dims=0,
    )  # fmt: skip
    return _elementwise(outputs, _of_unit_square(ladj, inverse, left, right, bottom, top))


def unconstrained_cubic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnorm_derivatives_left: Tensor,
    unnorm_derivatives_right: Tensor,
    inverse: bool = False,
    tail_bound: float = 1.0,
    tails: str = "linear",
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    eps: float = 1e-5,
    quadratic_threshold: float = 1e-3,
) -> Result:
    """inputs (...), parameters (..., K), (..., K), (..., 1), (..., 1) -> outputs and log-determinants like inputs."""
    if tails != "linear" or not served(unnormalized_widths.shape[-1], tails):
        return NotImplemented  # type: ignore[no-any-return]
    parameters = (unnormalized_widths, unnormalized_heights, unnorm_derivatives_left, unnorm_derivatives_right)
    return _elementwise(
        *ops.cubic_spline(
            inputs, parameters, inverse=inverse, tails=tails, domain=(-tail_bound, tail_bound),
            min_bin_width=min_bin_width, min_bin_height=min_bin_height, event_dims=0,
        )
    )  # fmt: skip


FUNCTIONS = {
    function.__name__: function
    for function in (
        linear_spline,
        unconstrained_linear_spline,
        quadratic_spline,
        unconstrained_quadratic_spline,
        cubic_spline,
        unconstrained_cubic_spline,
        rational_quadratic_spline,
        unconstrained_rational_quadratic_spline,
    )
}


def _elementwise(outputs: Tensor, ladj: Tensor) -> Result:
    """Log-determinants in the dtype of the outputs: callers store them beside each other."""
    return outputs, ladj.to(outputs.dtype)


def _check_domain(inputs: Tensor, inverse: bool, left: float, right: float, bottom: float, top: float) -> None:
    """Raise as nflows does, which holds the inputs of both directions against left and right, and then looks up those
    of the inverse between bottom and top."""
    check_inside(inputs, left, right)
    if inverse and (bottom, top) != (left, right):
        check_binned(inputs, bottom, top)


def _of_unit_square(ladj: Tensor, inverse: bool, left: float, right: float, bottom: float, top: float) -> Tensor:
    """The log-determinant as nflows gives it: of the spline scaled to the unit square."""
    if right - left == top - bottom:
        return ladj
    log_scale = math.log((top - bottom) / (right - left))
    return ladj + log_scale if inverse else ladj - log_scale
