"""Layers of another library that run on pygen's kernels, one by one in a model or all of a kind in the process.

A stand-in is a subclass of the layer it stands in for and has nothing of its own but methods. So a live layer becomes
one by changing its class, with its parameters, buffers, hooks and place in the model; and the class of the library
becomes one by taking over the methods.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pygen.compat.handle import Changes, Handle, qualified_name

# Class of the library -> its stand-in. (For the type checker the libraries have no types.)
Layers = Mapping[Any, Any]
# Why a layer, or its inverse, stays as it is; None where it need not, or where nobody would expect it to change.
Reason = Callable[[nn.Module], str | None]


def convert(
    model: nn.Module, library: str, layers: Layers, reason_to_leave: Reason, reason_to_leave_inverse: Reason
) -> Handle:
    """Change the layers of one model; the handle lists them by their paths in it.

    TypeError: `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {qualified_name(type(model))}, but expected a torch.nn.Module")
    changes = Changes()
    for path, layer in model.named_modules():
        reason = reason_to_leave(layer)
        if reason is not None:
            changes.report_left(qualified_name(type(layer)), reason, path)
        elif type(layer) in layers:
            reason = reason_to_leave_inverse(layer)
            if reason is not None:
                changes.report_left(f"{qualified_name(type(layer))}.inverse", reason, path)
            changes.swap_class(layer, layers[type(layer)], path)
    return Handle.of(f"pygen.compat.{library}.convert", changes)


def take_over(changes: Changes, layers: Layers) -> None:
    """Give the classes of the library the methods of their stand-ins."""
    for cls, stand_in in layers.items():
        for name, function in vars(stand_in).items():
            if isinstance(function, types.FunctionType):
                changes.method(cls, name, function)


def changed_by_subclass(layer: nn.Module, layers: Layers) -> str | None:
    """The reason to leave a layer of a class that somebody derived from one that has a stand-in."""
    for base in type(layer).__mro__[1:]:
        if base in layers and type(layer) not in layers.values():
            return f"a subclass of {base.__name__}, which may compute something else; patch() covers what it inherits"
    return None
