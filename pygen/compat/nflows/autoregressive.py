"""Stand-ins for the masked autoregressive transforms of nflows (`nflows.transforms.autoregressive`, `.made`).

Affine: y = x s + t, s = softplus(u) + 1e-3, parameters of an input (u, t). The inverse of affine and rational-quadratic
transforms is one sweep; that of the others D passes, as in nflows, with masked weights that are multiplied once.
"""

from __future__ import annotations

import functools
from typing import Any

from nflows.nn.nde import made as nde_made
from nflows.transforms import autoregressive, made
from torch import Tensor, nn

from pygen import ops
from pygen.compat.described import exactly
from pygen.compat.made import Sweeps, activate, check_block, hidden_scale, multiply, normalize, spline_of
from pygen.compat.nflows.splines import Result, Spline, check_inside, served, through
from pygen.ops.masked import MaskedAffine
from pygen.ops.masked_network import MaskedNetwork


class MaskedLinear(made.MaskedLinear):
    """`nflows.transforms.made.MaskedLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self, x)


class DensityMaskedLinear(nde_made.MaskedLinear):
    """`nflows.nn.nde.made.MaskedLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self, x)


class MaskedAffineAutoregressive(autoregressive.MaskedAffineAutoregressiveTransform):
    """`nflows.transforms.MaskedAffineAutoregressiveTransform`."""

    def _elementwise_forward(self, inputs: Tensor, autoregressive_params: Tensor) -> Result:
        return _scale_and_shift(self, inputs, autoregressive_params, inverse=False)

    def _elementwise_inverse(self, inputs: Tensor, autoregressive_params: Tensor) -> Result:
        return _scale_and_shift(self, inputs, autoregressive_params, inverse=True)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        swept = sweeps.inverse(self.autoregressive_net, inputs, context, _affine(self._epsilon))
        return _passes(self, inputs, context) if swept is None else swept


class MaskedPiecewiseLinearAutoregressive(autoregressive.MaskedPiecewiseLinearAutoregressiveTransform):
    """`nflows.transforms.MaskedPiecewiseLinearAutoregressiveTransform`."""

    def _elementwise(self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False) -> Result:
        return _through(ops.linear_spline, self, inputs, autoregressive_params.reshape(*inputs.shape, -1), inverse)


class MaskedPiecewiseQuadraticAutoregressive(autoregressive.MaskedPiecewiseQuadraticAutoregressiveTransform):
    """`nflows.transforms.MaskedPiecewiseQuadraticAutoregressiveTransform`."""

    def _elementwise(self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False) -> Result:
        parameters = autoregressive_params.reshape(*inputs.shape, -1)
        widths, heights = parameters[..., : self.num_bins], parameters[..., self.num_bins :]
        scale = hidden_scale(self)
        return _through(
            ops.quadratic_spline, self, inputs, parameters if scale == 1 else (widths * scale, heights), inverse,
            min_bin_width=self.min_bin_width, min_bin_height=self.min_bin_height,
        )  # fmt: skip


class MaskedPiecewiseCubicAutoregressive(autoregressive.MaskedPiecewiseCubicAutoregressiveTransform):
    """`nflows.transforms.MaskedPiecewiseCubicAutoregressiveTransform`."""

    def _elementwise(self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False) -> Result:
        parameters = autoregressive_params.reshape(*inputs.shape, -1)
        return _through(ops.cubic_spline, self, inputs, parameters, inverse, scale=hidden_scale(self))


class MaskedPiecewiseRationalQuadraticAutoregressive(
    autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
):
    """`nflows.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform`."""

    def _elementwise(self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False) -> Result:
        parameters = autoregressive_params.reshape(*inputs.shape, -1)
        return _through(
            ops.rational_quadratic_spline, self, inputs, parameters, inverse, scale=hidden_scale(self),
            min_bin_width=self.min_bin_width, min_bin_height=self.min_bin_height, min_derivative=self.min_derivative,
        )  # fmt: skip

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        swept = None
        if served(self.num_bins, self.tails):
            if self.tails is None:
                check_inside(inputs, 0.0, 1.0)
            swept = sweeps.inverse(self.autoregressive_net, inputs, context, spline_of(self))
        return _passes(self, inputs, context) if swept is None else swept


LAYERS = {
    made.MaskedLinear: MaskedLinear,
    nde_made.MaskedLinear: DensityMaskedLinear,
    autoregressive.MaskedAffineAutoregressiveTransform: MaskedAffineAutoregressive,
    autoregressive.MaskedPiecewiseLinearAutoregressiveTransform: MaskedPiecewiseLinearAutoregressive,
    autoregressive.MaskedPiecewiseQuadraticAutoregressiveTransform: MaskedPiecewiseQuadraticAutoregressive,
    autoregressive.MaskedPiecewiseCubicAutoregressiveTransform: MaskedPiecewiseCubicAutoregressive,
    autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform: (
        MaskedPiecewiseRationalQuadraticAutoregressive
    ),
}


def _scale_and_shift(layer: Any, x: Tensor, parameters: Tensor, inverse: bool) -> Result:
    raw_scale, shift = parameters.view(*x.shape, 2).unbind(-1)
    return ops.affine(x, raw_scale, shift, activation="softplus", epsilon=layer._epsilon, inverse=inverse)


@functools.cache
def _affine(epsilon: float) -> MaskedAffine:
    return MaskedAffine("softplus", epsilon=epsilon)


def _through(
    spline: Spline, layer: Any, x: Tensor, parameters: Tensor | tuple[Tensor, ...], inverse: bool, **options: float
) -> Result:
    if not served(layer.num_bins, getattr(layer, "tails", None)):
        return NotImplemented  # type: ignore[no-any-return]
    return through(spline, layer, x, parameters, inverse, **options)


def _passes(layer: Any, y: Tensor, context: Tensor | None) -> Result:
    """nflows' own inverse: D passes through the network."""
    result: Result = autoregressive.AutoregressiveTransform.inverse(layer, y, context)
    return result


def _describe(network: Any, with_context: bool) -> MaskedNetwork:
    if type(network) is not made.MADE:
        raise ValueError(f"its network is a {type(network).__name__}, not nflows' MADE")
    if with_context and not hasattr(network, "context_layer"):
        raise ValueError("its network takes no context")
    features = _known(network.initial_layer).in_features
    described = MaskedNetwork(features, exactly(network.context_layer, nn.Linear).in_features if with_context else 0)
    h = described.linear(described.x, _known(network.initial_layer))
    if with_context:
        context = described.linear(described.context, network.context_layer)
        h = described.add(h, activate(described, context, network.activation))
    if not network.use_residual_blocks:
        h = activate(described, h, network.activation)
    for block in network.blocks:
        h = _describe_block(described, block, h, with_context)
    described.linear(h, _known(network.final_layer))
    return described


def _describe_block(described: MaskedNetwork, block: Any, h: int, with_context: bool) -> int:
    check_block(block, made.MaskedResidualBlock, made.MaskedFeedforwardBlock)
    if isinstance(block, made.MaskedFeedforwardBlock):
        h = described.linear(normalize(described, h, block.batch_norm), _known(block.linear))
        return activate(described, h, block.activation)
    norms = block.batch_norm_layers if block.use_batch_norm else (None, None)
    t = h
    for position, (norm, linear) in enumerate(zip(norms, block.linear_layers, strict=True)):
        t = activate(described, normalize(described, t, norm), block.activation)
        t = described.linear(t, _known(linear))
        if position == 0 and with_context:
            t = described.add(t, described.linear(described.context, exactly(block.context_layer, nn.Linear)))
    return described.add(h, t)


def _known(layer: Any) -> Any:
    return exactly(layer, made.MaskedLinear, MaskedLinear)


sweeps = Sweeps(_describe, one_context_for_all=True)
