"""Masked autoregressive flows: every value is mapped with parameters that the values before it give.

y_i = tau(x_i; p_i(x_<i, context)), with all p from one pass of a masked network; the log-determinant is the sum of
log tau' (Papamakarios et al. 2017, MAF, arXiv:1705.07057, eq. 3-5). tau is affine, or a rational-quadratic spline
(Durkan et al. 2019, arXiv:1906.04032, RQ-NSF (AR)). The inverse is one sweep through the network as well. With the
directions exchanged, `Inverse(MaskedAutoregressive(...))`, it is IAF (Kingma et al. 2016, arXiv:1606.04934), whose
samples take the pass and whose density takes the sweep.
"""

from __future__ import annotations

from torch import Tensor

from pygen import ops
from pygen.flows.transform import Transform
from pygen.nn.made import MADE
from pygen.ops.masked import MaskedAffine, MaskedSpline, plan_of


class MaskedAutoregressive(Transform):
    """`transform(x)` in one pass, `transform.inverse(y)` in one sweep; x is (n, ...) with made.features values a row.

    made: the network. Whatever order its masks have, it is read off them.
    elementwise: tau, as `ops.MaskedAffine(...)` or `ops.MaskedSpline(bins, ...)`. The network needs as many outputs for
        an input as that has parameters: 2, or for splines with linear tails 3 bins - 1. The default is MAF's y = x e^u
        + t.

    ValueError: the network is not autoregressive, or its outputs do not fit the map.
    """

    def __init__(self, made: MADE, elementwise: MaskedAffine | MaskedSpline | None = None) -> None:
        super().__init__()
        self.made = made
        self.elementwise = MaskedAffine() if elementwise is None else elementwise
        plan_of(made.network, self.elementwise)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (n, ...) -> y of the same shape, ladj (n,)."""
        flat = self._flatten("x", x)
        y, ladj = self.elementwise(flat, self.made(flat, context))
        return y.reshape(x.shape), ladj

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (n, ...) -> x of the same shape, and the ladj (n,) of this direction, minus that of `forward`."""
        x, ladj = ops.masked_inverse(
            self._flatten("y", y), self.made.network, self.made.features_of(context), elementwise=self.elementwise
        )
        return x.reshape(y.shape), ladj

    def _flatten(self, name: str, value: Tensor) -> Tensor:
        if value.dim() < 2 or value.shape[1:].numel() != self.made.features:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but expected (n, ...) with {self.made.features} values a row"
            )
        return value.flatten(1)

    def extra_repr(self) -> str:
        return f"elementwise={self.elementwise}"
