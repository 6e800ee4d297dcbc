"""Sampling by fixed-point iteration: all tokens of a window at once, until none changes.

Token i is a function of the tokens before it, t_i = draw_i(p(. | t_0 .. t_{i-1})), as its noise hangs on nothing but
(seed, sample id, i). The sequential sample is the one fixed point of all these equations together; Jacobi's iteration
reaches it after at most as many passes as there are tokens, one token at least being right after each pass, and sooner
where neighbours say little about each other. (Song et al. 2021, arXiv:2002.03629, section 4)
"""

from __future__ import annotations

import torch
from torch import Tensor

from pygen.autoregressive.arguments import check_count, check_levels
from pygen.autoregressive.frontier import Frontier, Reader, Samples
from pygen.autoregressive.state import Stepper


@torch.no_grad()
def fixed_point_sample(
    model: Stepper,
    n: int,
    *,
    window: int = 32,
    ids: Tensor | None = None,
    condition: Tensor | None = None,
    prefix: Tensor | None = None,
    guess: Tensor | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
) -> Samples:
    """Draw n samples, the very ones that the loop token by token draws.

    They are the same bit for bit where the model's logits are, whether tokens are fed one by one or in blocks; where
    PyTorch's linear layers take part these agree to rounding, and a token that falls on the edge of its probability
    can differ.

    window: how many tokens past the first unknown one are computed in a pass.
    ids: int64 (n,), the numbers of the samples; 0 .. n-1 by default. condition: what `model.start` takes.
    prefix: int64 (n, p), tokens that are given. guess: int64 (n, length), tokens to begin with, such as those of a
    similar sample; by default the token before repeats.
    The others are those of `ops.sample_logits`.

    ValueError: window is not positive, or n, ids, prefix or guess does not fit. TypeError: one has another type or
    dtype. RuntimeError: logits are no distribution.
    """
    window = check_count("window", window, 1)
    frontier = Frontier(model, n, ids, prefix)
    if guess is not None:
        check_levels("guess", guess, model.vocabulary, wait=True)
        if guess.shape != frontier.tokens.shape:
            raise ValueError(f"guess has shape {tuple(guess.shape)}, but expected {tuple(frontier.tokens.shape)}")
        given = 0 if prefix is None else prefix.shape[1]
        frontier.tokens[:, given:] = guess[:, given:]
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    reader = Reader(model, n, condition)
    opened = first = frontier.first
    while first < model.length:
        end = min(model.length, first + window)
        if guess is None and end > opened:
            frontier.tokens[:, opened:end] = frontier.tokens[:, max(opened - 1, 0)][:, None]
        opened = max(opened, end)
        drawn = frontier.verify(reader.read(frontier.tokens, first, end), first, seed, filters)
        unknown = frontier.places(first, end) >= frontier.done[:, None]
        part = frontier.tokens[:, first:end]
        part.copy_(torch.where(unknown & (drawn >= 0), drawn, part))
        first = frontier.first
    return frontier.finish(reader.passes)
