"""Blockwise parallel decoding: extra heads of a model guess the tokens after the next one, and the pass that verifies
them makes the next guesses.

(Stern et al. 2018, arXiv:1811.03115, sections 3, 4 and 6.) There a guess is kept where it is the model's best token;
here where it is the token that the model draws with its own noise, which with temperature 0 is the same: samples are
those of the loop token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.autoregressive.arguments import check_count, check_tensor
from pygen.autoregressive.frontier import Frontier, Reader, Samples
from pygen.autoregressive.state import State, Stepper


class BlockwiseHeads(nn.Module):
    """Logits of the tokens after the next one, from the features that a model predicts the next one by.

    Each head is a residual layer with one hidden layer, in front of the model's own output layer.

    width: of the features. ahead: how many tokens after the next. hidden: units of each head's hidden layer.
    """

    def __init__(self, width: int, ahead: int, *, hidden: int | None = None) -> None:
        super().__init__()
        self.ahead = check_count("ahead", ahead, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden or width), nn.ReLU(), nn.Linear(hidden or width, width))
            for _ in range(self.ahead)
        )
        for layer in self.layers:  # at first every head says what the model says of the next token
            nn.init.zeros_(layer[2].weight)  # type: ignore[index]
            nn.init.zeros_(layer[2].bias)  # type: ignore[index]

    def forward(self, features: Tensor) -> Tensor:
        """(..., width) to (..., ahead, width): what the output layer is to see."""
        return torch.stack([features + layer(features) for layer in self.layers], dim=-2)


class BlockwiseModel(nn.Module):
    """A model with blockwise heads.

    model: an autoregressive model, which stays as it is. heads: they are trained with `loss`. output: the model's last
    layer, by which features (n, tokens, width) become logits; `token_logits(tokens, condition=...)` and every step call
    it once, on the features of their tokens in order, those with a label first where there is guidance.
    """

    def __init__(self, model: nn.Module, heads: BlockwiseHeads, output: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.heads = heads
        self.output = output

    @property
    def length(self) -> int:
        return self.stepper.length

    @property
    def vocabulary(self) -> int:
        return self.stepper.vocabulary

    @property
    def stepper(self) -> Stepper:
        """The model, seen as what samples token by token."""
        return self.model  # type: ignore[return-value]

    def start(self, n: int, *, condition: Tensor | None = None) -> State:
        return self.stepper.start(n, condition=condition)

    def step(self, token: Tensor | None, state: State) -> tuple[Tensor, State]:
        return self.stepper.step(token, state)

    def step_ahead(self, tokens: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Feed tokens (n, block), and get the logits (n, block, vocabulary) of what comes after each, and those of the
        `ahead` tokens after that, (n, block, ahead, vocabulary)."""
        with self._features() as seen:
            logits, state = self.stepper.step(tokens, state)
        return logits, self._project(seen[-1][: len(tokens)]), state

    def loss(self, tokens: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood in nats of each head's token; gradients reach the heads alone.

        tokens: int64 (n, length).

        ValueError: there is no token after a next one, or no sample.
        """
        check_tensor("tokens", tokens)
        if tokens.dim() != 2 or not len(tokens) or tokens.shape[1] < 2:
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)}, but expected (n, length) with at least one sample and two "
                "tokens: a head guesses one that comes after the next"
            )
        with self._features() as seen, torch.no_grad():
            self.model.token_logits(tokens, condition=condition)  # type: ignore[operator]
        logits = self._project(seen[-1].detach())
        losses = [
            F.cross_entropy(logits[:, : tokens.shape[1] - 1 - h, h].transpose(1, 2), tokens[:, 1 + h :])
            for h in range(min(self.heads.ahead, tokens.shape[1] - 1))
        ]
        return torch.stack(losses).mean()

    def _project(self, features: Tensor) -> Tensor:
        weights = {name: value.detach() for name, value in self.output.named_parameters()}
        logits: Tensor = torch.func.functional_call(self.output, weights, (self.heads(features),))
        return logits

    @contextmanager
    def _features(self) -> Iterator[list[Tensor]]:
        """What reaches the output layer inside."""
        seen: list[Tensor] = []
        handle = self.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            handle.remove()


class _AheadReader(Reader):
    """A reader that keeps what the heads say of a run's elements; nothing of element 0, which no token comes before."""

    def __init__(self, model: BlockwiseModel, n: int, condition: Tensor | None) -> None:
        super().__init__(model, n, condition)
        self.blockwise = model
        self.ahead: Tensor | None = None  # (n, b, ahead, vocabulary), of the last b elements that were read

    def _step(self, tokens: Tensor | None) -> Tensor:
        self.ahead = None
        if tokens is None:
            return super()._step(None)
        self.passes += 1
        logits, self.ahead, self.state = self.blockwise.step_ahead(tokens, self.state)
        return logits


@torch.no_grad()
def blockwise_sample(
    model: BlockwiseModel,
    n: int,
    *,
    ids: Tensor | None = None,
    condition: Tensor | None = None,
    prefix: Tensor | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
) -> Samples:
    """Draw n samples, the very ones that the loop token by token draws, up to `ahead` + 1 tokens a pass.

    A head's guess is drawn with the noise of the token that it guesses, so that heads which say the same as the model
    guess the same token. Where blocks and single tokens give logits that differ by rounding, see `fixed_point_sample`.

    ids: int64 (n,), the numbers of the samples; 0 .. n-1 by default. condition: what `model.start` takes.
    prefix: int64 (n, p), tokens that are given.
    The others are those of `ops.sample_logits`.

    ValueError: n, ids or prefix does not fit. TypeError: one has another type or dtype. RuntimeError: logits are no
    distribution.
    """
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    frontier = Frontier(model, n, ids, prefix)
    reader, ahead = _AheadReader(model, n, condition), model.heads.ahead
    while (first := frontier.first) < model.length:
        # Without a guess yet, no more than the next token can come of a pass.
        end = first + 1 if reader.passes == 0 else min(model.length, first + ahead + 1)
        before = frontier.done.clone()
        frontier.verify(reader.read(frontier.tokens, first, end), first, seed, filters)
        if reader.ahead is not None:
            _guess(frontier, reader.ahead, end, before, seed, filters)
    return frontier.finish(reader.passes)


def _guess(frontier: Frontier, ahead: Tensor, end: int, before: Tensor, seed: int, filters: dict[str, Any]) -> None:
    """Write what the heads say into the tokens after those that a sample knows now, where it knows more than before.

    ahead: (n, b, heads, vocabulary), beside the logits of the elements end - b .. end - 1.
    """
    n, b, heads, _ = ahead.shape
    rows = torch.arange(n, device=ahead.device)
    # The last element that is known now was drawn from the logits beside which the heads speak of those after it.
    beside = frontier.done - 1 - (end - b)
    useful = (frontier.done > before) & (beside >= 0)
    own = ahead[rows, beside.clamp(0, b - 1)]
    for head in range(heads):
        place = frontier.done + head
        wanted = useful & (place < frontier.length)
        place = place.clamp(max=frontier.length - 1)
        drawn = frontier.draw_at(own[:, head], place, seed, filters)
        frontier.tokens[rows, place] = torch.where(wanted & (drawn >= 0), drawn, frontier.tokens[rows, place])
