"""A masked network as a list of nodes on vectors: what `masked_inverse` needs to know of a MADE, whoever wrote it.

h_0 = x, and each node is a function of earlier ones: (W * M) h + b, an activation, a sum, a product, or a normalization
by fixed statistics (Germain et al. 2015, MADE, arXiv:1502.03509, eq. 8-10). Nodes that the context alone decides are
constants of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

# In the order of `enum class Unit` in csrc/masked.h, with the default of the parameter where there is one.
ACTIVATIONS: dict[str, float | None] = {
    "relu": None,
    "leaky_relu": 0.01,
    "elu": 1.0,
    "tanh": None,
    "sigmoid": None,
    "silu": None,
    "gelu": None,
    "gelu_tanh": None,
    "softplus": 1.0,
}

_GELU_TANH = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


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

    Without a gradient the masked weights are kept until a parameter changes, which its version counter tells. Writing
    through `.data` goes around that counter: call `forget()` after it.
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
        self._masked: dict[int, Kept] = {}
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
        return cast(Tensor, self.evaluate(x, context, self.parameters())[-1])

    def evaluate(
        self, x: Tensor | None, context: Tensor | None, parameters: Sequence[Tensor], dtype: torch.dtype | None = None
    ) -> list[Tensor | None]:
        """The value (n, units) of every node, with `parameters` in place of the layers' own.

        x: None leaves out what depends on it.
        dtype: of the arithmetic; None for that of the tensors.
        """
        if dtype is not None:
            x, context = (None if each is None else each.to(dtype) for each in (x, context))
        values: list[Tensor | None] = []
        for index, node in enumerate(self.nodes):
            if node.kind in ("input", "context"):
                values.append(x if node.kind == "input" else context)
                continue
            of = [values[source] for source in node.sources]
            values.append(None if any(each is None for each in of) else self._value(index, of, parameters, dtype))
        return values

    def _value(self, index: int, of: Sequence[Any], parameters: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
        node = self.nodes[index]
        if node.kind == "linear":
            bias = _at(parameters, node.slots[1], dtype)
            return cast(Tensor, functional.linear(of[0], self.weight(index, parameters, dtype), bias))
        if node.kind == "activation":
            return activate(node, of[0])
        if node.kind == "normalize":
            scale, shift = affine_of(node, parameters, dtype)
            return cast(Tensor, of[0] * scale + shift)
        return cast(Tensor, of[0] + of[1] if node.kind == "add" else of[0] * of[1])

    def weight(self, index: int, parameters: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """W * M of a linear node, kept from call to call where no gradient is wanted."""
        whole = parameters[self.nodes[index].slots[0]]
        if torch.is_grad_enabled() and whole.requires_grad:
            return self._multiply(index, whole, dtype)
        kept = self._masked.setdefault(index, Kept())
        weight: Tensor = kept.get((whole,), dtype, lambda: self._multiply(index, whole, dtype))
        return weight

    def _multiply(self, index: int, whole: Tensor, dtype: torch.dtype | None) -> Tensor:
        columns = slice(*self.nodes[index].columns)
        mask = getattr(self.nodes[index].layer, "mask", None)
        weight: Tensor = whole[:, columns] if mask is None else whole[:, columns] * mask[:, columns]
        return weight if dtype is None else weight.to(dtype)

    def backward(
        self,
        values: Sequence[Tensor],
        cotangents: dict[int, Tensor],
        parameters: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        closed: Collection[int] = (),
    ) -> tuple[list[Tensor | None], dict[int, Tensor]]:
        """The gradients of the parameters, and the cotangents of the nodes, for values from `evaluate`.

        cotangents: of the nodes where they are known; those of other nodes are found from them, in reverse order.
        closed: nodes to which nothing is passed back.
        """
        total = dict(cotangents)
        gradients: list[Tensor | None] = [None] * len(self._slots)

        def add_to(slot: int, gradient: Tensor) -> None:
            known = gradients[slot]
            gradients[slot] = gradient if known is None else known + gradient

        for index in reversed(range(len(self.nodes))):
            node = self.nodes[index]
            if index not in total or not node.sources:
                continue
            cotangent = total[index]
            of = [values[source] for source in node.sources]
            if node.kind == "linear":
                gradient = cotangent.mT @ of[0]
                mask = getattr(node.layer, "mask", None)
                gradient = gradient if mask is None else gradient * mask[:, slice(*node.columns)]
                margins = (node.columns[0], parameters[node.slots[0]].shape[1] - node.columns[1])
                add_to(node.slots[0], functional.pad(gradient, margins) if any(margins) else gradient)
                if node.slots[1] >= 0:
                    add_to(node.slots[1], cotangent.sum(0))
            elif node.kind == "normalize":
                for slot, gradient in _normalize_gradients(node, cotangent, of[0], parameters, dtype):
                    add_to(slot, gradient)
            for position, source in enumerate(node.sources):
                if source in closed:
                    continue
                if node.kind == "linear":
                    part = cotangent @ self.weight(index, parameters, dtype)
                else:
                    slope = self.slope(index, position, of, parameters, dtype)
                    part = cotangent if slope is None else cotangent * slope
                total[source] = total[source] + part if source in total else part
        return gradients, total

    def slope(
        self,
        index: int,
        position: int,
        of: Sequence[Tensor],
        parameters: Sequence[Tensor],
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """The derivative of an elementwise node by one of its sources, whose values are `of`; None where it is 1."""
        node = self.nodes[index]
        if node.kind == "activation":
            return slope_of(node, of[0])
        if node.kind == "multiply":
            return of[1 - position]
        if node.kind == "normalize":
            return affine_of(node, parameters, dtype)[0]
        return None


class Kept:
    """A result that stays until the tensors it was made of change, which their version counters tell."""

    def __init__(self) -> None:
        self._key: Any = None
        self._tensors: list[Tensor] = []
        self._value: Any = None

    def get(self, tensors: Sequence[Tensor], dtype: torch.dtype | None, make: Callable[[], Any]) -> Any:
        # A tensor made in inference mode has no counter, and a tracer cannot read one.
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            return make()
        key = (dtype, *((tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in tensors))
        if key != self._key:
            # What inference mode makes could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._value = make()
            # While the old ones are held, no new tensor can have their address.
            self._key, self._tensors = key, [tensor.detach() for tensor in tensors]
        return self._value


def _at(parameters: Sequence[Tensor], slot: int, dtype: torch.dtype | None) -> Tensor | None:
    if slot < 0:
        return None
    return parameters[slot] if dtype is None else parameters[slot].to(dtype)


def affine_of(node: Node, parameters: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The scale and the shift, (units,) each, of a normalization."""
    mean, variance, gain, bias = (_at(parameters, slot, dtype) for slot in node.slots)
    assert mean is not None
    assert variance is not None
    scale = (variance + node.parameter).rsqrt()
    scale = scale if gain is None else scale * gain
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _normalize_gradients(
    node: Node, cotangent: Tensor, h: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype | None
) -> Iterator[tuple[int, Tensor]]:
    """(slot, gradient) of the statistics, the gain and the bias of a normalization of h."""
    mean, variance, *_ = (_at(parameters, slot, dtype) for slot in node.slots)
    assert mean is not None
    assert variance is not None
    scale, _ = affine_of(node, parameters, dtype)
    inverse = (variance + node.parameter).rsqrt()
    moved, total = (cotangent * (h - mean)).sum(0), cotangent.sum(0)
    yield node.slots[0], -scale * total
    yield node.slots[1], -0.5 * moved * scale * inverse.square()
    if node.slots[2] >= 0:
        yield node.slots[2], moved * inverse
    if node.slots[3] >= 0:
        yield node.slots[3], total


