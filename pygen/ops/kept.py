"""Results that follow from a layer's tensors, kept from call to call while these stay as they are.

What follows from parameters is kept in evaluation on the CPU: where a gradient is wanted, under a tracer, and on other
devices, which would have to be waited for, it is made anew each time, as the libraries do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

_PROBED = 64  # elements of a tensor

Value = TypeVar("Value")


class KeptResult(Generic[Value]):
    """One value, made of tensors, that stays until its key changes."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Sequence[Tensor], Value] | None = None

    def get(self, key: Any, tensors: Sequence[Tensor], make: Callable[[], Value]) -> Value:
        """`make()`, or what it returned last time if the key is still the same."""
        if self._kept is None or self._kept[0] != key:
            # What inference mode makes could not be used outside of it. The old tensors are held, so that no new one
            # can have their address.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = key, [tensor.detach() for tensor in tensors], make()
        return self._kept[2]


class Kept(Generic[Value]):
    """One value for each layer, made of parameters, and forgotten with the layer.

    devices: the types of those where it is kept. whole: whether every element is looked at for what was written through
        `.data`, not a few of each tensor; for values that take far longer to make, and to use, than that.
    """

    def __init__(self, devices: tuple[str, ...] = ("cpu",), *, whole: bool = False) -> None:
        self._devices = devices
        self._whole = whole
        self._results: weakref.WeakKeyDictionary[nn.Module, KeptResult[Value]] = weakref.WeakKeyDictionary()

    def get(self, layer: nn.Module, tensors: Sequence[Tensor], make: Callable[[], Value]) -> Value:
        """`make()`, or what it returned last time for this layer, if none of the tensors has changed since."""
        graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if graph or not can_keep(tensors, self._devices):
            return make()
        key = (versions(tensors), *probes(tensors, whole=self._whole))
        return self._results.setdefault(layer, KeptResult()).get(key, tensors, make)

    def get_of_buffers(self, layer: nn.Module, tensors: Sequence[Tensor], make: Callable[[], Value]) -> Value:
        """The same, on any device, for tensors that change only when a state is loaded, such as masks."""
        return self._results.setdefault(layer, KeptResult()).get(versions(tensors), tensors, make)


def can_keep(tensors: Sequence[Tensor], devices: tuple[str, ...] = ("cpu",)) -> bool:
    """Whether a change of one of these parameters would be seen."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(tensor.device.type in devices and not tensor.is_inference() for tensor in tensors)


def versions(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What changes when a tensor is written to or replaced."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.shape) for t in tensors)


def probes(tensors: Sequence[Tensor], *, whole: bool = False) -> list[float]:
    """The sums of a few elements of each. Writing through `.data`, as averaging of weights often does, does not move a
    tensor's version: these tell of it. A device is waited for once.

    whole: with a sum of all bits of each, which tells of a write to any one element, too.
    """
    sums = [_sum_of_some(tensor) for tensor in tensors]
    if whole:
        sums += map(_sum_of_bits, tensors)
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(map(float, sums))
    return torch.stack([each.double().to(sums[0].device) for each in sums]).tolist()


def _sum_of_some(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    # An odd stride does not stay in one column of a matrix, which could be one that is always zero.
    return flat[:: (len(flat) // _PROBED) | 1].sum()


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The elements' bits as integers, summed modulo their number: exact, in any order, and as fast as memory. What
    changes all elements alike, such as their signs, may leave it as it is, but not the sum of a few of them."""
    flat = tensor.detach().contiguous().flatten()
    word = {1: torch.int8, 2: torch.int16}.get(flat.element_size(), torch.int32)
    return flat.view(word).sum(dtype=word)
