"""The inverse of a masked autoregressive transform in one sweep through its hyper network.

Zuko solves y_i = f(x_i | x_<i) by as many passes as the order has levels, each through the whole network; a sweep
computes each hidden unit once (`pygen.ops.masked_inverse`; Papamakarios et al. 2017, MAF, arXiv:1705.07057, eq. 3-4).
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Transform
from zuko.utils import broadcast

from pygen import _native
from pygen.compat.made import activate
from pygen.compat.zuko.transforms import Inverse
from pygen.compat.zuko.univariate import univariate_of
from pygen.ops.kept import can_keep, probe, versions
from pygen.ops.masked import masked_inverse
from pygen.ops.masked_network import MaskedNetwork

# Weights, from which on keeping them masked costs less than masking them anew.
_LARGE = 2**16
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


class _Described(NamedTuple):
    """A hyper network as nodes, or why it is not known. `held` keeps what `key` names from being replaced unseen, and
    `probed` are elements that tell whether the weights have changed."""

    key: tuple[Any, ...]
    held: tuple[Any, ...]
    nodes: MaskedNetwork | None
    why_not: str
    probed: list[float]


_described: weakref.WeakKeyDictionary[nn.Module, _Described] = weakref.WeakKeyDictionary()


def _sweep(layer: Any, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """x and ladj (*) for y (*, D) and the context c (*, C), broadcast; None where zuko's passes are left."""
    univariate = univariate_of(layer)
    if univariate is None or univariate.elementwise is None or _native.kernels_for(y) is None:
        return None
    nodes = _nodes_of(layer)
    if nodes is None:
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
    why_not = _describe(layer).why_not
    return f"its passes stay: {why_not}" if why_not else None


def _nodes_of(layer: Any) -> MaskedNetwork | None:
    """The layer's hyper network, with weights as they are now; None where it has parts that are not known."""
    described = _describe(layer)
    if described.nodes is not None:
        weights = [part.weight for part in described.held if isinstance(part, zuko.nn.MaskedLinear)]
        now = [probe(weight) for weight in weights] if can_keep(weights) else []
        if not now or now != described.probed:
            described.nodes.forget()
            described.probed[:] = now
    return described.nodes


def _describe(layer: Any) -> _Described:
    """The layer's hyper network: read anew where its parts or masks have changed, with weights as they are."""
    hyper, *parts = layer.hyper.modules()
    masks = [part.mask for part in parts if isinstance(part, zuko.nn.MaskedLinear)]
    altered = any(_is_altered(part) for part in (hyper, *parts))
    key = (altered, *map(id, parts), *versions(masks))
    described = _described.get(hyper)
    if described is None or described.key != key:
        nodes, why_not = None, ""
        try:
            if altered:
                raise ValueError("its hyper network has hooks or a forward of its own")
            nodes = _read(layer)
        except ValueError as error:
            why_not = str(error)
        described = _described[hyper] = _Described(key, (*parts, *masks), nodes, why_not, [])
    return described


def _is_altered(part: nn.Module) -> bool:
    """Whether calling a part does other things than its class says."""
    return "forward" in vars(part) or any(getattr(part, hooks) for hooks in _HOOKS)


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
