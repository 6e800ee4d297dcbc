"""The inverse of a masked autoregressive transform in one sweep through its hyper network.

Zuko solves y_i = f(x_i | x_<i) by as many passes as the order has levels, each through the whole network; a sweep
computes each hidden unit once (`pygen.ops.masked_inverse`; Papamakarios et al. 2017, MAF, arXiv:1705.07057, eq. 3-4).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Transform
from zuko.utils import broadcast

from pygen import _native
from pygen.compat.described import Described, Descriptions
from pygen.compat.made import activate
from pygen.compat.zuko.transforms import Inverse
from pygen.compat.zuko.univariate import univariate_of
from pygen.ops.kept import can_keep
from pygen.ops.masked import masked_inverse
from pygen.ops.masked_network import MaskedNetwork

# Weights, from which on keeping them masked costs less than masking them anew.
_LARGE = 2**16


class AutoregressiveTransform(zuko.transforms.AutoregressiveTransform):
    """`zuko.transforms.AutoregressiveTransform` of a lazy transform and a context, its inverse in one sweep.

    Where the sweep does not know the univariate transform or the hyper network, the inverse takes zuko's passes.
    """

    def __init__(self, layer: Any, c: Tensor | None) -> None:
        super().__init__(functools.partial(layer.meta, c), layer.passes)
        self._layer = layer
        self._context = c

    @property
    def inv(self) -> Transform:
        return Inverse(self)

    def _inverse(self, y: Tensor) -> Tensor:
        swept = _sweep(self._layer, y, self._context)
        if swept is not None:
            return swept[0]
        x: Tensor = super()._inverse(y)
        return x

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        swept = _sweep(self._layer, y, self._context)
        if swept is not None:
            return swept
        x = torch.zeros_like(y)
        for _ in range(self.passes - 1):
            x = self.meta(x).inv(y)
        # The last pass has every parameter that it reads from an x that is final.
        solved: tuple[Tensor, Tensor] = self.meta(x).inv.call_and_ladj(y)
        return solved


_descriptions = Descriptions()


def _sweep(layer: Any, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """x and ladj (*) for y (*, D) and the context c (*, C), broadcast; None where zuko's passes are left."""
    univariate = univariate_of(layer)
    if univariate is None or univariate.elementwise is None or _native.kernels_for(y) is None:
        return None
    nodes = _nodes_of(layer)
    context_features = 0 if c is None else c.shape[-1]
    if nodes is None or y.shape[-1:] != (nodes.features,) or context_features != nodes.context_features:
        return None
    if c is not None:
        y, c = broadcast(y, c, ignore=1)
    x, ladj = masked_inverse(y, nodes, c, elementwise=univariate.elementwise())
    return x, ladj.to(x.dtype)


def phi_of(layer: Any, x: Tensor, c: Tensor | None) -> Tensor:
    """hyper(x, c), the masked weights kept from call to call where no gradient is wanted and they are large."""
    nodes = None if torch.is_grad_enabled() or not _is_large(layer.hyper) else _nodes_of(layer)
    if c is not None:
        x, c = broadcast(x, c, ignore=1)
    if nodes is not None:
        return nodes(x, c)
    phi: Tensor = layer.hyper(x if c is None else torch.cat((x, c), -1))
    return phi


def _is_large(hyper: nn.Module) -> bool:
    """Whether keeping masked weights costs less than masking them anew. Of CPU tensors: others do not tell of changes
    without waiting for the device."""
    if type(hyper) is not zuko.nn.MaskedMLP:
        return False
    parts = (each for part in hyper.children() for each in (part.children() if len(part._modules) else (part,)))
    weights = [part.weight for part in parts if isinstance(part, zuko.nn.MaskedLinear)]
    return sum(weight.numel() for weight in weights) >= _LARGE and can_keep(weights)


def why_no_sweep(layer: Any) -> str | None:
    """Why the inverse of a layer takes zuko's passes; None where it is a sweep."""
    univariate = univariate_of(layer)
    if univariate is not None and univariate.elementwise is None:
        return "its passes stay: the sweep does not know circular splines"
    why_not = _described(layer).why_not
    return f"its passes stay: {why_not}" if why_not else None


def _nodes_of(layer: Any) -> MaskedNetwork | None:
    """The layer's hyper network, with weights as they are now; None where it has parts that are not known."""
    described = _described(layer)
    if described.nodes is not None:
        described.refresh()
    return described.nodes


def _described(layer: Any) -> Described:
    """The layer's hyper network: read anew where its parts or masks have changed, with weights as they are."""
    return _descriptions.of(layer.hyper, functools.partial(_read, layer))


def _read(layer: Any) -> MaskedNetwork:
    """The layer's hyper network as nodes. ValueError: it has parts that are not known."""
    hyper = layer.hyper
    if type(hyper) is not zuko.nn.MaskedMLP or type(hyper[0]) is not zuko.nn.MaskedLinear:
        raise ValueError("its hyper network is not a MaskedMLP")
    features = hyper.out_features // layer.total
    network = MaskedNetwork(features, hyper.in_features - features)
    first, *others = hyper.children()
    node = network.linear(network.x, first, columns=(0, features))
    if network.context_features:
        of_context = network.linear(network.context, first, columns=(features, hyper.in_features), bias=False)
        node = network.add(node, of_context)
    for part in others:
        node = _append(network, node, part)
    return network


def _append(network: MaskedNetwork, node: int, part: nn.Module) -> int:
    if type(part) is zuko.nn.MaskedLinear:
        return network.linear(node, part)
    if type(part) is zuko.nn.Residual:
        inner = node
        for each in part.children():
            inner = _append(network, inner, each)
        return network.add(node, inner)
    return activate(network, node, part)
