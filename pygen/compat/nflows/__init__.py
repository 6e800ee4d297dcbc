"""nflows on pygen's kernels: `convert(model)` for one model, `patch()` for the process.

from pygen.compat import nflows as drop_in

print(drop_in.convert(flow))            # what was replaced, and what was left with the reason

with drop_in.patch():                   # or without `with`, once at the start of a program
    train(flow)
"""

from __future__ import annotations

from torch import nn

from pygen.compat import require

require("nflows")

from nflows.transforms import base  # noqa: E402
from nflows.transforms import splines as nflows_splines  # noqa: E402

from pygen.compat import layers  # noqa: E402
from pygen.compat.handle import Changes, Handle, Patch  # noqa: E402
from pygen.compat.nflows import autoregressive, cdf, coupling, linear, splines  # noqa: E402

__all__ = ["convert", "patch"]

_LAYERS: layers.Layers = {**coupling.LAYERS, **cdf.LAYERS, **autoregressive.LAYERS, **linear.LAYERS}
# They hold transforms, and compute nothing of their own.
_CONTAINERS = (base.CompositeTransform, base.MultiscaleCompositeTransform, base.InverseTransform)


def convert(model: nn.Module) -> Handle:
    """Run the layers of a live nflows model on pygen's kernels.

    Each layer keeps its parameters, buffers, hooks and place: optimizers, state dicts, saved checkpoints and wrappers
    such as DistributedDataParallel go on as they were. Only its class is another, a subclass of its own.

    model: any module with nflows layers somewhere inside, or one of them itself.

    Returns the handle that lists the layers and puts their classes back. TypeError: `model` is not an `nn.Module`.
    """
    return layers.convert(model, "nflows", _LAYERS, _reason_to_leave, autoregressive.sweeps.why_not)


def _reason_to_leave(layer: nn.Module) -> str | None:
    if not isinstance(layer, base.Transform) or isinstance(layer, _CONTAINERS):
        return None
    if type(layer) in _LAYERS:
        bins, tails = splines.bins_of(layer), getattr(layer, "tails", None)
        if bins is not None and not splines.served(bins, tails):
            return f"{bins} bins and tails {tails!r}: pygen has 2 to 128 bins, and for nflows linear tails or none"
        return None
    if type(layer) in _LAYERS.values():
        return "already a layer of pygen's"
    return layers.changed_by_subclass(layer, _LAYERS) or "pygen has nothing faster for it"


def _install(changes: Changes) -> None:
    layers.take_over(changes, _LAYERS)
    changes.functions((getattr(nflows_splines, name), function) for name, function in splines.FUNCTIONS.items())


_patch = Patch("nflows", _install)


def patch() -> Handle:
    """Run everything that is written for nflows on pygen's kernels: layers made before and after, the functional
    splines under every name they were imported by, and what subclasses inherit.

    It holds for the whole process until the handle is undone, by `undo()` or at the end of a `with`. Patches may be
    nested and undone in any order: the last one to go puts nflows back.
    """
    return _patch()
