"""Activation normalization: y = e^{log_scale} x + shift per channel, started so that the first batch comes out with
mean 0 and variance 1 (Kingma & Dhariwal 2018, Glow, arXiv:1807.03039, section 3.1).

The log-determinant is the number of positions times the sum of log_scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pygen.flows.transform import Transform

# A channel that does not vary in the first batch is not blown up beyond this.
_LEAST_DEVIATION = 1e-6


class ActNorm(Transform):
    """One scale and shift for each channel of (n, channels, ...).

    The first call of `forward` in training takes them from its batch, and `initialized`, part of the state, says that
    it was done: a loaded model does not start anew, unless its state was saved before. There is no host read in it.

    Processes that train together would each start from their own batch: call the model once before it is wrapped in
    DistributedDataParallel, which then hands rank 0's parameters to all.

    ValueError: channels is less than 1, or x has another number of channels.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels is {channels}, but expected a positive number")
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        # Whether this object has had its first batch; the buffer decides whether that changed anything.
        self._begun = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shape = self._broadcast(x)
        if self.training and not self._begun and len(x):
            self._begun = True
            self._initialize(x)
        scale = self.log_scale.exp().to(x.dtype).view(shape)
        # Not addcmul, whose CPU kernel takes three times as long where it broadcasts.
        return (x * scale).add_(self.shift.to(x.dtype).view(shape)), self._ladj(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shape = self._broadcast(y)
        scale = (-self.log_scale).exp().to(y.dtype).view(shape)
        return (y - self.shift.to(y.dtype).view(shape)) * scale, -self._ladj(y)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._begun = False

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        values = x.to(self.log_scale.dtype).transpose(0, 1).flatten(1)
        log_scale = -values.std(1, correction=0).clamp_min(_LEAST_DEVIATION).log()
        shift = -values.mean(1) * log_scale.exp()
        self.log_scale.copy_(torch.where(self.initialized, self.log_scale, log_scale))
        self.shift.copy_(torch.where(self.initialized, self.shift, shift))
        self.initialized.fill_(True)

    def _ladj(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (self.log_scale.to(wide).sum() * x.shape[2:].numel()).expand(len(x))

    def _broadcast(self, x: Tensor) -> tuple[int, ...]:
        channels = len(self.log_scale)
        if x.dim() < 2 or x.shape[1] != channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, {channels}, ...)")
        return (channels, *(1 for _ in x.shape[2:]))

    def extra_repr(self) -> str:
        return f"channels={len(self.log_scale)}"
