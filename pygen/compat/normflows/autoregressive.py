"""Stand-ins for the masked autoregressive flows of normflows (`normflows.flows.affine.autoregressive`,
`normflows.flows.neural_spline.autoregressive`, `normflows.nets.made`).

Affine: y = x s + t, s = sigmoid(u + 2) + 1e-3, parameters of an input (u, t). The inverse is one sweep, except where
periodic features come before the network: there it is D passes, as in normflows.
"""

from __future__ import annotations

from typing import Any

from normflows.flows.affine import autoregressive
from normflows.flows.neural_spline import autoregressive as spline_autoregressive
from normflows.nets import made
from torch import Tensor, nn

from pygen import ops
from pygen.compat.described import exactly
from pygen.compat.domain import check_binned
from pygen.compat.made import Sweeps, activate, check_block, hidden_scale, multiply, normalize, spline_of
from pygen.compat.normflows.spline_layers import of_layer
from pygen.compat.normflows.splines import Result, served, through
from pygen.ops.masked import MaskedAffine
from pygen.ops.masked_network import MaskedNetwork


class MaskedLinear(made.MaskedLinear):
    """`normflows.nets.made.MaskedLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self, x)


class MaskedAffineAutoregressive(autoregressive.MaskedAffineAutoregressive):
    """`normflows.flows.MaskedAffineAutoregressive`."""

    def _elementwise_forward(self, inputs: Tensor, autoregressive_params: Tensor) -> Result:
        return _scale_and_shift(inputs, autoregressive_params, inverse=False)

    def _elementwise_inverse(self, inputs: Tensor, autoregressive_params: Tensor) -> Result:
        return _scale_and_shift(inputs, autoregressive_params, inverse=True)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        swept = sweeps.inverse(self.autoregressive_net, inputs, context, _AFFINE)
        return _passes(self, inputs, context) if swept is None else swept


class MaskedPiecewiseRationalQuadraticAutoregressive(
    spline_autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive
):
    """`normflows.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive`, which the
    autoregressive spline flows hold."""

    def _elementwise(self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False) -> Result:
        if not served(self.num_bins, self.tails):
            return NotImplemented  # type: ignore[no-any-return]
        parameters = autoregressive_params.reshape(*inputs.shape, -1)
        return through(
            inputs,
            parameters,
            inverse=inverse,
            event_dims=1,
            scale=hidden_scale(self),
            **of_layer(self),
        )

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        swept = None
        alike = self.tails is None or isinstance(self.tails, str)
        if alike and served(self.num_bins, self.tails) and not isinstance(self.tail_bound, Tensor):
            if self.tails is None:
                check_binned(inputs, 0.0, 1.0)
            swept = sweeps.inverse(self.autoregressive_net, inputs, context, spline_of(self))
        return _passes(self, inputs, context) if swept is None else swept


LAYERS = {
    made.MaskedLinear: MaskedLinear,
    autoregressive.MaskedAffineAutoregressive: MaskedAffineAutoregressive,
    spline_autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive: (
        MaskedPiecewiseRationalQuadraticAutoregressive
    ),
}

_AFFINE = MaskedAffine("sigmoid", offset=2.0, epsilon=1e-3)


def _scale_and_shift(x: Tensor, parameters: Tensor, inverse: bool) -> Result:
    raw_scale, shift = parameters.view(*x.shape, 2).unbind(-1)
    return ops.affine(x, raw_scale, shift, activation="sigmoid", offset=2.0, epsilon=1e-3, inverse=inverse)


def _passes(layer: Any, y: Tensor, context: Tensor | None) -> Result:
    """normflows' own inverse: D passes through the network."""
    result: Result = autoregressive.Autoregressive.inverse(layer, y, context)
    return result


def _describe(network: Any, with_context: bool) -> MaskedNetwork:
    if type(network) is not made.MADE:
        raise ValueError(f"its network is a {type(network).__name__}, not normflows' MADE")
    if type(network.preprocessing) is not nn.Identity:
        raise ValueError(f"its network starts with {type(network.preprocessing).__name__}")
    if with_context and not hasattr(network, "context_layer"):
        raise ValueError("its network takes no context")
    features = _known(network.initial_layer).in_features
    described = MaskedNetwork(features, exactly(network.context_layer, nn.Linear).in_features if with_context else 0)
    h = described.linear(described.x, _known(network.initial_layer))
    if with_context:
        h = described.add(h, described.linear(described.context, network.context_layer))
    for block in network.blocks:
        h = _describe_block(described, block, h, with_context)
    described.linear(h, _known(network.final_layer))
    return described


def _describe_block(described: MaskedNetwork, block: Any, h: int, with_context: bool) -> int:
    check_block(block, made.MaskedResidualBlock, made.MaskedFeedforwardBlock)
    if isinstance(block, made.MaskedFeedforwardBlock):
        if with_context:
            raise ValueError("its feedforward blocks take no context")
        h = described.linear(normalize(described, h, block.batch_norm), _known(block.linear))
        return activate(described, h, block.activation)
    norms = block.batch_norm_layers if block.use_batch_norm else (None, None)
    t = h
    for norm, linear in zip(norms, block.linear_layers, strict=True):
        t = activate(described, normalize(described, t, norm), block.activation)
        t = described.linear(t, _known(linear))
    if with_context:
        gate = described.linear(described.context, exactly(block.context_layer, nn.Linear))
        t = described.multiply(t, described.activation(gate, "sigmoid"))
    return described.add(h, t)


def _known(layer: Any) -> Any:
    return exactly(layer, made.MaskedLinear, MaskedLinear)


# Its residual blocks put the context beside the units, and so take as many rows of it.
sweeps = Sweeps(_describe, one_context_for_all=False)
