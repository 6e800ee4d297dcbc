"""Zuko's lazy transforms, whose hyper networks' outputs go to the kernels as they are.

phi = hyper(x, c), (*, D, P) with the parameters of an element side by side, is what the kernels read: nothing is taken
apart, and y with the sum of the log-determinant over D comes from one pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import zuko
from torch import Tensor
from torch.distributions import Transform
from zuko.utils import broadcast, unpack

from pygen.compat.zuko.autoregressive import AutoregressiveTransform, phi_of
from pygen.compat.zuko.transforms import STAND_INS, CouplingTransform, DependentTransform
from pygen.compat.zuko.univariate import univariate_of


def _transform(layer: Any, phi: Tensor) -> Transform:
    """The transform of D elements from phi (*, D P), P parameters side by side for each."""
    phi = phi.unflatten(-1, (-1, layer.total))
    univariate = univariate_of(layer)
    base = layer.univariate(*unpack(phi, layer.shapes)) if univariate is None else univariate.make(phi)
    return DependentTransform(base, 1)


class ElementWiseTransform(zuko.flows.ElementWiseTransform):
    """`zuko.flows.ElementWiseTransform` through the kernels."""

    def forward(self, c: Tensor | None = None) -> Transform:
        if c is None:
            # A copy: an optimizer's step does not move a transform that is in use.
            return _transform(self, torch.cat([part.reshape(len(part), -1) for part in self.phi], -1).flatten())
        return _transform(self, self.hyper(c))


class MaskedAutoregressiveTransform(zuko.flows.MaskedAutoregressiveTransform):
    """`zuko.flows.MaskedAutoregressiveTransform` through the kernels, its inverse in one sweep."""

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        return _transform(self, phi_of(self, x, c))

    def forward(self, c: Tensor | None = None) -> Transform:
        return AutoregressiveTransform(self, c)


class GeneralCouplingTransform(zuko.flows.GeneralCouplingTransform):
    """`zuko.flows.GeneralCouplingTransform` through the kernels."""

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        if c is not None:
            x = torch.cat(broadcast(x, c, ignore=1), dim=-1)
        return _transform(self, self.hyper(x))

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
