"""Linear layers whose float32 weights lie, while `generate` runs, as oneDNN's product with few rows wants them.

PyTorch multiplies float32 by MKL, which for a few rows can take several times as long as the weights take to be read. A
packed weight is a second copy of it.
"""

from __future__ import annotations

import contextlib
import copyreg
import dataclasses
import threading
import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.compat.transformers.swapped import Swapped, swapped
from pygen.ops.kept import KeptResult, can_keep, versions

BY_DEFAULT = 2**30  # bytes of weights in all that are packed without being asked for

# The packed weights of layers, kept from `generate` to `generate`.
Packs = MutableMapping[nn.Module, KeptResult[Tensor]]


@dataclasses.dataclass
class _InUse:
    """A packed weight inside `packed_weights`; the parameter that it was made of, its address and version then."""

    packed: Tensor
    weight: Tensor
    address: int
    version: int
    users: int  # calls of `generate`, one in another or in several threads

    def is_of(self, weight: Tensor) -> bool:
        return weight is self.weight and weight.data_ptr() == self.address and weight._version == self.version


# Beside the layers, not in them: what copies or saves a layer's attributes is not to meet oneDNN's tensors.
_in_use: weakref.WeakKeyDictionary[nn.Module, _InUse] = weakref.WeakKeyDictionary()
_lent: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # users of layers inside `packing`
_lock = threading.Lock()


class PackedLinear(Swapped):
    """A linear layer that has a packed weight inside `packed_weights`, and is its own class's outside."""

    def forward(self: Any, input: Tensor) -> Tensor:
        weight = self.weight
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return F.linear(input, weight, self.bias)
        packed = _in_use.get(self)
        if packed is None or input.dtype != torch.float32 or not packed.is_of(weight):
            return F.linear(input, weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed.packed, self.bias, "none", [], "")
        return out

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if self in _lent:  # an ordinary layer, whose copy nobody would take the class back from
            return copyreg._reconstructor, (nn.Linear, object, None), vars(self)  # type: ignore[attr-defined]
        return super().__reduce_ex__(protocol)


def can_pack(layer: nn.Module) -> bool:
    """Whether there is anything to gain, and PyTorch was built with oneDNN."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return type(layer) is nn.Linear and there and _has_plain_weight(layer)


def _has_plain_weight(layer: nn.Module) -> bool:
    """Whether a layer multiplies by a float32 parameter on the CPU: not by one that a hook makes before each call, as
    `weight_norm` and pruning do, nor by a subclass of `Tensor`, as libraries of quantization have them."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and (bias is None or type(bias) is nn.Parameter)
        and not layer._forward_pre_hooks
        and "forward" not in vars(layer)
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


def total_bytes(layers: Iterable[nn.Module]) -> int:
    """What a second copy of the weights takes."""
    weights: list[Any] = [layer.weight for layer in layers]
    return sum(weight.nbytes for weight in weights)


@contextlib.contextmanager
def packed_weights(model: nn.Module, kept: Packs) -> Iterator[None]:
    """Pack the weights of a model's layers, where they have changed since they were packed. A layer whose weight is
    replaced or written to inside multiplies by that; a write through `.data` inside is seen the next time only.

    kept: where the packed weights are found the next time.
    """
    entered = []
    try:
        for layer in model.modules():
            if isinstance(layer, PackedLinear) and _enter(layer, kept):
                entered.append(layer)
        yield
    finally:
        for layer in entered:
            _leave(layer)


def _enter(layer: Any, kept: Packs) -> bool:
    if not _has_plain_weight(layer) or not can_keep([layer.weight]):
        kept.pop(layer, None)
        return False
    weight = layer.weight
    with _lock:
        used = _in_use.get(layer)
        if used is not None and used.is_of(weight):  # in a `generate` within a `generate`
            used.users += 1
            return True
    key = (*versions([weight]), *_sums(weight))
    packed = kept.setdefault(layer, KeptResult()).get(key, [weight], lambda: _pack(weight))
    with _lock:
        used = _in_use.get(layer)
        users = 0 if used is None else used.users
        _in_use[layer] = _InUse(packed, weight, weight.data_ptr(), weight._version, users + 1)
    return True


def _leave(layer: nn.Module) -> None:
    with _lock:
        used = _in_use[layer]
        used.users -= 1
        if not used.users:
            del _in_use[layer]


@contextlib.contextmanager
def packing(model: nn.Module, kept: Packs) -> Iterator[None]:
    """`packed_weights` of a model whose linear layers are ordinary ones, and are so again afterwards."""
    of_ours = swapped(PackedLinear, nn.Linear)
    with _lock:
        layers: list[Any] = []
        for layer in model.modules():
            if can_pack(layer) or (layer in _lent and _has_plain_weight(layer)):
                layers.append(layer)
            else:
                kept.pop(layer, None)  # of another dtype, or made by a hook since
        if total_bytes(layers) > BY_DEFAULT:
            layers = []
        for layer in layers:
            _lent[layer] = _lent.get(layer, 0) + 1
            layer.__class__ = of_ours
    try:
        with packed_weights(model, kept):
            yield
    finally:
        with _lock:
            for layer in layers:
                _lent[layer] -= 1
                if not _lent[layer]:
                    del _lent[layer]
                    if type(layer) is of_ours:
                        layer.__class__ = nn.Linear


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def _sums(weight: Tensor) -> tuple[bytes, bytes]:
    """The sums of all rows' and all columns' bits, exact, in about the time of one product. Writing through `.data`, as
    the averaging of weights and adapters that are merged often do, does not move a tensor's version: these tell of it.
    """
    weight = weight.detach()
    pairs = weight.shape[1] % 2 == 0 and weight.is_contiguous() and weight.storage_offset() % 2 == 0
    bits = weight.view(torch.int64 if pairs else torch.int32)  # PyTorch is slow to sum narrow integers
    return bits.sum(1).numpy().tobytes(), bits.sum(0).numpy().tobytes()
