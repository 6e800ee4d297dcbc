"""Gated PixelCNN: p(x) = prod_i p(x_i | x_1 .. x_{i-1}), in raster order, the colours of a pixel in turn.

The vertical stack reads the rows above, the horizontal stack the pixels to the left and the vertical stack; each layer
is tanh(W_f * x + V_f y) sigmoid(W_g * x + V_g y), y the class (van den Oord et al. 2016, arXiv:1606.05328, eq. 2-4 and
figure 2).
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen import ops
from pygen.model import Density, GenerativeModel, ModelConfig, Stage, refuse_steps
from pygen.nn.masked import HorizontalConv2d, VerticalConv2d, shift_down
from pygen.ops.noise import TOKEN_STREAM, philox_uniform_reference, signed_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedPixelCNNConfig(ModelConfig):
    """What a Gated PixelCNN is made of.

    layers: gated layers. Each reaches kernel_size // 2 further, and together they should reach across the picture.
    width: channels of each stack, a multiple of the picture's channels.
    head: channels between the stacks and the logits, a multiple of the picture's channels.
    first_kernel_size, kernel_size: odd; of the first layer and of the others.
    dropout: of whole channels, after each gated activation and in the head.
    """

    layers: int = 6
    width: int = 30
    head: int = 60
    first_kernel_size: int = 5
    kernel_size: int = 3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers is {self.layers}, but expected at least 1")
        for name in ("width", "head"):
            value = getattr(self, name)
            if value < 1 or value % self.shape[0]:
                raise ValueError(f"{name} is {value}, but expected a positive multiple of the {self.shape[0]} channels")
        for name in ("first_kernel_size", "kernel_size"):
            value = getattr(self, name)
            if value < 3 or value % 2 == 0:
                raise ValueError(f"{name} is {value}, but expected an odd number from 3")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but expected a number in [0, 1)")


class GatedLayer(nn.Module):
    """One layer of both stacks; the first reads the picture, the others add to what they read."""

    def __init__(self, config: GatedPixelCNNConfig, *, first: bool) -> None:
        super().__init__()
        colours, _, _ = config.shape
        width = config.width
        incoming = colours if first else width
        kernel_size = config.first_kernel_size if first else config.kernel_size
        self.residual = not first
        self.dropout = config.dropout
        self.above = VerticalConv2d(incoming, 2 * width, kernel_size)
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.left = HorizontalConv2d(incoming, 2 * width, kernel_size, strict=first, colours=colours)
        self.merge = HorizontalConv2d(width, width, 1, colours=colours)
        self.label = None if config.classes is None else nn.Embedding(config.classes, 4 * width)
        if self.label is not None:
            nn.init.zeros_(self.label.weight)

    def vertical(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next state of the vertical stack (n, width, rows, columns), and what the horizontal stack is fed."""
        above = self.above(x)
        feed = self.link(above)
        if self.label is not None:
            to_above, to_left = self.label(condition)[:, :, None, None].chunk(2, dim=1)
            above, feed = above + to_above, feed + to_left
        out = self._gate(above)
        return (x + out if self.residual else out), feed

    def horizontal(self, x: Tensor, feed: Tensor) -> Tensor:
        """The next state of the horizontal stack (n, width, rows, columns)."""
        out = self.merge(self._gate(self.left(x) + feed))
        return x + out if self.residual else out  # type: ignore[no-any-return]

    def _gate(self, x: Tensor) -> Tensor:
        # Value and gate alternate, so that both are of the same colour group.
        value, gate = torch.unflatten(x, 1, (-1, 2)).unbind(2)
        return F.dropout2d(value.tanh() * gate.sigmoid(), self.dropout, self.training)


