"""WaveNet: dilated causal convolutions over a sequence of samples, such as of sound.

h -> h + W_r z with z = tanh(W_f * h + V_f y) s(W_g * h + V_g y), where * reaches back by 1, 2, 4 ... samples, y is the
class, and the sum of all W_s z gives the logits (van den Oord et al. 2016, arXiv:1609.03499, eq. 2-3 and figure 4).
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.autoregressive.arguments import check_tensor
from pygen.autoregressive.config import AutoregressiveConfig
from pygen.autoregressive.model import AutoregressiveModel
from pygen.autoregressive.state import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveNetConfig(AutoregressiveConfig):
    """What a WaveNet is made of.

    shape: (1, 1, length) for sound, whose samples, `pygen.autoregressive.audio.compress`ed, are the values of a picture
        of one row; a picture is a sequence in raster order.
    layers: in one stack; the last reaches 2^(layers - 1) samples back. stacks: how many, one after another.
    width: channels between the layers. skip: channels of the sum that the logits are of.
    """

    shape: tuple[int, int, int] = (1, 1, 8000)
    levels: int = 256
    classes: int | None = None
    layers: int = 10
    stacks: int = 3
    width: int = 32
    skip: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("layers", "stacks", "width", "skip")

    @property
    def reach(self) -> int:
        """How many samples before it a sample depends on."""
        return self.stacks * ((1 << self.layers) - 1) + 2


class DilatedLayer(nn.Module):
    """One layer, on (n, width, length) and of the same length; it reads `dilation` samples back. Nothing reads the next
    state of the last."""

    def __init__(self, config: WaveNetConfig, dilation: int, *, last: bool) -> None:
        super().__init__()
        width = config.width
        self.dilation = dilation
        self.convolution = nn.Conv1d(width, 2 * width, 2, dilation=dilation)
        self.label = None if config.classes is None else nn.Embedding(config.classes, 2 * width)
        if self.label is not None:
            nn.init.zeros_(self.label.weight)
        self.residual = None if last else nn.Conv1d(width, width, 1)
        self.skip = nn.Conv1d(width, config.skip, 1)

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (n, width, dilation + length) to the next state and what it adds to the sum, (n, ..., length) both."""
        hidden = self.convolution(x)
        if self.label is not None:
            hidden = hidden + self.label(condition)[:, :, None]
        value, gate = hidden.chunk(2, dim=1)
        gated = value.tanh() * gate.sigmoid()
        state = x[:, :, self.dilation :]
        return state if self.residual is None else state + self.residual(gated), self.skip(gated)


class WaveNet(AutoregressiveModel):
    """An exact probability of sequences of discrete samples, and samples of them; see `AutoregressiveModel`.

    Sound is (n, 1, 1, length) of any length, whatever that of the configuration: `sample_tokens(n, length=...)` draws
    its samples, and `pictures` makes sound of them.
    """

    convolutional = True
    config: WaveNetConfig

    def __init__(self, config: WaveNetConfig | None = None) -> None:
        config = config or WaveNetConfig()
        super().__init__(config)
        self.first = nn.Conv1d(1, config.width, 2)
        dilations = [2**k for k in range(config.layers)] * config.stacks
        self.layers = nn.ModuleList(
            DilatedLayer(config, dilation, last=number == len(dilations))
            for number, dilation in enumerate(dilations, 1)
        )
        self.hidden = nn.Conv1d(config.skip, config.skip, 1)
        self.head = nn.Conv1d(config.skip, config.levels, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(n, length, levels): the logits of each element in raster order; x as for `AutoregressiveModel.forward`."""
        sequence = x.movedim(1, -1).flatten(1)[:, None]
        # Two zeros before the sequence and no last sample: the result at t depends on the samples t - 2 and t - 1.
        state = self.first(F.pad(sequence, (2, 0))[:, :, :-1])
        total = None
        for layer in self.layers:
            state, skip = layer(F.pad(state, (cast("DilatedLayer", layer).dilation, 0)), condition)
            total = skip if total is None else total + skip
        return self.to_logits(cast("Tensor", total))

    def to_logits(self, total: Tensor) -> Tensor:
        """(n, skip, length) to (n, length, levels)."""
        return cast("Tensor", self.head(F.relu(self.hidden(F.relu(total)))).transpose(1, 2))

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood in nats per token, of sound of any length."""
        return super().loss(x, player=player, condition=condition) * (self.length / x[0].numel())

    @property
    def any_length(self) -> bool:
        return self.config.shape[:2] == (1, 1)

    def check_pictures(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        sound = self.any_length and x.dim() == 4 and x.shape[1:3] == (1, 1)
        if sound and x.is_floating_point() and x.shape[3]:
            return x.to(self.device, next(self.parameters()).dtype)
        return super().check_pictures(x)

    def lay_out(self, values: Tensor) -> Tensor:
        return values[:, None, None] if self.any_length else super().lay_out(values)

    @torch.no_grad()
    def start(
        self, n: int, *, condition: Tensor | None = None, guidance: float | None = None, length: int | None = None
    ) -> State:
        self.check_start(n, guidance, length)
        condition, length = self.check_condition(condition, n), self.length if length is None else length
        converted = self.converted(length)
        if converted is not None:
            return converted.start(n, condition=condition)
        return WaveNetState(self, n, condition, length)


class WaveNetState(State):
    """What every layer reads, (rows, width, dilation + length), zero before the sequence; so nothing is computed twice.

    The input at time t is the sample before it, and at time 0 there is none.
    """

    def __init__(self, model: WaveNet, rows: int, condition: Tensor | None, length: int) -> None:
        super().__init__(rows, length)
        self.model = model
        self.condition = condition
        weight = model.first.weight
        self.x = weight.new_zeros(rows, 1, length + 1)  # x[t + 1] is the input at time t
        self.kept = [
            weight.new_zeros(rows, weight.shape[0], cast("DilatedLayer", layer).dilation + length)
            for layer in model.layers
        ]

    def first(self) -> Tensor:
        return self._logits(0, 1)[:, 0]

    def feed(self, tokens: Tensor) -> Tensor:
        if self.position == 0:
            self._logits(0, 1)
        begin, end = self.position + 1, self.position + tokens.shape[1] + 1
        self.x[:, 0, begin + 1 : end + 1] = self.model.dequantize(tokens)
        return self._logits(begin, end)

    def select(self, index: Tensor) -> None:
        index = index.to(self.x.device)
        self.x = self.x[index]
        self.kept = [kept[index] for kept in self.kept]
        if self.condition is not None:
            self.condition = self.condition[index]

    def _logits(self, begin: int, end: int) -> Tensor:
        """The logits (rows, end - begin, vocabulary) at the times begin .. end - 1; every layer keeps what it reads."""
        state = self.model.first(self.x[:, :, begin : end + 1])
        total = None
        for layer, kept in zip(self.model.layers, self.kept, strict=True):
            dilation = cast("DilatedLayer", layer).dilation
            kept[:, :, dilation + begin : dilation + end] = state
            state, skip = layer(kept[:, :, begin : dilation + end], self.condition)
            total = skip if total is None else total + skip
        return self.model.to_logits(cast("Tensor", total))
