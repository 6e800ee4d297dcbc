"""Invertible linear maps of the channels: y = W x + bias with W = P L (U + diag(s)).

P is a fixed permutation, L lower triangular with ones on its diagonal, U strictly upper triangular, so that
log |det W| = sum log |s| (Kingma & Dhariwal 2018, Glow, arXiv:1807.03039, section 3.2 and eq. 10-11).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pygen.flows.transform import Transform
from pygen.nn.mixing import mix_channels
from pygen.ops.kept import Kept

INITIALIZATIONS = ("rotation", "identity")

_matrices: Kept[Tensor] = Kept()
_inverses: Kept[Tensor] = Kept()


class InvertibleLinear(Transform):
    """A learned matrix over the channels of (n, channels, ...), the same at each position: for pictures, Glow's
    invertible 1x1 convolution.

    start: "rotation", a random one, which mixes the channels from the first step; or "identity".
    bias: add a learned shift.

    In evaluation without gradients W and its inverse are kept until the parameters change.
    ValueError: channels is less than 1, start is unknown, or x has another number of channels.
    """

    order: Tensor
    sign: Tensor

    def __init__(self, channels: int, *, start: str = "rotation", bias: bool = False) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels is {channels}, but expected a positive number")
        if start not in INITIALIZATIONS:
            raise ValueError(f"start is {start!r}, but expected one of {', '.join(map(repr, INITIALIZATIONS))}")
        weight = torch.eye(channels)
        if start == "rotation":
            weight = torch.linalg.qr(torch.randn(channels, channels))[0]
        permutation, lower, upper = torch.linalg.lu(weight)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        # Row i of P L U is row order[i] of L U.
        self.register_buffer("order", permutation.argmax(1))
        self.register_buffer("sign", diagonal.sign())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x)
        weight = self._kept(_matrices, self.weight)
        return _mix(x, weight, self.bias), self._ladj(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(y)
        weight = self._kept(_inverses, self.inverse_weight)
        bias = None if self.bias is None else -(weight @ self.bias)
        return _mix(y, weight, bias), -self._ladj(y)

    def weight(self) -> Tensor:
        """W, (channels, channels)."""
        lower, upper = self._triangles()
        return (lower @ upper).index_select(0, self.order)

    def inverse_weight(self) -> Tensor:
        """W^{-1}, (channels, channels), by two triangular solves, in float32 at least."""
        lower, upper = self._triangles()
        wide = torch.promote_types(lower.dtype, torch.float32)
        unit = torch.eye(len(lower), dtype=wide, device=lower.device)[:, self.order]
        half: Tensor = torch.linalg.solve_triangular(lower.to(wide), unit, upper=False, unitriangular=True)
        inverse: Tensor = torch.linalg.solve_triangular(upper.to(wide), half, upper=True)
        return inverse.to(lower.dtype)

    def _triangles(self) -> tuple[Tensor, Tensor]:
        unit = torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + unit, self.upper.triu(1) + (self.sign * self.log_diagonal.exp()).diag()

    def _kept(self, kept: Kept[Tensor], make: Callable[[], Tensor]) -> Tensor:
        factors = (self.lower, self.upper, self.log_diagonal, self.order, self.sign)
        if self.lower.device.type == "cpu" or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return kept.get(self, factors, make)
        return kept.get_of_buffers(self, factors, make)

    def _ladj(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (self.log_diagonal.to(wide).sum() * x.shape[2:].numel()).expand(len(x))

    def _check(self, x: Tensor) -> None:
        channels = len(self.lower)
        if x.dim() < 2 or x.shape[1] != channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, {channels}, ...)")

    def extra_repr(self) -> str:
        return f"channels={len(self.lower)}, bias={self.bias is not None}"


def _mix(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    # The products are the flow's own state, not a network's: in autocast's bfloat16 they could not be undone.
    with torch.autocast(x.device.type, enabled=False):
        return mix_channels(x, weight, bias)
