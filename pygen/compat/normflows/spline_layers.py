"""Stand-ins for the spline layers of normflows (`normflows.flows.neural_spline.coupling`).

Its wrappers, CoupledRationalQuadraticSpline and the circular ones, hold one of these and turn its direction around.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from normflows.flows.neural_spline import coupling
from torch import Tensor

from pygen.compat.coupling import couple, per_element
from pygen.compat.normflows.splines import Result, served, through


class PiecewiseRationalQuadraticCoupling(coupling.PiecewiseRationalQuadraticCoupling):
    """`normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _rational_quadratic, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _rational_quadratic, inverse=True)


class PiecewiseRationalQuadraticCDF(coupling.PiecewiseRationalQuadraticCDF):
    """`normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCDF`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return _shared(self, inputs, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return _shared(self, inputs, inverse=True)


LAYERS = {
    coupling.PiecewiseRationalQuadraticCoupling: PiecewiseRationalQuadraticCoupling,
    coupling.PiecewiseRationalQuadraticCDF: PiecewiseRationalQuadraticCDF,
}


def of_layer(layer: Any) -> dict[str, Any]:
    """The arguments of the spline that a layer holds."""
    return {
        "tails": layer.tails,
        "tail_bound": layer.tail_bound,
        "min_bin_width": layer.min_bin_width,
        "min_bin_height": layer.min_bin_height,
        "min_derivative": layer.min_derivative,
    }


def _rational_quadratic(layer: Any, x: Tensor, parameters: Tensor, inverse: bool) -> Result:
    if not served(layer.num_bins, layer.tails):
        return layer._coupling_transform(x, parameters, inverse)  # type: ignore[no-any-return]
    scale = 1.0
    for size in ("hidden_features", "hidden_channels"):
        if hasattr(layer.transform_net, size):
            scale = 1 / math.sqrt(getattr(layer.transform_net, size))
            break
    return through(
        x, per_element(parameters, x), inverse=inverse, event_dims=x.dim() - 1, scale=scale, **of_layer(layer)
    )


def _shared(layer: Any, x: Tensor, inverse: bool) -> Result:
    parameters = (layer.unnormalized_widths, layer.unnormalized_heights, layer.unnormalized_derivatives)
    if not served(parameters[0].shape[-1], layer.tails):
        return layer._spline(x, inverse)  # type: ignore[no-any-return]
    return through(x, torch.cat(parameters, -1), inverse=inverse, event_dims=x.dim() - 1, **of_layer(layer))
