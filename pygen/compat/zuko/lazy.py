"""Zuko's lazy transforms, whose hyper networks' outputs go to the kernels as they are.

phi = hyper(x, c), (*, D, P) with the parameters of an element side by side, is what the kernels read: nothing is taken
apart, and y with the sum of the log-determinant over D comes from one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import pi
from typing import Any

import torch
import zuko
from torch import Tensor
from torch.distributions import Transform
from zuko.flows.spline import CircularRQSTransform
from zuko.utils import broadcast, unpack

from pygen.compat.zuko.transforms import (
    STAND_INS,
    CouplingTransform,
    DependentTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
    are_splines,
    is_slope,
)

# phi (*, D, P) -> the univariate transform of D elements
Univariate = Callable[[Tensor], Transform]


def univariate_of(layer: Any) -> Univariate | None:
    """What makes the layer's univariate transform from packed parameters; None where there is no kernel for it."""
    function: Any = layer.univariate
    constants: dict[str, Any] = {}
    if type(function) is partial and not function.args:
        function, constants = function.func, function.keywords
    shapes = [tuple(shape) for shape in layer.shapes]
    if function is zuko.transforms.MonotonicAffineTransform:
        served = shapes == [(), ()] and constants.keys() <= {"slope"} and is_slope(**constants)
        return partial(MonotonicAffineTransform.packed, **constants) if served else None
    if function is zuko.transforms.MonotonicRQSTransform:
        served = constants.keys() <= {"bound", "slope"} and are_splines(shapes, **constants)
        return partial(MonotonicRQSTransform.packed, **constants) if served else None
    if function is CircularRQSTransform:
        served = constants.keys() <= {"slope"} and are_splines(shapes, **constants)
        return partial(_circular, **constants) if served else None
    return None


def _circular(phi: Tensor, **constants: float) -> Transform:
    shift = zuko.transforms.CircularShiftTransform(bound=pi)
    circular: Transform = zuko.transforms.ComposedTransform(
        shift, MonotonicRQSTransform.packed(phi, bound=pi, **constants)
    )
    return circular


def reason_to_leave(layer: Any) -> str | None:
    """Why a layer stays zuko's: there is no kernel for its univariate transform. None where there is."""
    if univariate_of(layer) is not None:
        return None
    function = layer.univariate
    while type(function) is partial:
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    shapes = ", ".join(str(tuple(shape)) for shape in layer.shapes)
    return f"no kernel for the univariate transform {name} of parameters {shapes}"


def _transform(layer: Any, phi: Tensor) -> Transform:
    """The transform of the D elements of the layer from phi (*, D, P)."""
    univariate = univariate_of(layer)
    base = layer.univariate(*unpack(phi, layer.shapes)) if univariate is None else univariate(phi)
    return DependentTransform(base, 1)


def _conditional(layer: Any, c: Tensor | None, x: Tensor) -> Transform:
    """zuko's `meta`: the transform that the hyper network makes of x and the context."""
    if c is not None:
        x = torch.cat(broadcast(x, c, ignore=1), dim=-1)
    return _transform(layer, layer.hyper(x).unflatten(-1, (-1, layer.total)))


class ElementWiseTransform(zuko.flows.ElementWiseTransform):
    """`zuko.flows.ElementWiseTransform` through the kernels."""

    def forward(self, c: Tensor | None = None) -> Transform:
        if c is None:
            # A copy: an optimizer's step does not move a transform that is in use.
            return _transform(self, torch.cat([part.reshape(len(part), -1) for part in self.phi], -1))
        return _transform(self, self.hyper(c).unflatten(-1, (-1, self.total)))


class MaskedAutoregressiveTransform(zuko.flows.MaskedAutoregressiveTransform):
    """`zuko.flows.MaskedAutoregressiveTransform` through the kernels."""

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        return _conditional(self, c, x)


class GeneralCouplingTransform(zuko.flows.GeneralCouplingTransform):
    """`zuko.flows.GeneralCouplingTransform` through the kernels."""

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        return _conditional(self, c, x)

    def forward(self, c: Tensor | None = None) -> Transform:
        return CouplingTransform(partial(self.meta, c), self.mask)


class UnconditionalTransform(zuko.lazy.UnconditionalTransform):
    """`zuko.lazy.UnconditionalTransform` of a transform that has a stand-in."""

    def forward(self, c: Tensor | None = None) -> Transform:
        return STAND_INS[self.f](*self.args, **self.kwargs)  # type: ignore[no-any-return]


def reason_to_leave_unconditional(layer: Any) -> str | None:
    """Why an unconditional layer stays zuko's: its transform has no stand-in. None where it has."""
    stand_in = STAND_INS.get(layer.f)
    if stand_in is not None and stand_in.serves(*layer.args, **layer.kwargs):
        return None
    return f"no kernel for {getattr(layer.f, '__name__', type(layer.f).__name__)}"
