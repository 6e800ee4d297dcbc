"""The masked network of nflows, which normflows took over, and the inverse of its transforms in one sweep.

A MADE is described to `masked_inverse` by its own layers, once; so weights stay where they are.
(Papamakarios et al. 2017, Masked Autoregressive Flow, arXiv:1705.07057)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygen.ops.kept import Kept, can_keep, probe
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
    if isinstance(activation, nn.LeakyReLU):
        return network.activation(source, "leaky_relu", activation.negative_slope)
    if isinstance(activation, nn.ELU):
        return network.activation(source, "elu", activation.alpha)
    if isinstance(activation, nn.Softplus):
        return network.activation(source, "softplus", activation.beta)
    if isinstance(activation, nn.GELU):
        return network.activation(source, "gelu" if activation.approximate == "none" else "gelu_tanh")
    for cls in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Identity):
        if isinstance(activation, cls):
            return network.activation(source, cls.__name__.lower())
    if activation not in _FUNCTIONS:
        raise ValueError(f"its activation {getattr(activation, '__name__', activation)!s} is not one of pygen's")
    return network.activation(source, _FUNCTIONS[activation])


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


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """How a MADE is swept: its network, or why it has none; its parts that are random or adapt in training; and a
    weight that tells whether all have changed."""

    network: MaskedNetwork | None
    why_not: str
    unsteady: list[nn.Module]
    probed: list[float]


class Sweeps:
    """The inverses of the transforms of one library."""

    def __init__(self, describe: Describe) -> None:
        self._describe = describe
        self._kept: dict[bool, Kept[_Sweep]] = {False: Kept(), True: Kept()}

    def why_not(self, layer: Any) -> str | None:
        """Why a masked autoregressive layer has no sweep; None where it has, and for other layers."""
        made = getattr(layer, "autoregressive_net", None)
        if made is None:
            return None
        return self._of(made, hasattr(made, "context_layer")).why_not or None

    def inverse(self, made: Any, y: Tensor, context: Tensor | None, elementwise: Elementwise) -> Result | None:
        """y (n, features) -> x like y, ladj (n,); None where the library's own way is left: D passes."""
        sweep = self._of(made, context is not None)
        if sweep.network is None or y.dim() != 2 or any(part.training for part in sweep.unsteady):
            return None
        if context is not None and context.dim() != 2:
            return None
        weight = made.final_layer.weight
        now = [probe(weight)] if can_keep((weight,)) else []
        if not now or now != sweep.probed:
            sweep.network.forget()
            sweep.probed[:] = now
        return masked_inverse(y, sweep.network, context, elementwise=elementwise)

    def _of(self, made: Any, with_context: bool) -> _Sweep:
        masks = [part.mask for part in made.modules() if hasattr(part, "mask")]
        return self._kept[with_context].get_of_buffers(made, masks, functools.partial(self._make, made, with_context))

    def _make(self, made: Any, with_context: bool) -> _Sweep:
        unsteady: list[nn.Module] = [
            part for part in made.modules()
            if isinstance(part, nn.BatchNorm1d) or (isinstance(part, nn.Dropout) and part.p > 0)
        ]  # fmt: skip
        try:
            return _Sweep(self._describe(made, with_context), "", unsteady, [])
        except ValueError as error:
            return _Sweep(None, str(error), unsteady, [])
