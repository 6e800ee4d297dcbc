"""The affine coupling layer: one part of x is kept, and says how the other is scaled and shifted.

y_kept = x_kept and y_moved = x_moved s + t, with s and t functions of x_kept (Dinh et al. 2017, arXiv:1605.08803,
eq. 7-8); the log-determinant is the sum of log s over what moved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.flows.transform import Transform

# What a mask keeps is passed through the same kernel with raw scale 0 and shift 0: that must be the identity.
_UNIT_AT_ZERO = ("exp", "tanh", "atan", "sigmoid_symmetric", "softclip")


class AffineCoupling(Transform):
    """`layer(x) -> (y, ladj)` and `layer.inverse(y) -> (x, ladj)`; ladj is (n,), in nats, of the direction taken.

    conditioner: a module that maps what is kept to the raw scales and the shifts, in that order along dimension 1.
        It is called as `conditioner(kept)`, or `conditioner(kept, context)` where the layer is given a context.
        Without a mask, kept is (n, k, ...) and its output (n, 2 m, ...) for m moved channels; with a mask, kept is the
        whole of x with zeros where it moves, and the output is (n, 2 c, ...).
    mask: bool, broadcastable to one sample; True is kept. Without it, dimension 1 is cut in two: the first
        ceil(c / 2) channels are kept and the others move.
    flip: keep what would move, and move what would be kept.
    activation, limit, offset, epsilon: the scale is activation(raw + offset) + epsilon, see `pygen.ops.affine`.

    ValueError: x has fewer than two dimensions, has a single channel and no mask, or the conditioner's output does
    not have twice the channels that move.
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
        super().__init__()
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}, but expected torch.bool")
        if mask is not None and (activation not in _UNIT_AT_ZERO or offset != 0 or epsilon != 0):
            raise ValueError(
                f"mask was given with activation {activation!r}, offset {offset} and epsilon {epsilon}, but expected a "
                f"scale that is 1 at raw scale 0: one of {', '.join(_UNIT_AT_ZERO)}, with offset 0 and epsilon 0"
            )
        self.conditioner = conditioner
        self.flip = flip
        self.activation = activation
        self.limit = limit
        self.offset = offset
        self.epsilon = epsilon
        self.register_buffer("mask", mask if mask is None or not flip else ~mask)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (n, c, ...) -> y of the same shape, ladj (n,)."""
        return self._couple(x, context, inverse=False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (n, c, ...) -> x of the same shape, and the ladj (n,) of this direction, minus that of `forward`."""
        return self._couple(y, context, inverse=True)

    def _couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if x.dim() < 2 or (self.mask is None and x.shape[1] < 2):
            raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, c, ...) with at least two channels")
        if self.mask is not None:
            raw_scale, shift = self._propose(x * self.mask, x, context)
            moves = ~self.mask
            return self._affine(x, raw_scale * moves, shift * moves, inverse)
        first, second = x.tensor_split(((x.shape[1] + 1) // 2,), dim=1)
        kept, moved = (second, first) if self.flip else (first, second)
        moved, ladj = self._affine(moved, *self._propose(kept, moved, context), inverse)
        return torch.cat((moved, kept) if self.flip else (kept, moved), dim=1), ladj

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

    def _propose(self, kept: Tensor, moved: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        proposed = self.conditioner(kept) if context is None else self.conditioner(kept, context)
        expected = (moved.shape[0], 2 * moved.shape[1], *moved.shape[2:])
        if proposed.shape != expected:
            raise ValueError(f"conditioner returned shape {tuple(proposed.shape)}, but expected {tuple(expected)}")
        raw_scale, shift = proposed.chunk(2, dim=1)
        return raw_scale, shift

    def extra_repr(self) -> str:
        split = "halves" if self.mask is None else "mask"
        return f"split={split}, flip={self.flip}, activation={self.activation!r}, limit={self.limit}"
