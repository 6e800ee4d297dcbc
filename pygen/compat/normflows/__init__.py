"""normflows on pygen's kernels: `convert(model)` for one model, `patch()` for the process.

from pygen.compat import normflows as drop_in

print(drop_in.convert(flow))            # what was replaced, and what was left with the reason

with drop_in.patch():                   # or without `with`, once at the start of a program
    train(flow)
"""

from __future__ import annotations

from torch import nn

from pygen.compat import require

require("normflows")

from normflows import flows  # noqa: E402
from normflows.utils import splines as normflows_splines  # noqa: E402

from pygen.compat import layers  # noqa: E402
from pygen.compat.handle import Changes, Handle, Patch  # noqa: E402
from pygen.compat.normflows import affine, autoregressive, mixing, spline_layers, splines  # noqa: E402

__all__ = ["convert", "patch"]

_LAYERS: layers.Layers = {**affine.LAYERS, **spline_layers.LAYERS, **autoregressive.LAYERS, **mixing.LAYERS}
# They hold flows, and compute nothing of their own.
_CONTAINERS = (
    flows.Reverse,
    flows.Composite,
    flows.AffineCouplingBlock,
    flows.GlowBlock,
    flows.LULinearPermute,
    flows.CoupledRationalQuadraticSpline,
    flows.CircularCoupledRationalQuadraticSpline,
    flows.AutoregressiveRationalQuadraticSpline,
    flows.CircularAutoregressiveRationalQuadraticSpline,
)


def convert(model: nn.Module) -> Handle:
    """Run the layers of a live normflows model on pygen's kernels.

    Each layer keeps its parameters, buffers, hooks and place: optimizers, state dicts, saved checkpoints and wrappers
    such as DistributedDataParallel go on as they were. Only its class is another, a subclass of its own.

    model: any module with normflows layers somewhere inside, or one of them itself.

    Returns the handle that lists the layers and puts their classes back. TypeError: `model` is not an `nn.Module`.
    """
    return layers.convert(model, "normflows", _LAYERS, _reason_to_leave, autoregressive.sweeps.why_not)


def _reason_to_leave(layer: nn.Module) -> str | None:
    if not isinstance(layer, flows.base.Flow) or isinstance(layer, _CONTAINERS):
        return None
    if type(layer) in _LAYERS:
        bins, tails = splines.bins_of(layer), getattr(layer, "tails", None)
        if bins is not None and not splines.served(bins, tails):
            return f"{bins} bins and tails {tails!r}: pygen has 2 to 128 bins"
        return None
    if type(layer) in _LAYERS.values():
        return "already a layer of pygen's"
    return layers.changed_by_subclass(layer, _LAYERS) or "pygen has nothing faster for it"


def _install(changes: Changes) -> None:
    layers.take_over(changes, _LAYERS)
    changes.functions((getattr(normflows_splines, name), function) for name, function in splines.FUNCTIONS.items())


_patch = Patch("normflows", _install)


def patch() -> Handle:
    """Run everything that is written for normflows on pygen's kernels: layers made before and after, the functional
    splines under every name they were imported by, and what subclasses inherit.

    It holds for the whole process until the handle is undone, by `undo()` or at the end of a `with`. Patches may be
    nested and undone in any order: the last one to go puts normflows back.
    """
    return _patch()
