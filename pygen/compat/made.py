"""The masked network of nflows, which normflows took over, and the inverse of its transforms in one sweep.

A MADE is described to `masked_inverse` by its own layers, once; so weights stay where they are.
(Papamakarios et al. 2017, Masked Autoregressive Flow, arXiv:1705.07057)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygen.compat.described import Described, Descriptions, exactly
from pygen.ops.kept import Kept
from pygen.ops.masked import Elementwise, MaskedSpline, masked_inverse
from pygen.ops.masked_network import MaskedNetwork

Result = tuple[Tensor, Tensor]
# (MADE, whether a context is given) -> its network. ValueError: why it cannot be described.
Describe = Callable[[Any, bool], MaskedNetwork]

_FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", F.leaky_relu: "leaky_relu", F.elu: "elu", F.tanh: "tanh", torch.tanh: "tanh",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", F.silu: "silu", F.gelu: "gelu", F.softplus: "softplus",
}  # fmt: skip


def multiply(layer: Any, x: Tensor) -> Tensor:
    """x (n, in) -> (n, out) through a masked linear layer, a large masked weight kept in evaluation."""
    weight, mask = layer.weight, layer.mask
    if weight.numel() < _LARGE or (torch.is_grad_enabled() and weight.requires_grad):
        masked = weight * mask
    else:
        masked = _masked_weights.get(layer, (weight, mask), lambda: weight * mask)
    return F.linear(x, masked, layer.bias)


# Below, looking whether a weight has changed takes longer than masking it.
_LARGE = 1 << 16
_masked_weights: Kept[Tensor] = Kept()


def activate(network: MaskedNetwork, source: int, activation: Any) -> int:
    """The node of an activation given as a function or as a module."""
    kind = type(activation)
    if kind is nn.LeakyReLU:
        return network.activation(source, "leaky_relu", activation.negative_slope)
    if kind is nn.ELU:
        return network.activation(source, "elu", activation.alpha)
    if kind is nn.Softplus:
        return network.activation(source, "softplus", activation.beta)
    if kind is nn.GELU:
        return network.activation(source, "gelu" if activation.approximate == "none" else "gelu_tanh")
    if kind in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Identity):
        return network.activation(source, kind.__name__.lower())
    if activation not in _FUNCTIONS:
        raise ValueError(f"its activation {getattr(activation, '__name__', activation)!s} is not one of pygen's")
    return network.activation(source, _FUNCTIONS[activation])


def normalize(network: MaskedNetwork, source: int, norm: nn.Module | None) -> int:
    """The node of a block's batch normalization, or the source itself where it has none."""
    if norm is None:
        return source
    if exactly(norm, nn.BatchNorm1d).running_mean is None:
        raise ValueError("its batch normalization keeps no running statistics")
    return network.normalize(source, norm)


def check_block(block: Any, *classes: type) -> None:
    """ValueError: a block is of another class, or one of its parts does more than its description would."""
    exactly(block, *classes)
    exactly(block.dropout, nn.Dropout)
    # Only a residual block has `use_batch_norm`; without one its activation comes first.
    if not getattr(block, "use_batch_norm", True) and getattr(block.activation, "inplace", False):
        raise ValueError("its activation works in place, on what a residual block then adds")


def hidden_scale(layer: Any) -> float:
    """The factor of unnormalized spline parameters: 1 with the libraries' own MADE, which tells no hidden features."""
    network = layer.autoregressive_net
    return 1 / math.sqrt(network.hidden_features) if hasattr(network, "hidden_features") else 1.0


def spline_of(layer: Any) -> MaskedSpline:
    """What the network's outputs mean in a rational-quadratic autoregressive layer."""
    return _spline(
        layer.num_bins, layer.tails, layer.tail_bound, layer.min_bin_width, layer.min_bin_height, layer.min_derivative,
        hidden_scale(layer),
    )  # fmt: skip


@functools.cache
def _spline(
    bins: int, tails: str | None, bound: float, width: float, height: float, derivative: float, scale: float
) -> MaskedSpline:
    domain = (0.0, 1.0) if tails is None else (-bound, bound)
    return MaskedSpline(bins, tails, domain, None, width, height, derivative, scale=scale)


class Sweeps:
    """The inverses of the transforms of one library.

    one_context_for_all: whether the library adds a context of one row to any number of rows.
    """

    def __init__(self, describe: Describe, *, one_context_for_all: bool) -> None:
        self._describe = describe
        self._one_context_for_all = one_context_for_all
        self._described = {False: Descriptions(), True: Descriptions()}

    def why_not(self, layer: Any) -> str | None:
        """Why a masked autoregressive layer has no sweep; None where it has, and for other layers."""
        made = getattr(layer, "autoregressive_net", None)
        if made is None:
            return None
        return self._of(made, hasattr(made, "context_layer")).why_not or None

    def inverse(self, made: Any, y: Tensor, context: Tensor | None, elementwise: Elementwise) -> Result | None:
        """y (n, features) -> x like y, ladj (n,); None where the library's own way is left: D passes, or its error."""
        described = self._of(made, context is not None)
        network = described.nodes
        if network is None or any(_is_unsteady(part) for part in described.parts):
            return None
        if not y.is_floating_point() or y.dim() != 2 or y.shape[1] != network.features:
            return None
        if context is not None:
            if self._one_context_for_all and context.dim() == 2 and len(context) == 1:
                context = context.expand(len(y), -1)
            if context.shape != (len(y), network.context_features) or context.device != y.device:
                return None
        described.refresh()
        return masked_inverse(y, network, context, elementwise=elementwise)

    def _of(self, made: Any, with_context: bool) -> Described:
        return self._described[with_context].of(made, functools.partial(self._describe, made, with_context))


def _is_unsteady(part: nn.Module) -> bool:
    """Whether a part is random or adapts, as it does in training."""
    return part.training and (isinstance(part, nn.BatchNorm1d) or (isinstance(part, nn.Dropout) and part.p > 0))
