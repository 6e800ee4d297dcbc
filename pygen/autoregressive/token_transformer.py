"""A transformer over tokens: the elements of a picture, its pixels in the colours of a palette, or any code.

Token i is drawn from softmax(W norm(h_i)), where h_i is of a start vector and the tokens before it (Chen et al. 2020,
Generative Pretraining from Pixels, section 3). Labels are withheld from a share of the training, so that one network
knows the tokens with and without label, and samples can be guided (Ho & Salimans 2022, arXiv:2207.12598).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.autoregressive.config import AutoregressiveConfig
from pygen.autoregressive.model import AutoregressiveModel, evaluating
from pygen.autoregressive.palette import fit_palette, nearest_colour
from pygen.autoregressive.sampling import sequence_log_prob
from pygen.autoregressive.state import State
from pygen.nn.layer_caches import LayerCaches
from pygen.nn.transformer import CausalTransformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTransformerConfig(AutoregressiveConfig):
    """What a token transformer is made of, and how it samples.

    shape, levels: a map or a sequence of codes 0 .. K - 1 is a picture (1, height, width) of K levels.
    palette: colours that stand for all, for one token for each pixel; None for one for each element.
    layers, width, heads: of the transformer. dropout: in it, and of the tokens.
    label_dropout: share of the labels that training withholds, so that the model also knows p(x) without one.
    guidance: w >= 0, how far `sample` goes beyond the prediction with the label, away from that without one.
    """

    palette: int | None = None
    layers: int = 8
    width: int = 256
    heads: int = 8
    dropout: float = 0.1
    label_dropout: float = 0.1
    guidance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("layers", "width", "heads")
        if self.palette is not None:
            self.require_positive("palette")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, but expected a multiple of the {self.heads} heads")
        self.require_probability("dropout", "label_dropout")
        check_guidance(self, self.guidance)


def check_guidance(config: TokenTransformerConfig, guidance: float) -> None:
    """ValueError for guidance that a model of this configuration does not know."""
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance is {guidance}, but expected a number >= 0")
    if guidance and config.classes is None:
        raise ValueError(f"guidance is {guidance}, but expected 0 without classes")
    if guidance and config.label_dropout == 0:
        raise ValueError(
            f"guidance is {guidance} with label_dropout 0, but expected label_dropout > 0: the model never saw a "
            "picture without its label"
        )


class TokenTransformer(AutoregressiveModel):
    """An exact probability of token sequences, and samples token by token with a key/value cache.

    With a palette, a picture counts as that of the nearest colours: `log_prob` is of these, and `sample` draws them.
    The first batch that `loss` sees in training gives the palette, unless `choose_palette` did before.
    """

    config: TokenTransformerConfig
    palette: Tensor | None
    chosen: Tensor

    def __init__(self, config: TokenTransformerConfig | None = None) -> None:
        config = config or TokenTransformerConfig()
        super().__init__(config)
        self.begin = nn.Parameter(0.02 * torch.randn(config.width))
        self.embed = nn.Embedding(self.vocabulary, config.width)
        self.transformer = CausalTransformer(
            self.length,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            classes=config.classes,
            dropout=config.dropout,
        )
        self.head = nn.Linear(config.width, self.vocabulary)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        palette = None
        if config.palette is not None:
            # Until pictures have been seen: colours at random.
            generator = torch.Generator().manual_seed(0)
            palette = self.dequantize(
                torch.randint(config.levels, (config.palette, config.shape[0]), generator=generator)
            )
        self.register_buffer("palette", palette)
        self.register_buffer("chosen", torch.zeros((), dtype=torch.bool), persistent=palette is not None)

    @property
    def length(self) -> int:
        channels = 1 if self.config.palette is not None else self.config.shape[0]
        return channels * self.config.shape[1] * self.config.shape[2]

    @property
    def vocabulary(self) -> int:
        return self.config.levels if self.config.palette is None else self.config.palette

    @torch.no_grad()
    def choose_palette(self, pictures: Tensor, *, seed: int = 0) -> None:
        """Make the palette that of pictures (n, channels, height, width) in [-1, 1], rounded to the levels."""
        if self.palette is None:
            raise ValueError("palette is None in the configuration, but expected a number of colours")
        found = fit_palette(self.check_pictures(pictures), len(self.palette), seed=seed)
        self.palette.copy_(self.dequantize(self.quantize(found)))
        self.chosen.fill_(True)

    def tokens(self, x: Tensor) -> Tensor:
        if self.palette is None:
            return super().tokens(x)
        self.refuse_nan(x)
        pixels = x.movedim(1, -1).flatten(0, -2).to(self.palette.dtype)
        return torch.unflatten(nearest_colour(pixels, self.palette), 0, (len(x), -1))

    def lay_out(self, values: Tensor) -> Tensor:
        if self.palette is None:
            return super().lay_out(values)
        return torch.unflatten(values, 1, self.config.shape[1:])[:, None].expand(-1, self.config.shape[0], -1, -1)

    def pictures(self, tokens: Tensor) -> Tensor:
        if self.palette is None:
            return super().pictures(tokens)
        palette = self.dequantize(self.quantize(self.palette))  # exact, whatever dtype the buffer went through
        colours = torch.unflatten(palette[tokens], 1, self.config.shape[1:]).movedim(-1, 1)
        return colours.to(self.begin.dtype).contiguous()

    def known_tokens(self, known: Tensor) -> Tensor:
        return super().known_tokens(known) if self.palette is None else known.all(1).flatten(1)

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood in nats per token; while training, labels are withheld by PyTorch's
        generator."""
        self.check_player(player)
        x = self.check_batch(x)
        condition = self.check_condition(condition, len(x))
        if self.training and self.palette is not None and not self.chosen:
            self.choose_palette(x)
        if condition is not None and self.training:
            withheld = torch.rand(len(x), device=x.device) < self.config.label_dropout
            condition = condition.masked_fill(withheld, self.config.classes or 0)
        tokens = self.tokens(x)
        log_prob = self.nan_of_nan(x, sequence_log_prob(self._logits(tokens, condition), tokens))
        return -log_prob.mean() / self.length

    def logits(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        return self.token_logits(self.tokens(self.check_pictures(x)), condition=condition)

    def token_logits(self, tokens: Tensor, *, condition: Tensor | None = None) -> Tensor:
        tokens = self.check_tokens(tokens)
        return self._logits(tokens, self.check_condition(condition, len(tokens)))

    def check_guidance(self, guidance: float | None) -> None:
        if guidance is not None:
            check_guidance(self.config, guidance)

    @torch.no_grad()
    def start(
        self, n: int, *, condition: Tensor | None = None, guidance: float | None = None, length: int | None = None
    ) -> State:
        guidance = self.config.guidance if guidance is None else guidance
        self.check_start(n, guidance, length)
        condition = self.check_condition(condition, n)
        with evaluating(self):
            return TransformerState(self, n, condition, guidance)

    def _logits(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        """The logits of tokens (n, length); label number `classes` stands for none."""
        begin = self.begin.expand(len(tokens), 1, -1)
        entered = torch.cat((begin, self.embed(tokens[:, :-1])), dim=1)
        entered = F.dropout(entered, self.config.dropout, self.training)
        return cast("Tensor", self.head(self.transformer(entered, condition)))


class TransformerState(State):
    """The keys and values of the start vector and of the tokens so far; guided, of each sample with its label, and then
    of each without one."""

    def __init__(self, model: TokenTransformer, rows: int, condition: Tensor | None, guidance: float) -> None:
        super().__init__(rows, model.length)
        self.model = model
        self.guidance = guidance
        if guidance and condition is not None:
            condition = torch.cat((condition, torch.full_like(condition, model.config.classes or 0)))
        self.condition = condition
        self.cache = cast("LayerCaches", model.transformer.cache(2 * rows if guidance else rows))
        self.start = self._step(model.begin.expand(rows, 1, -1))[:, 0]

    def first(self) -> Tensor:
        return self.start

    def feed(self, tokens: Tensor) -> Tensor:
        return self._step(self.model.embed(tokens))

    def forget(self, position: int) -> None:
        self.cache.crop(position + 1)  # the start vector is in, too

    def copy(self) -> TransformerState:
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def select(self, index: Tensor) -> None:
        index = index.to(self.start.device)
        self.start = self.start[index]
        if self.guidance:
            index = torch.cat((index, index + self.rows))
        if self.condition is not None:
            self.condition = self.condition[index]
        self.cache.reorder(index)

    def _step(self, entered: Tensor) -> Tensor:
        """The logits (rows, block, vocabulary) after the next tokens, as vectors (rows, block, width)."""
        if not self.guidance:
            return cast("Tensor", self.model.head(self.model.transformer.step(entered, self.cache, self.condition)))
        paired = self.model.transformer.step(entered.repeat(2, 1, 1), self.cache, self.condition)
        labelled, unlabelled = self.model.head(paired).log_softmax(-1).chunk(2)
        return labelled + self.guidance * (labelled - unlabelled)  # type: ignore[no-any-return]
