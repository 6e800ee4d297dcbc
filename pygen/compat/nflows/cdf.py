"""Stand-ins for the elementwise splines of nflows (`nflows.transforms.nonlinearities`): parameters shared by a batch.

y = spline(x), with the log-determinant summed over all but the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from nflows.transforms import nonlinearities
from torch import Tensor

from pygen import ops
from pygen.compat.nflows.splines import Result, Spline, served, through


class PiecewiseLinearCDF(nonlinearities.PiecewiseLinearCDF):
    """`nflows.transforms.PiecewiseLinearCDF`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return _linear(self, inputs, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return _linear(self, inputs, inverse=True)


class PiecewiseQuadraticCDF(nonlinearities.PiecewiseQuadraticCDF):
    """`nflows.transforms.PiecewiseQuadraticCDF`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return _quadratic(self, inputs, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return _quadratic(self, inputs, inverse=True)


class PiecewiseCubicCDF(nonlinearities.PiecewiseCubicCDF):
    """`nflows.transforms.PiecewiseCubicCDF`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return _cubic(self, inputs, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return _cubic(self, inputs, inverse=True)


class PiecewiseRationalQuadraticCDF(nonlinearities.PiecewiseRationalQuadraticCDF):
    """`nflows.transforms.PiecewiseRationalQuadraticCDF`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return _rational_quadratic(self, inputs, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return _rational_quadratic(self, inputs, inverse=True)


LAYERS = {
    nonlinearities.PiecewiseLinearCDF: PiecewiseLinearCDF,
    nonlinearities.PiecewiseQuadraticCDF: PiecewiseQuadraticCDF,
    nonlinearities.PiecewiseCubicCDF: PiecewiseCubicCDF,
    nonlinearities.PiecewiseRationalQuadraticCDF: PiecewiseRationalQuadraticCDF,
}


def _linear(layer: Any, x: Tensor, inverse: bool) -> Result:
    return _shared(layer, ops.linear_spline, x, (layer.unnormalized_pdf,), inverse)


def _quadratic(layer: Any, x: Tensor, inverse: bool) -> Result:
    return _shared(
        layer, ops.quadratic_spline, x, (layer.unnormalized_widths, layer.unnormalized_heights), inverse,
        min_bin_width=layer.min_bin_width, min_bin_height=layer.min_bin_height,
    )  # fmt: skip


def _cubic(layer: Any, x: Tensor, inverse: bool) -> Result:
    parameters = (
        layer.unnormalized_widths, layer.unnormalized_heights, layer.unnorm_derivatives_left,
        layer.unnorm_derivatives_right,
    )  # fmt: skip
    return _shared(
        layer, ops.cubic_spline, x, parameters, inverse,
        min_bin_width=layer.min_bin_width, min_bin_height=layer.min_bin_height,
    )  # fmt: skip


def _rational_quadratic(layer: Any, x: Tensor, inverse: bool) -> Result:
    parameters = (layer.unnormalized_widths, layer.unnormalized_heights, layer.unnormalized_derivatives)
    return _shared(
        layer, ops.rational_quadratic_spline, x, parameters, inverse, min_bin_width=layer.min_bin_width,
        min_bin_height=layer.min_bin_height, min_derivative=layer.min_derivative,
    )  # fmt: skip


def _shared(
    layer: Any, spline: Spline, x: Tensor, parameters: tuple[Tensor, ...], inverse: bool, **options: float
) -> Result:
    if not served(parameters[0].shape[-1], layer.tails):
        return layer._spline(x, inverse)  # type: ignore[no-any-return]
    packed = torch.cat(parameters, -1) if len(parameters) > 1 else parameters[0]
    return through(spline, layer, x, packed, inverse, **options)
