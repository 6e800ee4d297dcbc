"""A masked network as a list of nodes on vectors: what `masked_inverse` needs to know of a MADE, whoever wrote it.

h_0 = x, and each node is a function of earlier ones: (W * M) h + b, an activation, a sum, a product, or a normalization
by fixed statistics (Germain et al. 2015, MADE, arXiv:1502.03509, eq. 8-10). Nodes that the context alone decides are
constants of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from pygen import _native
from pygen.ops.kept import KeptResult, versions
from pygen.ops.masked_units import ACTIVATIONS, activate, slope_of


class Node(NamedTuple):
    """One vector of the network. `slots` are positions in `MaskedNetwork.parameters()`, -1 for what is absent."""

    kind: str  # input, context, linear, activation, add, multiply, normalize
    units: int
    sources: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    name: str = ""  # of the activation
    parameter: float = 0.0  # of the activation; epsilon of the normalization
    layer: Any = None
    columns: tuple[int, int] = (0, 0)  # of the layer's weight that belong to the source


class Tensors(NamedTuple):
    """What the nodes of a network read, one tensor for each slot."""

    own: Sequence[Tensor]
    dtype: torch.dtype | None = None  # of the arithmetic, None for the tensors' own
    keep: bool = False  # whether what is made of them may serve the next call

    def at(self, slot: int) -> Tensor:
        return self.own[slot] if self.dtype is None else self.own[slot].to(self.dtype)

    def given(self, slot: int) -> Tensor | None:
        """None for a slot of -1."""
        return self.at(slot) if slot >= 0 else None

    @property
    def kept(self) -> bool:
        """`keep`, where a change would be seen."""
        # A tensor made in inference mode has no counter, and a tracer cannot read one.
        return self.keep and not torch.compiler.is_compiling() and not any(each.is_inference() for each in self.own)

    def made_once(self, kept: KeptResult[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """`make()`, kept where it may be until one of the tensors changes, which their version counters tell."""
        if not self.kept:
            return make()
        return kept.get((self.dtype, versions(self.own)), self.own, make)


class MaskedNetwork:
    """A network from x (n, features), and a context (n, context_features), to a vector (n, outputs) of parameters.

    Build it once per module, from the module's own layers: each method adds a node and returns its number, for later
    nodes to read. The last node added is the output. nflows' residual MADE with context, for example:

        network = MaskedNetwork(features, context_features)
        h = network.linear(network.x, made.initial_layer)
        c = network.activation(network.linear(network.context, made.context_layer), "relu")
        h = network.add(h, c)
        for block in made.blocks:
            t = network.linear(network.activation(h, "relu"), block.linear_layers[0])
            t = network.add(t, network.linear(network.context, block.context_layer))
            h = network.add(h, network.linear(network.activation(t, "relu"), block.linear_layers[1]))
        network.linear(h, made.final_layer)

    Weights, biases and masks are read from the layers at each call, so that training, loading and moving the module
    need nothing of this object. A layer is anything with `weight` (units, sources), `bias` (units,) or None, and, where
    it is masked, `mask` of the weight's shape; masks must not change. What depends on what is read off the masks:
    any order of the inputs, any number of layers.

    Where parameters get no gradient, their products with the masks are kept until one changes, which its version
    counter tells. Writing through `.data` goes around that counter: call `forget()` after it.
    """

    x = 0

    def __init__(self, features: int, context_features: int = 0) -> None:
        if features < 1 or context_features < 0:
            raise ValueError(
                f"features and context_features are {features} and {context_features}, but expected at least 1 and 0"
            )
        self.features = features
        self.context_features = context_features
        self.nodes = [Node("input", features)]
        self._slots: list[tuple[Any, str]] = []
        self.plans: dict[Any, Any] = {}
        self._masked: dict[int, KeptResult[Tensor]] = {}
        if context_features:
            self.nodes.append(Node("context", context_features))

    @property
    def context(self) -> int:
        """The node of the context."""
        if not self.context_features:
            raise ValueError("context_features is 0, but a node reads the context")
        return 1

    @property
    def outputs(self) -> int:
        """The number of units of the last node."""
        return self.nodes[-1].units

    def linear(self, source: int, layer: Any, *, columns: tuple[int, int] | None = None, bias: bool = True) -> int:
        """(weight * mask) source + bias.

        columns: (from, to), the columns of the weight that multiply this source, for a layer that reads several
            vectors side by side (zuko puts x and the context next to each other): one `linear` for each, and `add`.
        bias: False leaves the layer's bias out, where another node has added it.
        """
        units, inputs = layer.weight.shape
        columns = (0, inputs) if columns is None else columns
        if not 0 <= columns[0] <= columns[1] <= inputs or columns[1] - columns[0] != self._units(source):
            raise ValueError(
                f"layer has a weight of shape {(units, inputs)} and columns {columns}, but expected as many columns as "
                f"node {source} has units, {self._units(source)}"
            )
        slots = (self._slot(layer, "weight"), self._slot(layer, "bias") if bias and layer.bias is not None else -1)
        return self._append(Node("linear", units, (source,), slots, layer=layer, columns=columns))

    def activation(self, source: int, name: str, parameter: float | None = None) -> int:
        """An activation by name: a key of ACTIVATIONS, or "identity", which adds no node.

        parameter: the slope of leaky_relu below zero, the alpha of elu, the beta of softplus; their defaults are
            PyTorch's.
        """
        if name == "identity":
            return source
        if name not in ACTIVATIONS:
            raise ValueError(f"activation is {name!r}, but expected identity, {', '.join(ACTIVATIONS)}")
        default = ACTIVATIONS[name]
        if parameter is not None and default is None:
            raise ValueError(f"parameter is {parameter}, but activation {name!r} has none")
        value = float(parameter if parameter is not None else default or 0.0)
        return self._append(Node("activation", self._units(source), (source,), name=name, parameter=value))

    def add(self, first: int, second: int) -> int:
        """The sum of two nodes, as of a residual block or a context projection."""
        return self._pair("add", first, second)

    def multiply(self, first: int, second: int) -> int:
        """The product of two nodes unit by unit, as of a gate."""
        return self._pair("multiply", first, second)

    def normalize(self, source: int, norm: Any) -> int:
        """A batch normalization by its running statistics: `running_mean`, `running_var`, `eps`, `weight`, `bias`."""
        if len(norm.running_mean) != self._units(source):
            raise ValueError(
                f"norm has {len(norm.running_mean)} features, but node {source} has {self._units(source)} units"
            )
        names = ("running_mean", "running_var", "weight", "bias")
        slots = tuple(self._slot(norm, name) if getattr(norm, name) is not None else -1 for name in names)
        return self._append(Node("normalize", self._units(source), (source,), slots, parameter=norm.eps, layer=norm))

    def _units(self, node: int) -> int:
        if not 0 <= node < len(self.nodes):
            raise ValueError(f"node is {node}, but the network has {len(self.nodes)} nodes so far")
        return self.nodes[node].units

    def _pair(self, kind: str, first: int, second: int) -> int:
        if self._units(first) != self._units(second):
            raise ValueError(
                f"node {first} has {self._units(first)} units and node {second} has {self._units(second)}, but "
                f"{kind} expects as many of both"
            )
        return self._append(Node(kind, self._units(first), (first, second)))

    def _append(self, node: Node) -> int:
        self.nodes.append(node)
        self.plans.clear()
        return len(self.nodes) - 1

    def _slot(self, layer: Any, name: str) -> int:
        for position, (known, attribute) in enumerate(self._slots):
            if known is layer and attribute == name:
                return position
        self._slots.append((layer, name))
        return len(self._slots) - 1

    def __getstate__(self) -> dict[str, Any]:
        # What can be made again is not copied or pickled with the module.
        return self.__dict__ | {"plans": {}, "_masked": {}}

    def forget(self) -> None:
        """Drop the masked and packed weights that are kept while no parameter changes."""
        self._masked.clear()
        for plan in self.plans.values():
            plan.forget()

    def parameters(self) -> list[Tensor]:
        """The tensors that the nodes read, each once."""
        for node in self.nodes:
            if node.kind == "normalize" and getattr(node.layer, "training", False):
                raise ValueError("a batch normalization is in training, but expected fixed statistics: call eval()")
        return [getattr(layer, name) for layer, name in self._slots]

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The outputs (n, outputs) for x (n, features) and context (n, context_features), differentiable."""
        own = self.parameters()
        return cast(Tensor, self.evaluate(x, context, Tensors(own, keep=not _native.wants_gradient(*own)))[-1])

    def evaluate(self, x: Tensor | None, context: Tensor | None, tensors: Tensors) -> list[Tensor | None]:
        """The value (n, units) of every node. Without x, None for those that depend on it."""
        if tensors.dtype is not None:
            x, context = (None if each is None else each.to(tensors.dtype) for each in (x, context))
        values: list[Tensor | None] = []
        for index, node in enumerate(self.nodes):
            if node.kind in ("input", "context"):
                values.append(x if node.kind == "input" else context)
                continue
            of = [values[source] for source in node.sources]
            values.append(None if any(each is None for each in of) else self._value(index, of, tensors))
        return values

    def _value(self, index: int, of: Sequence[Any], tensors: Tensors) -> Tensor:
        node = self.nodes[index]
        if node.kind == "linear":
            return functional.linear(of[0], self.weight(index, tensors), tensors.given(node.slots[1]))
        if node.kind == "activation":
            return activate(node.name, node.parameter, of[0])
        if node.kind == "normalize":
            scale, shift = affine_of(node, tensors)
            return cast(Tensor, of[0] * scale + shift)
        return cast(Tensor, of[0] + of[1] if node.kind == "add" else of[0] * of[1])

    def weight(self, index: int, tensors: Tensors) -> Tensor:
        """weight * mask of a linear node."""
        node = self.nodes[index]
        columns, mask = slice(*node.columns), getattr(node.layer, "mask", None)

        def multiply() -> Tensor:
            weight = tensors.at(node.slots[0])[:, columns]
            return weight if mask is None else weight * mask[:, columns].to(weight.dtype)

        if not tensors.kept:
            return multiply()
        kept = self._masked.setdefault(index, KeptResult())
        return Tensors([tensors.own[node.slots[0]]], tensors.dtype, tensors.keep).made_once(kept, multiply)

    def backward(
        self, values: Sequence[Tensor], cotangents: dict[int, Tensor], tensors: Tensors, closed: Collection[int] = ()
    ) -> tuple[list[Tensor | None], dict[int, Tensor]]:
        """The gradients of the parameters, and the cotangents of the nodes, for values from `evaluate`.

        cotangents: of the nodes where they are known; those of other nodes are found from them, in reverse order.
        closed: nodes to which nothing is passed back.
        """
        total = dict(cotangents)
        gradients: list[Tensor | None] = [None] * len(self._slots)
        for index in reversed(range(len(self.nodes))):
            node = self.nodes[index]
            if index not in total or not node.sources:
                continue
            cotangent, of = total[index], [values[source] for source in node.sources]
            if node.kind == "linear":
                found = self._linear_gradients(node, cotangent, of[0], tensors)
            elif node.kind == "normalize":
                found = _normalize_gradients(node, cotangent, of[0], tensors)
            else:
                found = []
            for slot, gradient in found:
                known = gradients[slot]
                gradients[slot] = gradient if known is None else known + gradient
            for position, source in enumerate(node.sources):
                if source in closed:
                    continue
                if node.kind == "linear":
                    part = cotangent @ self.weight(index, tensors)
                else:
                    slope = self.slope(index, position, of, tensors)
                    part = cotangent if slope is None else cotangent * slope
                total[source] = total[source] + part if source in total else part
        return gradients, total

    def _linear_gradients(self, node: Node, cotangent: Tensor, h: Tensor, tensors: Tensors) -> list[tuple[int, Tensor]]:
        """(slot, gradient) of the weight and the bias of a linear node of h."""
        gradient, mask = cotangent.mT @ h, getattr(node.layer, "mask", None)
        gradient = gradient if mask is None else gradient * mask[:, slice(*node.columns)].to(gradient.dtype)
        margins = (node.columns[0], tensors.own[node.slots[0]].shape[1] - node.columns[1])
        found = [(node.slots[0], functional.pad(gradient, margins) if any(margins) else gradient)]
        return found if node.slots[1] < 0 else [*found, (node.slots[1], cotangent.sum(0))]

    def slope(self, index: int, position: int, of: Sequence[Tensor], tensors: Tensors) -> Tensor | None:
        """The derivative of an elementwise node by one of its sources, whose values are `of`; None where it is 1."""
        node = self.nodes[index]
        if node.kind == "activation":
            return slope_of(node.name, node.parameter, of[0])
        if node.kind == "multiply":
            return of[1 - position]
        if node.kind == "normalize":
            return affine_of(node, tensors)[0]
        return None


def affine_of(node: Node, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """The scale and the shift, (units,) each, of a normalization."""
    gain, bias = tensors.given(node.slots[2]), tensors.given(node.slots[3])
    scale = (tensors.at(node.slots[1]) + node.parameter).rsqrt()
    scale = scale if gain is None else scale * gain
    shift = -tensors.at(node.slots[0]) * scale
    return scale, shift if bias is None else shift + bias


def _normalize_gradients(node: Node, cotangent: Tensor, h: Tensor, tensors: Tensors) -> list[tuple[int, Tensor]]:
    """(slot, gradient) of the statistics, the gain and the bias of a normalization of h."""
    scale, _ = affine_of(node, tensors)
    inverse = (tensors.at(node.slots[1]) + node.parameter).rsqrt()
    moved, total = (cotangent * (h - tensors.at(node.slots[0]))).sum(0), cotangent.sum(0)
    gradients = (-scale * total, -0.5 * moved * scale * inverse.square(), moved * inverse, total)
    return [(slot, gradient) for slot, gradient in zip(node.slots, gradients, strict=True) if slot >= 0]
