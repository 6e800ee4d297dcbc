"""Drop-in for zuko: flows written for it run on pygen's kernels.

`convert(flow)` changes the lazy transforms of one flow, `patch()` those of the whole process. Parameters, state dicts,
distributions, domains and reprs stay zuko's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from pygen.compat import layers, require
from pygen.compat.handle import Changes, Handle, Patch, qualified_name

require("zuko")

import zuko  # noqa: E402

from pygen.compat.zuko import autoregressive, lazy, transforms, univariate  # noqa: E402

__all__ = ["convert", "patch"]

_LAYERS: layers.Layers = {
    zuko.flows.ElementWiseTransform: lazy.ElementWiseTransform,
    zuko.flows.MaskedAutoregressiveTransform: lazy.MaskedAutoregressiveTransform,
    zuko.flows.GeneralCouplingTransform: lazy.GeneralCouplingTransform,
}
_UNCONDITIONAL: layers.Layers = {zuko.lazy.UnconditionalTransform: lazy.UnconditionalTransform}
_CONTAINERS = (zuko.lazy.LazyComposedTransform, zuko.lazy.LazyInverse)

_NOT_PATCHED = {
    zuko.transforms.BernsteinTransform: "inverted by bisection",
    zuko.transforms.FreeFormJacobianTransform: "solves an ordinary differential equation",
    zuko.transforms.GaussianizationTransform: "inverted by bisection",
    zuko.transforms.MonotonicTransform: "inverted by bisection",
    zuko.transforms.RotationTransform: "one matrix product already",
    zuko.transforms.UnconstrainedMonotonicTransform: "a quadrature, inverted by bisection",
}


def convert(flow: nn.Module) -> Handle:
    """Put pygen's kernels under a live zuko flow, or any module that has zuko's lazy transforms in it.

    Layers change their class and nothing else: parameters, buffers, state-dict keys, hooks and repr stay, and so does
    all that zuko's distributions offer. Autoregressive, coupling and element-wise transforms with affine, spline or
    circular spline univariates, permutations and LU products are replaced; others are left and named, with the reason.

    Returns:
        A `Handle` that lists both and takes the change back (`undo()`, or the end of a `with`).

    Raises:
        TypeError: `flow` is not a module.
    """
    return layers.convert(flow, "zuko", {**_LAYERS, **_UNCONDITIONAL}, _reason_to_leave, _reason_to_leave_inverse)


def _reason_to_leave(layer: nn.Module) -> str | None:
    if type(layer) in _LAYERS:
        return univariate.reason_to_leave(layer)
    if type(layer) is zuko.lazy.UnconditionalTransform:
        return lazy.reason_to_leave_unconditional(layer)
    if isinstance(layer, zuko.lazy.LazyTransform) and not isinstance(layer, _CONTAINERS):
        if type(layer) in (*_LAYERS.values(), *_UNCONDITIONAL.values()):
            return "already a layer of pygen's"
        return layers.changed_by_subclass(layer, _LAYERS) or f"no kernel for {type(layer).__name__}"
    return None


def _reason_to_leave_inverse(layer: nn.Module) -> str | None:
    if type(layer) is zuko.flows.MaskedAutoregressiveTransform:
        return autoregressive.why_no_sweep(layer)
    return None


def _install(changes: Changes) -> None:
    layers.take_over(changes, _LAYERS)
    for cls, stand_in in transforms.STAND_INS.items():
        _construct(changes, cls, stand_in)
    for cls, reason in _NOT_PATCHED.items():
        changes.report_left(qualified_name(cls), reason, "the whole process")


def _construct(changes: Changes, cls: Any, stand_in: Any) -> None:
    """Make instances of `cls` instances of its stand-in, where that serves their arguments.

    An instance stays what it was made as, whatever becomes of the patch. PyTorch's compiler cannot follow a change of
    class, and generates code from zuko's own formulas.
    """
    original = cls.__init__

    @functools.wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls and not torch.compiler.is_compiling() and stand_in.serves(*args, **kwargs):
            self.__class__ = stand_in
            stand_in.__init__(self, *args, **kwargs)
        else:
            original(self, *args, **kwargs)

    changes.set(cls, "__init__", construct)
    changes.report_replaced(qualified_name(cls), qualified_name(stand_in), "__init__")


_patch = Patch("zuko", _install)


def patch() -> Handle:
    """Put pygen's kernels under zuko, for all flows and transforms of this process, those already there included.

    Existing code, saved state dicts and pickled flows need no change: classes stay zuko's, and the transforms that they
    make are pygen's subclasses of zuko's transforms. Under `torch.compile`, zuko's own formulas are compiled.

    Returns:
        A `Handle`, also a context manager: `with pygen.compat.zuko.patch(): ...`. The last of nested patches to end
        restores every attribute.
    """
    return _patch()
