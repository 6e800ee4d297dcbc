"""Stand-ins for the coupling layers of nflows (`nflows.transforms.coupling`).

Affine: y = x s + t, s = sigmoid(u + 2) + 1e-3, parameters [t | u]. Piecewise: the parameters of an element lie
together, and go to the kernel as they are, with the factor 1 / sqrt(hidden features) of the unnormalized ones.
"""

from __future__ import annotations

import math
from typing import Any

from nflows.transforms import coupling
from torch import Tensor

from pygen import ops
from pygen.compat.coupling import couple, per_element
from pygen.compat.nflows.splines import Result, Spline, served, through


class AffineCoupling(coupling.AffineCouplingTransform):
    """`nflows.transforms.AffineCouplingTransform`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _affine, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _affine, inverse=True)


class AdditiveCoupling(coupling.AdditiveCouplingTransform):
    """`nflows.transforms.AdditiveCouplingTransform`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _additive, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _additive, inverse=True)


class PiecewiseLinearCoupling(coupling.PiecewiseLinearCouplingTransform):
    """`nflows.transforms.PiecewiseLinearCouplingTransform`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _linear, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _linear, inverse=True)


class PiecewiseQuadraticCoupling(coupling.PiecewiseQuadraticCouplingTransform):
    """`nflows.transforms.PiecewiseQuadraticCouplingTransform`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _quadratic, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _quadratic, inverse=True)


class PiecewiseCubicCoupling(coupling.PiecewiseCubicCouplingTransform):
    """`nflows.transforms.PiecewiseCubicCouplingTransform`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _cubic, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _cubic, inverse=True)


class PiecewiseRationalQuadraticCoupling(coupling.PiecewiseRationalQuadraticCouplingTransform):
    """`nflows.transforms.PiecewiseRationalQuadraticCouplingTransform`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _rational_quadratic, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return couple(self, inputs, context, _rational_quadratic, inverse=True)


LAYERS = {
    coupling.AffineCouplingTransform: AffineCoupling,
    coupling.AdditiveCouplingTransform: AdditiveCoupling,
    coupling.PiecewiseLinearCouplingTransform: PiecewiseLinearCoupling,
    coupling.PiecewiseQuadraticCouplingTransform: PiecewiseQuadraticCoupling,
    coupling.PiecewiseCubicCouplingTransform: PiecewiseCubicCoupling,
    coupling.PiecewiseRationalQuadraticCouplingTransform: PiecewiseRationalQuadraticCoupling,
}


def _affine(layer: Any, x: Tensor, parameters: Tensor, inverse: bool) -> Result:
    shift, raw_scale = parameters.split(layer.num_transform_features, dim=1)
    return ops.affine(
        x, raw_scale, shift, activation="sigmoid", offset=2.0, epsilon=1e-3, event_dims=x.dim() - 1, inverse=inverse
    )


def _additive(layer: Any, x: Tensor, parameters: Tensor, inverse: bool) -> Result:
    return ops.affine(x, None, parameters, event_dims=x.dim() - 1, inverse=inverse)


def _linear(layer: Any, x: Tensor, parameters: Tensor, inverse: bool) -> Result:
    return _piecewise(layer, ops.linear_spline, x, parameters, inverse)


def _quadratic(layer: Any, x: Tensor, parameters: Tensor, inverse: bool) -> Result:
    return _piecewise(
        layer, ops.quadratic_spline, x, parameters, inverse, scale=_scale(layer, "hidden_features"),
        min_bin_width=layer.min_bin_width, min_bin_height=layer.min_bin_height,
    )  # fmt: skip


def _cubic(layer: Any, x: Tensor, parameters: Tensor, inverse: bool) -> Result:
    return _piecewise(
        layer, ops.cubic_spline, x, parameters, inverse, scale=_scale(layer, "hidden_features"),
        min_bin_width=layer.min_bin_width, min_bin_height=layer.min_bin_height,
    )  # fmt: skip


def _rational_quadratic(layer: Any, x: Tensor, parameters: Tensor, inverse: bool) -> Result:
    return _piecewise(
        layer, ops.rational_quadratic_spline, x, parameters, inverse,
        scale=_scale(layer, "hidden_features", "hidden_channels"), min_bin_width=layer.min_bin_width,
        min_bin_height=layer.min_bin_height, min_derivative=layer.min_derivative,
    )  # fmt: skip


def _piecewise(layer: Any, spline: Spline, x: Tensor, parameters: Tensor, inverse: bool, **options: float) -> Result:
    if not served(layer.num_bins, layer.tails):
        return layer._coupling_transform(x, parameters, inverse)  # type: ignore[no-any-return]
    return through(spline, layer, x, per_element(parameters, x), inverse, **options)


def _scale(layer: Any, *sizes: str) -> float:
    """The factor of the unnormalized parameters, from the first of these sizes that the conditioner has."""
    for size in sizes:
        if hasattr(layer.transform_net, size):
            return 1 / math.sqrt(getattr(layer.transform_net, size))
    return 1.0
