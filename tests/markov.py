"""Autoregressive models whose distribution is known: a Markov chain, as tables and as a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.autoregressive.state import State


class MarkovState(State):
    """Counts the passes, and keeps the tokens, so that a wrong crop shows."""

    def __init__(self, model: MarkovChain, rows: int) -> None:
        super().__init__(rows, model.length)
        self.model = model
        self.tokens = torch.zeros(rows, model.length, dtype=torch.int64)

    def first(self) -> Tensor:
        return self.model.initial().expand(self.rows, -1)

    def feed(self, tokens: Tensor) -> Tensor:
        end = self.position + tokens.shape[1]
        self.tokens[:, self.position : end] = tokens
        # From the tokens that were fed before, too: the last two decide.
        two = torch.cat((torch.zeros_like(tokens[:, :1]), self.tokens[:, :end]), 1).unfold(1, 2, 1)
        return self.model.after(two[:, -tokens.shape[1] :])

    def select(self, index: Tensor) -> None:
        self.tokens = self.tokens[index]


class MarkovChain(nn.Module):
    """P(t_i | t_{i-2}, t_{i-1}) from a table of logits (vocabulary, vocabulary, vocabulary); t_{-2} = t_{-1} = 0."""

    def __init__(self, table: Tensor, length: int) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.length = length
        self.vocabulary = table.shape[-1]

    def initial(self) -> Tensor:
        return self.table[0, 0]

    def after(self, two: Tensor) -> Tensor:
        return self.table[two[..., 0], two[..., 1]]

    def start(self, n: int, *, condition: Tensor | None = None) -> MarkovState:
        return MarkovState(self, n)

    def step(self, token: Tensor | None, state: MarkovState) -> tuple[Tensor, MarkovState]:
        return state.advance(token), state

    def log_prob(self, tokens: Tensor, **filters: object) -> Tensor:
        """(n,) of tokens (n, length), in float64, each distribution filtered as `ops.filter_logits` does."""
        padded = torch.cat((torch.zeros_like(tokens[:, :2]), tokens), 1)
        logits = self.after(padded.unfold(1, 2, 1)[:, :-1]).double()
        kept = ops.filter_logits(logits.flatten(0, 1), **filters).view_as(logits)
        return kept.gather(2, tokens[:, :, None])[..., 0].sum(1)


class MarkovNetwork(MarkovChain):
    """The same with features: an embedding of the last two tokens, and an output layer."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__(torch.zeros(1, 1, vocabulary), length)
        self.embed = nn.Embedding(vocabulary * vocabulary, width)
        self.output = nn.Linear(width, vocabulary)

    def initial(self) -> Tensor:
        return self.after(torch.zeros(1, 2, dtype=torch.int64))[0]

    def after(self, two: Tensor) -> Tensor:
        return self.output(self.embed(two[..., 0] * self.vocabulary + two[..., 1]))

    def token_logits(self, tokens: Tensor, *, condition: Tensor | None = None) -> Tensor:
        padded = torch.cat((torch.zeros_like(tokens[:, :2]), tokens), 1)
        return self.after(padded.unfold(1, 2, 1)[:, :-1])


@torch.no_grad()
def one_by_one(
    model: MarkovChain,
    n: int,
    *,
    ids: Tensor | None = None,
    seed: int = 0,
    prefix: Tensor | None = None,
    **filters: object,
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probability of the loop token by token."""
    ids = torch.arange(n) if ids is None else ids
    state, tokens, total = model.start(n), [], torch.zeros(n, dtype=torch.float64)
    for position in range(model.length):
        logits, state = model.step(tokens[-1] if tokens else None, state)
        token, log_prob = ops.sample_logits(logits, seed=seed, sample_ids=ids, position=position, **filters)
        if prefix is not None and position < prefix.shape[1]:
            token, log_prob = prefix[:, position], torch.zeros(n)
        tokens.append(token)
        total += log_prob
    return torch.stack(tokens, 1), total
