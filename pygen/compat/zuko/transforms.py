"""Zuko's transforms on pygen's kernels: value and log-determinant in one pass, in both directions.

Each is a subclass of the transform it stands in for: with its constructor, attributes, domains, caching and repr.

Affine: y = e^s x + t, s = a / (1 + |a / ln slope|). Rational-quadratic spline (Durkan et al. 2019, arXiv:1906.04032):
shares of the domain softmax(u / (1 + |2 u / ln slope|)), slopes e^(u / (1 + |u / ln slope|)), the identity outside.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import _sum_rightmost

from pygen import ops
from pygen.ops.spline import MAX_BINS


class Inverse(_InverseTransform):
    """The inverse of one of the transforms below, with its log-determinant from the pass that makes the value."""

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._cache_size:
            return super().call_and_ladj(y)  # type: ignore[no-any-return, misc]
        return self._inv.inverse_and_ladj(y)  # type: ignore[no-any-return, union-attr]


class UnivariateInverse(Inverse):
    """The inverse of a univariate transform."""

    def evaluate(self, y: Tensor, *, event_dims: int) -> tuple[Tensor, Tensor]:
        return self._inv.evaluate(y, inverse=True, event_dims=event_dims)  # type: ignore[no-any-return, union-attr]


# Printed as zuko prints it.
Inverse.__name__ = UnivariateInverse.__name__ = _InverseTransform.__name__


class _Univariate(Transform):
    """What the univariate transforms share: one kernel that takes the unconstrained parameters.

    Zuko's constructor computes constrained parameters, which the kernels do without. They are made when somebody
    reads them.
    """

    _peer: ClassVar[type[Transform]]
    _constrained: ClassVar[tuple[str, ...]]

    def _remember(self, parameters: tuple[Tensor, ...], cache_size: int, **constants: float) -> None:
        Transform.__init__(self, cache_size=cache_size)
        self._unconstrained = tuple(_as_of_now(parameter) for parameter in parameters)
        self._constants = constants
        self._recorded = torch.is_grad_enabled()

    def _parts(self) -> tuple[Tensor, ...]:
        """The unconstrained parameters, as zuko's constructor takes them."""
        return self._unconstrained

    def __getattr__(self, name: str) -> Any:
        if name not in self._constrained:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        peer = object.__new__(self._peer)
        with torch.set_grad_enabled(self._recorded):
            _CONSTRUCTORS[self._peer](peer, *self._parts(), **self._constants)
        for each in self._constrained:
            setattr(self, each, vars(peer)[each])
        return vars(self)[name]

    def evaluate(self, x: Tensor, *, inverse: bool = False, event_dims: int | None = 0) -> tuple[Tensor, Tensor]:
        """The value, and the ladj summed over the last `event_dims` dimensions, of x and the parameters broadcast.

        event_dims: None for all of them, where only the value is wanted.
        """
        raise NotImplementedError

    @property
    def inv(self) -> Transform:
        return UnivariateInverse(self)

    def _call(self, x: Tensor) -> Tensor:
        return self.evaluate(x, event_dims=None)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.evaluate(y, inverse=True, event_dims=None)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.evaluate(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._cache_size:
            y = self(x)
            return y, self.log_abs_det_jacobian(x, y)
        return self.evaluate(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.evaluate(y, inverse=True)


class MonotonicAffineTransform(_Univariate, zuko.transforms.MonotonicAffineTransform):
    """`zuko.transforms.MonotonicAffineTransform` through `pygen.ops.affine`."""

    _peer = zuko.transforms.MonotonicAffineTransform
    _constrained = ("log_scale", "scale")

    def __init__(self, shift: Tensor, scale: Tensor, slope: float = 1e-3, cache_size: int = 0) -> None:
        self._remember((shift, scale), cache_size, slope=slope)
        self.shift = self._unconstrained[0]

    @classmethod
    def packed(cls, phi: Tensor, slope: float = 1e-3) -> MonotonicAffineTransform:
        """The transform with parameters phi (*, 2): shift and scale side by side."""
        shift, scale = phi.unbind(-1)
        return cls(shift, scale, slope)

    @staticmethod
    def serves(shift: Any, scale: Any, slope: Any = 1e-3, **_: Any) -> bool:
        """Whether the kernel takes these arguments of the constructor."""
        return _are_floating(shift, scale) and is_slope(slope)

    def evaluate(self, x: Tensor, *, inverse: bool = False, event_dims: int | None = 0) -> tuple[Tensor, Tensor]:
        shift, scale = self._unconstrained
        x = _meet(x, (shift, scale), shift.shape, scale.shape)
        y, ladj = ops.affine(
            x, scale, shift, activation="softclip", limit=-math.log(self._constants["slope"]),
            event_dims=event_dims or x.dim(), inverse=inverse,
        )  # fmt: skip
        if event_dims == 0:
            # There is nothing to sum, and x has no part in it.
            return y, (-self.log_scale if inverse else self.log_scale).expand(y.shape)
        return y, ladj.to(y.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        ladj: Tensor = self.log_scale
        return ladj.expand(torch.broadcast_shapes(x.shape, ladj.shape))


class MonotonicRQSTransform(_Univariate, zuko.transforms.MonotonicRQSTransform):
    """`zuko.transforms.MonotonicRQSTransform` through `pygen.ops.rational_quadratic_spline`."""

    _peer = zuko.transforms.MonotonicRQSTransform
    _constrained = ("horizontal", "vertical", "derivatives")

    def __init__(
        self,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        bound: float = 5.0,
        slope: float = 1e-3,
        cache_size: int = 0,
    ) -> None:
        self._remember((widths, heights, derivatives), cache_size, bound=bound, slope=slope)

    @classmethod
    def packed(cls, phi: Tensor, bound: float = 5.0, slope: float = 1e-3) -> MonotonicRQSTransform:
        """The transform with parameters phi (*, 3 K - 1): widths, heights and derivatives side by side."""
        self = cls.__new__(cls)
        self._remember((phi,), 0, bound=bound, slope=slope)
        return self

    @staticmethod
    def serves(widths: Any, heights: Any, derivatives: Any, bound: Any = 5.0, slope: Any = 1e-3, **_: Any) -> bool:
        """Whether the kernel takes these arguments of the constructor."""
        return (
            _are_floating(widths, heights, derivatives)
            and min(widths.dim(), heights.dim(), derivatives.dim()) > 0
            and are_splines((widths.shape[-1:], heights.shape[-1:], derivatives.shape[-1:]), bound, slope)
        )

    @property
    def bins(self) -> int:
        first = self._unconstrained[0].shape[-1]
        return first if len(self._unconstrained) == 3 else (first + 1) // 3

    def _parts(self) -> tuple[Tensor, ...]:
        if len(self._unconstrained) == 3:
            return self._unconstrained
        widths, heights, derivatives = self._unconstrained[0].split((self.bins, self.bins, self.bins - 1), -1)
        return widths, heights, derivatives

    def evaluate(self, x: Tensor, *, inverse: bool = False, event_dims: int | None = 0) -> tuple[Tensor, Tensor]:
        parts = self._unconstrained
        x = _meet(x, parts, *(part.shape[:-1] for part in parts))
        bound = self._constants["bound"]
        y, ladj = ops.rational_quadratic_spline(
            x, parts[0] if len(parts) == 1 else parts, inverse=inverse, tails="linear", domain=(-bound, bound),
            parametrization="softclip", slope=self._constants["slope"],
            event_dims=x.dim() if event_dims is None else event_dims,
        )  # fmt: skip
        return y, ladj.to(y.dtype)


# As they are when this file is first imported: a patch in force puts others in their place.
_CONSTRUCTORS = {
    stand_in._peer: stand_in._peer.__init__ for stand_in in (MonotonicAffineTransform, MonotonicRQSTransform)
}


def are_splines(shapes: Any, bound: Any = 5.0, slope: Any = 1e-3) -> bool:
    """Whether these are the shapes (K), (K), (K - 1) and the constants of splines that the kernel takes."""
    if len(shapes) != 3 or any(len(shape) != 1 for shape in shapes):
        return False
    (k,), (heights,), (derivatives,) = shapes
    fits = 2 <= k <= MAX_BINS and heights == k and derivatives == k - 1
    return fits and is_slope(slope) and isinstance(bound, int | float) and 0 < bound < math.inf


def is_slope(slope: Any = 1e-3) -> bool:
    """Whether the kernels take this least slope."""
    return isinstance(slope, float) and 0 < slope < 1


class DependentTransform(zuko.transforms.DependentTransform):
    """`zuko.transforms.DependentTransform`, whose sum the kernel makes where the base is one of pygen's."""

    @staticmethod
    def serves(*_: Any, **__: Any) -> bool:
        """Whatever its base."""
        return True

    @property
    def inv(self) -> Transform:
        return DependentTransform(self.base.inv, self.reinterpreted)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        base = self.base
        if isinstance(base, _Univariate | UnivariateInverse) and not base._cache_size:
            return base.evaluate(x, event_dims=self.reinterpreted)
        y, ladj = base.call_and_ladj(x)
        return y, _sum_rightmost(ladj, self.reinterpreted)


class CouplingTransform(zuko.transforms.CouplingTransform):
    """`zuko.transforms.CouplingTransform` that asks its network once for a value and its log-determinant.

    Features are selected and copied by index: indexing with tensors, as zuko does, has gradients several times dearer.
    """

    @staticmethod
    def serves(*_: Any, **__: Any) -> bool:
        """Whatever its network."""
        return True

    @property
    def inv(self) -> Transform:
        return Inverse(self)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.idx_a), x.index_select(-1, self.idx_b)

    def _call(self, x: Tensor) -> Tensor:
        kept, moved = self.split(x)
        return self._replace(x, self.meta(kept)(moved))

    def _inverse(self, y: Tensor) -> Tensor:
        kept, moved = self.split(y)
        return self._replace(y, self.meta(kept).inv(moved))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = self.split(x)
        moved, ladj = self.meta(kept).call_and_ladj(moved)
        return self._replace(x, moved), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = self.split(y)
        moved, ladj = self.meta(kept).inv.call_and_ladj(moved)
        return self._replace(y, moved), ladj

    def _replace(self, x: Tensor, moved: Tensor) -> Tensor:
        if moved.shape[:-1] != x.shape[:-1]:
            x = x.expand(*moved.shape[:-1], -1)
        return x.index_copy(-1, self.idx_b, moved.to(x.dtype))


class PermutationTransform(zuko.transforms.PermutationTransform):
    """`zuko.transforms.PermutationTransform` by `index_select`, where one order serves all rows."""

    def _call(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.index_select(-1, self.order.argsort())

    @staticmethod
    def serves(order: Any, **_: Any) -> bool:
        """Whether this is an order of the elements, and not a batch of them."""
        return isinstance(order, Tensor) and order.dim() == 1


class LULinearTransform(zuko.transforms.LULinearTransform):
    """`zuko.transforms.LULinearTransform` where all rows share L and U.

    Zuko multiplies L and U first, which costs as much as D rows, and solves row by row, with a copy of both for each.
    """

    @staticmethod
    def serves(LU: Any, **_: Any) -> bool:
        """Whether this is one matrix, and not a batch of them."""
        return isinstance(LU, Tensor) and LU.dim() == 2

    def _call(self, x: Tensor) -> Tensor:
        L, U = self.L.mT, self.U.mT
        y: Tensor = x @ U @ L if x.shape[:-1].numel() < x.shape[-1] else x @ (U @ L)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        rows = y.reshape(-1, y.shape[-1])
        rows = torch.linalg.solve_triangular(self.L.mT, rows, upper=True, left=False)
        rows = torch.linalg.solve_triangular(self.U.mT, rows, upper=False, left=False, unitriangular=True)
        x: Tensor = rows.reshape(y.shape)
        return x


def _are_floating(*values: Any) -> bool:
    return all(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _as_of_now(parameter: Tensor) -> Tensor:
    """What zuko's constructor would read: unmoved by an optimizer's step to come, and without a gradient where none is
    recorded."""
    if isinstance(parameter, nn.Parameter):
        parameter = parameter.clone()
    return parameter if torch.is_grad_enabled() or not parameter.requires_grad else parameter.detach()


def _meet(x: Tensor, parameters: tuple[Tensor, ...], *shapes: torch.Size) -> Tensor:
    """x in the dtype and the shape that arithmetic with the parameters has in PyTorch."""
    for parameter in parameters:
        if parameter.dtype != x.dtype:
            x = x.to(torch.result_type(x, parameter))
    if any(shape != x.shape for shape in shapes):
        x = x.expand(torch.broadcast_shapes(x.shape, *shapes))
    return x


STAND_INS: dict[type[Transform], Any] = {
    zuko.transforms.CouplingTransform: CouplingTransform,
    zuko.transforms.DependentTransform: DependentTransform,
    zuko.transforms.LULinearTransform: LULinearTransform,
    zuko.transforms.MonotonicAffineTransform: MonotonicAffineTransform,
    zuko.transforms.MonotonicRQSTransform: MonotonicRQSTransform,
    zuko.transforms.PermutationTransform: PermutationTransform,
}
