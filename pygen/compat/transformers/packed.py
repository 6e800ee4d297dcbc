"""Linear layers whose float32 weights lie, while `generate` runs, as oneDNN's product with few rows wants them.

PyTorch multiplies float32 by MKL, which for a few rows can take several times as long as the weights take to be read. A
packed weight is a second copy of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.compat.transformers.swapped import Swapped, swapped
from pygen.ops.kept import KeptResult, can_keep, probes, versions

KEPT, IN_USE = "_pygen_kept", "_pygen_packed"  # a layer's packed weight, and the same where it can be relied on
BY_DEFAULT = 2**30  # bytes of weights in all that are packed without being asked for


class PackedLinear(Swapped):
    """A linear layer that has a packed weight inside `packed_weights`, and is its own class's outside."""

    def forward(self: Any, input: Tensor) -> Tensor:
        packed = vars(self).get(IN_USE)
        other = packed is None or input.dtype != torch.float32
        if other or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return F.linear(input, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, state = super().__reduce_ex__(protocol)
        return make, arguments, {name: value for name, value in state.items() if name not in (KEPT, IN_USE)}


def can_pack(layer: nn.Module) -> bool:
    """Whether there is anything to gain, and PyTorch was built with oneDNN."""
    own = type(layer) is nn.Linear and "forward" not in vars(layer)
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return own and there and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def total_bytes(layers: Iterable[nn.Module]) -> int:
    """What a second copy of the weights takes."""
    weights: list[Any] = [layer.weight for layer in layers]
    return sum(weight.nbytes for weight in weights)


@contextlib.contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Pack the weights of a model's layers, where they have changed since they were packed; inside they may not."""
    # In a `generate` within a `generate` they are the outer one's.
    layers: list[Any] = [
        layer for layer in model.modules() if isinstance(layer, PackedLinear) and IN_USE not in vars(layer)
    ]
    for layer in layers:
        own, weight = vars(layer), layer.weight
        if weight.dtype == torch.float32 and can_keep([weight]):
            key = (*versions([weight]), *probes([weight]))
            own[IN_USE] = own.setdefault(KEPT, KeptResult()).get(key, [weight], lambda weight=weight: _pack(weight))
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop(IN_USE, None)


@contextlib.contextmanager
def packing(model: nn.Module, kept: MutableMapping[nn.Module, KeptResult[Tensor]]) -> Iterator[None]:
    """`packed_weights` of a model whose linear layers are ordinary ones, and are so again afterwards.

    kept: where the packed weights are found the next time.
    """
    layers: list[Any] = [layer for layer in model.modules() if can_pack(layer)]
    if total_bytes(layers) > BY_DEFAULT:
        layers = []
    for layer in layers:
        vars(layer)[KEPT] = kept.setdefault(layer, KeptResult())
        layer.__class__ = swapped(PackedLinear, nn.Linear)
    try:
        with packed_weights(model):
            yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
            vars(layer).pop(KEPT, None)


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed
