"""Stand-ins for the linear layers of nflows (`nflows.transforms.lu`, `.conv`).

y = L U x + bias. The 1x1 convolution folds its permutation into the weight, and multiplies the picture where it lies.
(Kingma & Dhariwal 2018, Glow, arXiv:1807.03039, section 3.2)
"""

from __future__ import annotations

from nflows.transforms import conv
from nflows.transforms import lu as nflows_lu
from torch import Tensor

from pygen.compat import lu
from pygen.nn.mixing import mix_channels

Result = tuple[Tensor, Tensor]


class LULinear(nflows_lu.LULinear):
    """`nflows.transforms.LULinear`."""

    def _create_lower_upper(self) -> Result:
        return lu.lower_upper(self)

    def forward_no_cache(self, inputs: Tensor) -> Result:
        return lu.multiply(self, inputs)

    def inverse_no_cache(self, inputs: Tensor) -> Result:
        return lu.solve(self, inputs)

    def weight_inverse(self) -> Tensor:
        return lu.weight_inverse(self)


class OneByOneConvolution(conv.OneByOneConvolution):
    """`nflows.transforms.OneByOneConvolution`."""

    def _create_lower_upper(self) -> Result:
        return lu.lower_upper(self)

    def weight_inverse(self) -> Tensor:
        return lu.weight_inverse(self)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        _check_picture(inputs)
        if not self.training and self.using_cache:
            self._check_forward_cache()
            weight, logabsdet = self.cache.weight, self.cache.logabsdet
        else:
            weight, logabsdet = self.weight(), self.logabsdet()
        outputs = mix_channels(inputs, weight[:, self.permutation._inverse_permutation], self.bias)
        return outputs, (logabsdet * inputs.shape[2:].numel()).repeat(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        _check_picture(inputs)
        if not self.training and self.using_cache:
            self._check_inverse_cache()
            inverse, logabsdet = self.cache.inverse, self.cache.logabsdet
        else:
            inverse, logabsdet = self.weight_inverse(), self.logabsdet()
        inverse = inverse[self.permutation._inverse_permutation]
        outputs = mix_channels(inputs, inverse, -(inverse @ self.bias))
        return outputs, (logabsdet * -inputs.shape[2:].numel()).repeat(len(inputs))


LAYERS = {
    nflows_lu.LULinear: LULinear,
    conv.OneByOneConvolution: OneByOneConvolution,
}


def _check_picture(inputs: Tensor) -> None:
    if inputs.dim() != 4:
        raise ValueError(f"inputs has {inputs.dim()} dimensions, but expected 4")