class GatedPixelCNN(GenerativeModel):
    """An exact probability of discrete pictures, and samples element by element.

    Elements are numbered in the order in which they are drawn: i = (row * width + column) * channels + channel.
    """

    density = Density.EXACT
    config: GatedPixelCNNConfig

    def __init__(self, config: GatedPixelCNNConfig | None = None) -> None:
        config = config or GatedPixelCNNConfig()
        super().__init__(config)
        colours, height, width = config.shape
        self.layers = nn.ModuleList(GatedLayer(config, first=k == 0) for k in range(config.layers))
        # Convolutions cannot tell a border from a grey pixel, and pictures of one size have places.
        self.place = nn.Parameter(torch.zeros(2 * config.width, height, width))
        self.hidden = HorizontalConv2d(config.width, config.head, 1, colours=colours)
        self.head = HorizontalConv2d(config.head, colours * config.levels, 1, colours=colours)
        nn.init.zeros_(self.head.weight)

    def logits(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """(n, channels, levels, height, width) unnormalized log-probabilities of each element given those before it."""
        x = self.check_pictures(x)
        condition = self.check_condition(condition, len(x))
        return self._horizontal(x, self._vertical(x, condition))

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood in nats per dimension."""
        self.check_player(player)
        return -self.log_prob(x, condition=condition).mean() / self.config.dimensions

    def log_prob(
        self, x: Tensor, *, condition: Tensor | None = None, ids: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """log P(x | condition) in nats, (n,); exact, so `ids` and `seed` change nothing. See `GenerativeModel`."""
        x = self.check_pictures(x)
        k = self.quantize(x)
        logits = self.logits(self.dequantize(k).to(x.dtype), condition=condition)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return -F.cross_entropy(wide.movedim(2, 1), k, reduction="none").flatten(1).sum(1)

    def sample(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> Tensor:
        refuse_steps(self, steps)
        return self.sample_with_log_prob(n, ids=ids, condition=condition, seed=seed)[0]

    @torch.inference_mode()
    def sample_with_log_prob(
        self, n: int, *, ids: Tensor | None = None, condition: Tensor | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """`sample`, and log P of each picture in nats, (n,), gathered while drawing."""
        ids = self.resolve_ids(n, ids)
        condition = self.resolve_condition(ids, condition)
        return self._fill(self._uniforms(ids, seed), None, ids, condition, seed, None)

    @torch.inference_mode()
    def complete(
        self,
        x: Tensor,
        known: Tensor,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Draw the rest of half-given pictures, in raster order, each element given all before it.

        What is known but comes later in raster order has no influence on what is drawn before it.

        x: (n, channels, height, width) in [-1, 1]. known: bool, broadcastable to x; True is kept.
        """
        x = self.check_pictures(x)
        if known.dtype != torch.bool:
            raise TypeError(f"known has dtype {known.dtype}, but expected torch.bool")
        try:
            known = known.to(x.device).expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"known has shape {tuple(known.shape)}, but expected one that broadcasts to {tuple(x.shape)}"
            ) from None
        ids = self.resolve_ids(len(x), ids)
        condition = self.resolve_condition(ids, condition)
        return self._fill(self.dequantize(self.quantize(x)).to(x.dtype), known, ids, condition, seed, None)[0]

    @torch.inference_mode()
    def trajectory(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> list[Stage]:
        """Z, the picture after each pixel, X. Z holds the uniform numbers that the tokens are drawn with, as 2 u - 1;
        each pixel in turn changes from its number in Z to its value in X."""
        refuse_steps(self, steps)
        ids = self.resolve_ids(n, ids)
        condition = self.resolve_condition(ids, condition)
        z = self._uniforms(ids, seed)
        stages = [Stage("Z", z.clone())]
        x, _ = self._fill(z, None, ids, condition, seed, stages)
        return [*stages[:-1], Stage("X", x)]

    def network_passes(self, steps: int | None = None) -> int:
        return self.config.dimensions

    def draw_element(
        self, row: Tensor, feeds: list[Tensor], channel: int, *, ids: Tensor, seed: int, position: int
    ) -> tuple[Tensor, Tensor]:
        """One step of `sample`: the grey level int64 (n,) of the last pixel of a row, and its log-probability (n,).

        row: (n, channels, 1, columns), the row so far with the pixel to draw at its end. feeds: what the vertical
        stack feeds each layer there, (n, 2 * width, 1, columns).
        """
        logits = self._horizontal(row, feeds)[:, channel, :, 0, -1]
        return ops.sample_logits(logits, seed=seed, sample_ids=ids, position=position)

    def _vertical(self, x: Tensor, condition: Tensor | None) -> list[Tensor]:
        """What the vertical stack feeds each layer of the horizontal stack; row r of it depends on the rows above r."""
        state = shift_down(x)
        feeds = []
        for layer in self.layers:
            state, feed = cast(GatedLayer, layer).vertical(state, condition)
            feeds.append(feed)
        feeds[0] = feeds[0] + self.place[:, : x.shape[2]]
        return feeds

    def _horizontal(self, x: Tensor, feeds: list[Tensor]) -> Tensor:
        state = x
        for layer, feed in zip(self.layers, feeds, strict=True):
            state = cast(GatedLayer, layer).horizontal(state, feed)
        hidden = F.dropout2d(F.relu(self.hidden(F.relu(state))), self.config.dropout, self.training)
        return self.head(hidden).unflatten(1, (self.config.shape[0], -1))  # type: ignore[no-any-return]

    def _uniforms(self, ids: Tensor, seed: int) -> Tensor:
        """2 u - 1 of the numbers u that `ops.sample_logits` draws with, laid out as pictures."""
        colours, height, width = self.config.shape
        position = torch.arange(self.config.dimensions, device=ids.device)
        seeds = ids.new_tensor(signed_seed(seed))
        u = philox_uniform_reference(seeds, ids[:, None], TOKEN_STREAM, position, ids.new_tensor(0))
        picture = u.reshape(-1, height, width, colours).movedim(3, 1).contiguous()
        return (2 * picture - 1).to(self.place.dtype)

    def _fill(
        self,
        x: Tensor,
        known: Tensor | None,
        ids: Tensor,
        condition: Tensor | None,
        seed: int,
        stages: list[Stage] | None,
    ) -> tuple[Tensor, Tensor]:
        """Draw into x, in place, what is not known; x and the sum of the log-probabilities of what was drawn."""
        colours, height, width = self.config.shape
        total = x.new_zeros(len(x), dtype=torch.float64)
        for row in range(height):
            # Rows below do not matter, and what the rows above feed into this one is computed once.
            feeds = [feed[:, :, row:] for feed in self._vertical(x[:, :, : row + 1], condition)]
            for column in range(width):
                so_far = slice(0, column + 1)
                here = [feed[..., so_far] for feed in feeds]
                for channel in range(colours):
                    position = (row * width + column) * colours + channel
                    token, log_prob = self.draw_element(
                        x[:, :, row : row + 1, so_far], here, channel, ids=ids, seed=seed, position=position
                    )
                    value = self.dequantize(token).to(x.dtype)
                    if known is not None:
                        given = known[:, channel, row, column]
                        value = torch.where(given, x[:, channel, row, column], value)
                        log_prob = torch.where(given, 0.0, log_prob)
                    x[:, channel, row, column] = value
                    total += log_prob
                if stages is not None:
                    stages.append(Stage(f"row {row + 1}, column {column + 1}", x.clone()))
        broken = total.isnan()
        if broken.any():
            raise RuntimeError(
                f"sample {int(ids[broken][0])} met logits that are no distribution; the parameters are not finite"
            )
        return x, total.to(x.dtype)
