"""Stand-ins for the linear layers of nflows: activation normalization, LU and 1x1 convolution.

ActNorm: y = e^log_scale x + shift, in one pass. LU: y = L U x + bias, with L and U filled by one gather. The 1x1
convolution folds its permutation into the weight, and multiplies the picture where it lies.
(Kingma & Dhariwal 2018, Glow, arXiv:1807.03039, section 3)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from nflows.transforms import conv, lu, normalization
from torch import Tensor
from torch.nn import functional as F

Result = tuple[Tensor, Tensor]


class ActNorm(normalization.ActNorm):
    """`nflows.transforms.ActNorm`."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        _check_dimensions(inputs, 2, 4)
        if self.training and not self.initialized:
            self._initialize(inputs)
        scale, shift = self._broadcastable_scale_shift(inputs)
        ladj = self.log_scale.sum() * inputs[0, 0].numel()
        return torch.addcmul(shift, inputs, scale), ladj.expand(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        _check_dimensions(inputs, 2, 4)
        scale, shift = self._broadcastable_scale_shift(inputs)
        ladj = self.log_scale.sum() * -inputs[0, 0].numel()
        return (inputs - shift) / scale, ladj.expand(len(inputs))


class LULinear(lu.LULinear):
    """`nflows.transforms.LULinear`."""

    def _create_lower_upper(self) -> Result:
        return _lower_upper(self)

    def inverse_no_cache(self, inputs: Tensor) -> Result:
        return _solve(self, inputs)

    def weight_inverse(self) -> Tensor:
        return _inverse(self)


class OneByOneConvolution(conv.OneByOneConvolution):
    """`nflows.transforms.OneByOneConvolution`."""

    def _create_lower_upper(self) -> Result:
        return _lower_upper(self)

    def weight_inverse(self) -> Tensor:
        return _inverse(self)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        _check_dimensions(inputs, 4)
        if not self.training and self.using_cache:
            self._check_forward_cache()
            weight, logabsdet = self.cache.weight, self.cache.logabsdet
        else:
            weight, logabsdet = self.weight(), self.logabsdet()
        outputs = F.conv2d(inputs, weight[:, self.permutation._inverse_permutation, None, None], self.bias)
        return outputs, (logabsdet * inputs[0, 0].numel()).expand(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        _check_dimensions(inputs, 4)
        if not self.training and self.using_cache:
            self._check_inverse_cache()
            inverse, logabsdet = self.cache.inverse, self.cache.logabsdet
        else:
            inverse, logabsdet = self.weight_inverse(), self.logabsdet()
        inverse = inverse[self.permutation._inverse_permutation]
        outputs = F.conv2d(inputs, inverse[:, :, None, None], -(inverse @ self.bias))
        return outputs, (logabsdet * -inputs[0, 0].numel()).expand(len(inputs))


LAYERS = {
    normalization.ActNorm: ActNorm,
    lu.LULinear: LULinear,
    conv.OneByOneConvolution: OneByOneConvolution,
}


def _check_dimensions(inputs: Tensor, *expected: int) -> None:
    if inputs.dim() not in expected:
        raise ValueError(
            f"inputs has {inputs.dim()} dimensions, but expected {' or '.join(str(count) for count in expected)}"
        )


@functools.lru_cache
def _places(features: int, device: torch.device) -> Tensor:
    """(2, features, features): where each entry of L and U is in [lower | upper | diagonal of U | 0 | 1]."""
    below = features * (features - 1) // 2
    zero, one = 2 * below + features, 2 * below + features + 1
    places = torch.full((2, features, features), zero, device=device)
    row, column = torch.tril_indices(features, features, -1, device=device)
    places[0, row, column] = torch.arange(below, device=device)
    row, column = torch.triu_indices(features, features, 1, device=device)
    places[1, row, column] = torch.arange(below, 2 * below, device=device)
    places[0].fill_diagonal_(one)
    places[1].diagonal().copy_(torch.arange(2 * below, 2 * below + features, device=device))
    return places


def _lower_upper(layer: Any) -> Result:
    diagonal = layer.upper_diag
    constants = diagonal.new_tensor((0.0, 1.0))
    entries = torch.cat((layer.lower_entries, layer.upper_entries, diagonal, constants))
    lower, upper = entries[_places(layer.features, diagonal.device)]
    return lower, upper


def _solve(layer: Any, inputs: Tensor) -> Result:
    lower, upper = _lower_upper(layer)
    outputs = torch.linalg.solve_triangular(lower, (inputs - layer.bias).t(), upper=False, unitriangular=True)
    outputs = torch.linalg.solve_triangular(upper, outputs, upper=True)
    return outputs.t(), (-layer.logabsdet()).expand(len(inputs))


def _inverse(layer: Any) -> Tensor:
    lower, upper = _lower_upper(layer)
    identity = torch.eye(layer.features, dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
    inverse = torch.linalg.solve_triangular(upper, inverse, upper=True)
    return inverse
