"""Which of zuko's univariate transforms the kernels serve, and how.

A lazy transform has a constructor, `univariate`, and the `shapes` of its arguments; zuko's flows take a
`functools.partial` with constants.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from math import pi
from typing import Any, NamedTuple

import zuko
from torch import Tensor
from torch.distributions import Transform
from zuko.flows.spline import CircularRQSTransform

from pygen.compat.zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform, are_splines, is_slope
from pygen.ops.masked import Elementwise, MaskedAffine, MaskedSpline


class Univariate(NamedTuple):
    """make: phi (*, D, P) -> the transform of D elements, from parameters side by side.
    elementwise: the same as `masked_inverse` takes it; None where that does not know it."""

    make: Callable[[Tensor], Transform]
    elementwise: Callable[[], Elementwise] | None


def univariate_of(layer: Any) -> Univariate | None:
    """The univariate transform of a lazy transform; None where there is no kernel for it."""
    function: Any = layer.univariate
    constants: dict[str, Any] = {}
    make: Callable[..., Transform] = _circular
    elementwise: Callable[[], Elementwise] | None = None
    if type(function) is partial and not function.args:
        function, constants = function.func, function.keywords
    shapes = [tuple(shape) for shape in layer.shapes]
    if function is zuko.transforms.MonotonicAffineTransform:
        served = shapes == [(), ()] and constants.keys() <= {"slope"} and is_slope(**constants)
        make, elementwise = MonotonicAffineTransform.packed, partial(_masked_affine, **constants)
    elif function is zuko.transforms.MonotonicRQSTransform:
        served = constants.keys() <= {"bound", "slope"} and are_splines(shapes, **constants)
        make, elementwise = MonotonicRQSTransform.packed, partial(_masked_spline, shapes[0], **constants)
    elif function is CircularRQSTransform:
        served = constants.keys() <= {"slope"} and are_splines(shapes, **constants)
    else:
        served = False
    return Univariate(partial(make, **constants), elementwise) if served else None


def _circular(phi: Tensor, **constants: float) -> Transform:
    shift = zuko.transforms.CircularShiftTransform(bound=pi)
    circular: Transform = zuko.transforms.ComposedTransform(
        shift, MonotonicRQSTransform.packed(phi, bound=pi, **constants)
    )
    return circular


@functools.cache
def _masked_affine(slope: float = 1e-3) -> Elementwise:
    return MaskedAffine("softclip", limit=-math.log(slope), scale_first=False)


@functools.cache
def _masked_spline(widths: tuple[int], bound: float = 5.0, slope: float = 1e-3) -> Elementwise:
    return MaskedSpline(*widths, tails="linear", domain=(-bound, bound), parametrization="softclip", slope=slope)


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