def activate(node: Node, h: Tensor) -> Tensor:
    """The value of an activation at h."""
    name, parameter = node.name, node.parameter
    if name == "relu":
        return functional.relu(h)
    if name == "leaky_relu":
        return functional.leaky_relu(h, parameter)
    if name == "elu":
        return functional.elu(h, parameter)
    if name == "tanh":
        return h.tanh()
    if name == "sigmoid":
        return h.sigmoid()
    if name == "silu":
        return functional.silu(h)
    if name == "gelu":
        return functional.gelu(h)
    if name == "gelu_tanh":
        return functional.gelu(h, approximate="tanh")
    return functional.softplus(h, parameter)


def slope_of(node: Node, h: Tensor) -> Tensor:
    """The derivative of an activation at h."""
    name, parameter = node.name, node.parameter
    if name == "relu":
        return (h > 0).to(h.dtype)
    if name == "leaky_relu":
        return torch.where(h > 0, 1.0, parameter).to(h.dtype)
    if name == "elu":
        return torch.where(h > 0, 1.0, parameter * h.clamp_max(0).exp())
    if name == "tanh":
        return 1 - h.tanh().square()
    if name == "sigmoid":
        return h.sigmoid() * (-h).sigmoid()
    if name == "silu":
        gate = h.sigmoid()
        return gate * (1 + h * (-h).sigmoid())
    if name == "gelu":
        density = (-0.5 * h.square()).exp() / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(h / math.sqrt(2))) + h * density
    if name == "gelu_tanh":
        t = (_GELU_TANH * (h + _GELU_CUBIC * h**3)).tanh()
        return 0.5 * (1 + t) + 0.5 * h * (1 - t.square()) * _GELU_TANH * (1 + 3 * _GELU_CUBIC * h.square())
    return (parameter * h).sigmoid()
