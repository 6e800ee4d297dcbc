"""Stand-ins for the linear layers of normflows (`normflows.flows.mixing`).

The 1x1 convolution and its vector form multiply by W going to the prior and by W^-1 when sampling; in evaluation both
matrices and log |det W| are kept while the parameters stay. (Kingma & Dhariwal 2018, Glow, arXiv:1807.03039, sec. 3.2)
"""

from __future__ import annotations

from typing import Any

import torch
from normflows.flows import mixing
from torch import Tensor

from pygen.compat import lu
from pygen.nn.mixing import mix_channels
from pygen.ops.kept import Kept

Result = tuple[Tensor, Tensor]


class Invertible1x1Conv(mixing.Invertible1x1Conv):
    """`normflows.flows.Invertible1x1Conv`."""

    def forward(self, z: Tensor) -> Result:
        return _convolve(z, *_sampling.get(self, _parameters(self), lambda: _inverted(self)))

    def inverse(self, z: Tensor) -> Result:
        return _convolve(z, *_density.get(self, _parameters(self), lambda: _assembled(self)))


class InvertibleAffine(mixing.InvertibleAffine):
    """`normflows.flows.InvertibleAffine`."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> Result:
        weight, log_det = _sampling.get(self, _parameters(self), lambda: _inverted(self))
        return z @ weight, log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        weight, log_det = _density.get(self, _parameters(self), lambda: _assembled(self))
        return z @ weight, log_det


class LULinear(mixing._LULinear):
    """The linear part of `normflows.flows.LULinearPermute`."""

    def _create_lower_upper(self) -> Result:
        return lu.lower_upper(self)

    def forward_no_cache(self, inputs: Tensor) -> Result:
        return lu.multiply(self, inputs)

    def inverse_no_cache(self, inputs: Tensor) -> Result:
        return lu.solve(self, inputs)

    def weight_inverse(self) -> Tensor:
        return lu.weight_inverse(self)


LAYERS = {
    mixing.Invertible1x1Conv: Invertible1x1Conv,
    mixing.InvertibleAffine: InvertibleAffine,
    mixing._LULinear: LULinear,
}

_sampling: Kept[Result] = Kept()
_density: Kept[Result] = Kept()


def _parameters(layer: Any) -> list[Tensor]:
    return [layer.P, layer.L, layer.sign_S, layer.log_S, layer.U] if layer.use_lu else [layer.W]


def _assembled(layer: Any) -> Result:
    """W and log |det W|."""
    if layer.use_lu:
        return layer._assemble_W(), layer.log_S.sum()
    return layer.W, torch.linalg.slogdet(layer.W)[1]


def _inverted(layer: Any) -> Result:
    """W^-1, inverted in float64, and its log-determinant."""
    if layer.use_lu:
        return layer._assemble_W(inverse=True), -layer.log_S.sum()
    return torch.inverse(layer.W.double()).to(layer.W.dtype), -torch.linalg.slogdet(layer.W)[1]


def _convolve(z: Tensor, weight: Tensor, log_det: Tensor) -> Result:
    return mix_channels(z, weight), log_det * z.shape[2:].numel()
