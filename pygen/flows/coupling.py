"""Coupling layers: one part of x is kept, and says how the other is transformed.

y_kept = x_kept and y_moved = tau(x_moved; parameters(x_kept)) with tau monotone in each value; the log-determinant is
the sum of log tau' over what moved (Dinh et al. 2015, arXiv:1410.8516, section 3.2). tau is affine (Dinh et al. 2017,
arXiv:1605.08803), a rational-quadratic spline (Durkan et al. 2019, arXiv:1906.04032) or the distribution function of a
mixture of logistics (Ho et al. 2019, arXiv:1902.00275).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.flows.transform import Transform

# What a mask keeps is passed through the same kernel with raw scale 0 and shift 0: that must be the identity.
_UNIT_AT_ZERO = ("exp", "tanh", "atan", "sigmoid_symmetric", "softclip")


class Coupling(Transform):
    """A coupling between the two halves of dimension 1; subclasses say what happens to the half that moves.

    conditioner: a module that maps the kept half (n, k, ...) to (n, per_value m, ...) for m moved channels. It is
        called as `conditioner(kept)`, or `conditioner(kept, context)` where the layer is given a context.
    per_value: parameters that `couple` needs for each value.
    flip: the first ceil(c / 2) channels are kept and the others move, or with `flip` the other way round. For another
        partition put a `Permutation` before the layer.

    ValueError: x has fewer than two channels, or the conditioner's output has another shape than is needed.
    """

    def __init__(self, conditioner: nn.Module, per_value: int, *, flip: bool = False) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.per_value = per_value
        self.flip = flip

    def couple(self, moved: Tensor, proposed: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The moved half (n, m, ...) transformed by proposed (n, per_value m, ...), and ladj (n,)."""
        raise NotImplementedError(f"{type(self).__name__} does not define couple")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (n, c, ...) -> y of the same shape, ladj (n,)."""
        return self._run(x, context, inverse=False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (n, c, ...) -> x of the same shape, and the ladj (n,) of this direction, minus that of `forward`."""
        return self._run(y, context, inverse=True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if x.dim() < 2 or x.shape[1] < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, c, ...) with at least two channels")
        first, second = x.tensor_split(((x.shape[1] + 1) // 2,), dim=1)
        kept, moved = (second, first) if self.flip else (first, second)
        moved, ladj = self.couple(moved, self._propose(kept, moved, context), inverse)
        return torch.cat((moved, kept) if self.flip else (kept, moved), dim=1), ladj

    def _propose(self, kept: Tensor, moved: Tensor, context: Tensor | None) -> Tensor:
        proposed: Tensor = self.conditioner(kept) if context is None else self.conditioner(kept, context)
        expected = (moved.shape[0], self.per_value * moved.shape[1], *moved.shape[2:])
        if proposed.shape != expected:
            raise ValueError(f"conditioner returned shape {tuple(proposed.shape)}, but expected {tuple(expected)}")
        return proposed

    def extra_repr(self) -> str:
        return f"flip={self.flip}"


class AdditiveCoupling(Coupling):
    """y = x + shift: NICE's, of log-determinant 0. The conditioner gives the shifts, (n, m, ...)."""

    def __init__(self, conditioner: nn.Module, *, flip: bool = False) -> None:
        super().__init__(conditioner, 1, flip=flip)

    def couple(self, moved: Tensor, proposed: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.affine(moved, None, proposed, event_dims=moved.dim() - 1, inverse=inverse)


class AffineCoupling(Coupling):
    """y = x s + t. The conditioner gives the raw scales and the shifts, in that order along dimension 1.

    mask: bool, broadcastable to one sample; True is kept. The conditioner then reads the whole of x with zeros where it
        moves, and returns (n, 2 c, ...). Without it, dimension 1 is cut in two.
    flip: keep what would move, and move what would be kept.
    activation, limit, offset, epsilon: the scale is activation(raw + offset) + epsilon, see `pygen.ops.affine`.

    TypeError: mask is not bool. ValueError: mask with a scale that is not 1 at raw scale 0.
    """

    mask: Tensor | None

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        mask: Tensor | None = None,
        flip: bool = False,
        activation: str = "exp",
        limit: float | None = None,
        offset: float = 0.0,
        epsilon: float = 0.0,
    ) -> None:
        super().__init__(conditioner, 2, flip=flip)
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}, but expected torch.bool")
        if mask is not None and (activation not in _UNIT_AT_ZERO or offset != 0 or epsilon != 0):
            raise ValueError(
                f"mask was given with activation {activation!r}, offset {offset} and epsilon {epsilon}, but expected a "
                f"scale that is 1 at raw scale 0: one of {', '.join(_UNIT_AT_ZERO)}, with offset 0 and epsilon 0"
            )
        self.activation = activation
        self.limit = limit
        self.offset = offset
        self.epsilon = epsilon
        self.register_buffer("mask", mask if mask is None or not flip else ~mask)

    def couple(self, moved: Tensor, proposed: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raw_scale, shift = proposed.chunk(2, dim=1)
        return self._affine(moved, raw_scale, shift, inverse)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.mask is None:
            return super()._run(x, context, inverse)
        if x.dim() < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, c, ...)")
        raw_scale, shift = self._propose(x * self.mask, x, context).chunk(2, dim=1)
        moves = ~self.mask
        return self._affine(x, raw_scale * moves, shift * moves, inverse)

    def _affine(self, x: Tensor, raw_scale: Tensor, shift: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.affine(
            x,
            raw_scale,
            shift,
            activation=self.activation,
            limit=self.limit,
            offset=self.offset,
            epsilon=self.epsilon,
            event_dims=x.dim() - 1,
            inverse=inverse,
        )

    def extra_repr(self) -> str:
        split = "halves" if self.mask is None else "mask"
        return f"split={split}, flip={self.flip}, activation={self.activation!r}, limit={self.limit}"


class AffineInjector(Transform):
    """y = x s + t with the raw scales and the shifts given by the context alone: how a low-resolution picture enters
    every layer of a super-resolution flow (Lugmayr et al. 2020, SRFlow, arXiv:2006.14200, section 3.3).

    network: maps the context to (n, 2 c, ...) for x of (n, c, ...): raw scales first.
    limit: the bound of |log s|, in nats; log s = limit tanh(raw).

    ValueError: no context is given, or the network's output has another shape.
    """

    def __init__(self, network: nn.Module, *, limit: float = 3.0) -> None:
        super().__init__()
        if not limit > 0:
            raise ValueError(f"limit is {limit}, but expected a positive number")
        self.network = network
        self.limit = limit

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, inverse=False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(y, context, inverse=True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if context is None:
            raise ValueError("context is None, but expected what the layer is conditioned on, with x's number of rows")
        proposed: Tensor = self.network(context)
        expected = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if proposed.shape != expected:
            raise ValueError(f"network returned shape {tuple(proposed.shape)}, but expected {tuple(expected)}")
        raw_scale, shift = proposed.chunk(2, dim=1)
        return ops.affine(
            x, raw_scale, shift, activation="tanh", limit=self.limit, event_dims=x.dim() - 1, inverse=inverse
        )

    def extra_repr(self) -> str:
        return f"limit={self.limit}"


class SplineCoupling(Coupling):
    """y by a monotone rational-quadratic spline, the identity outside [-bound, bound].

    The conditioner gives, for each value, `bins` widths, `bins` heights and bins - 1 derivatives (`bins` with
    tails="circular", bins + 1 with tails=None), all unnormalized: (n, m per_value, ...), a channel's parameters
    together, as nflows lays them out.

    bins: K, at least 2. bound: half the width of the domain.
    tails: "linear", "circular" (the domain is a circle) or None, see `pygen.ops.rational_quadratic_spline`.
    scale: multiplies widths and heights before their softmax; 1 / sqrt(hidden features) keeps a fresh spline near the
        identity, whatever the width of the conditioner.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        bins: int = 8,
        bound: float = 3.0,
        tails: str | None = "linear",
        scale: float = 1.0,
        flip: bool = False,
    ) -> None:
        if bins < 2:
            raise ValueError(f"bins is {bins}, but expected at least 2")
        if not bound > 0:
            raise ValueError(f"bound is {bound}, but expected a positive number")
        super().__init__(conditioner, spline_parameters(bins, tails), flip=flip)
        self.bins = bins
        self.bound = bound
        self.tails = tails
        self.scale = scale

    def couple(self, moved: Tensor, proposed: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.rational_quadratic_spline(
            moved,
            _last(proposed, moved.shape[1], self.per_value),
            inverse=inverse,
            tails=self.tails,
            domain=(-self.bound, self.bound),
            identity_init=True,
            scale=self.scale,
            event_dims=moved.dim() - 1,
        )

    def extra_repr(self) -> str:
        return f"flip={self.flip}, bins={self.bins}, bound={self.bound}, tails={self.tails!r}"


class MixtureCoupling(Coupling):
    """y = logit(sum_k pi_k sigmoid((x - mu_k) / e^{s_k})) e^{a} + b, with a = limit tanh(raw a): Flow++'s layer.

    The conditioner gives, for each value, the raw a, b, and K logits, means and log scales: (n, m (2 + 3 K), ...), a
    channel's parameters together.

    components: K. limit: the bound of |a|, in nats.
    """

    def __init__(self, conditioner: nn.Module, *, components: int = 32, limit: float = 3.0, flip: bool = False) -> None:
        if components < 1:
            raise ValueError(f"components is {components}, but expected at least 1")
        super().__init__(conditioner, 2 + 3 * components, flip=flip)
        self.components = components
        self.limit = limit

    def couple(self, moved: Tensor, proposed: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        parameters = _last(proposed, moved.shape[1], self.per_value)
        mixture, raw_scale, shift = parameters[..., 2:], parameters[..., 0], parameters[..., 1]
        events = moved.dim() - 1
        if inverse:
            moved, first = self._affine(moved, raw_scale, shift, inverse=True)
            moved, second = ops.logistic_mixture(moved, mixture, inverse=True, event_dims=events)
        else:
            moved, first = ops.logistic_mixture(moved, mixture, event_dims=events)
            moved, second = self._affine(moved, raw_scale, shift, inverse=False)
        return moved, first + second

    def _affine(self, x: Tensor, raw_scale: Tensor, shift: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.affine(
            x, raw_scale, shift, activation="tanh", limit=self.limit, event_dims=x.dim() - 1, inverse=inverse
        )

    def extra_repr(self) -> str:
        return f"flip={self.flip}, components={self.components}, limit={self.limit}"


def spline_parameters(bins: int, tails: str | None) -> int:
    """How many numbers describe one spline of K bins: 3K - 1 with linear tails, 3K on a circle, 3K + 1 without."""
    return 3 * bins + {"linear": -1, "circular": 0, None: 1}[tails]


def _last(proposed: Tensor, channels: int, per_value: int) -> Tensor:
    """(n, channels per_value, ...) as (n, channels, ..., per_value), a view."""
    grouped = proposed.reshape(proposed.shape[0], channels, per_value, *proposed.shape[2:])
    return grouped.movedim(2, -1)
