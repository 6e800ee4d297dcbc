"""Speculative sampling: a small model drafts several tokens, and one pass of the large one says which of them stay.

Each token has the large model's distribution, whatever the draft model is; the better that predicts, the more tokens a
pass gives. (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318, algorithm 2)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pygen import ops
from pygen.autoregressive.arguments import check_count
from pygen.autoregressive.frontier import Frontier, Reader, Samples
from pygen.autoregressive.state import Stepper


@torch.no_grad()
def speculative_sample(
    model: Stepper,
    draft: Stepper,
    n: int,
    *,
    lookahead: int = 4,
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
    """Draw n samples of a model, several tokens a pass, with the help of a draft model.

    The samples have the model's distribution, after the filters, and are others than those that the loop token by token
    draws under the same seed. A sample does not depend on its batch: how far one is ahead of another changes what is
    fed, and nothing of what is drawn.

    draft: a model of the same length and vocabulary. lookahead: how many tokens it drafts for a pass.
    ids: int64 (n,), the numbers of the samples; 0 .. n-1 by default. condition: what both models' `start` takes.
    prefix: int64 (n, p), tokens that are given.
    The others are those of `ops.sample_logits`; the draft is drawn with the same.

    ValueError: the models do not fit each other, lookahead is not positive, or n, ids or prefix does not fit.
    TypeError: one has another type or dtype. RuntimeError: logits are no distribution.
    """
    lookahead = check_count("lookahead", lookahead, 1)
    if (draft.length, draft.vocabulary) != (model.length, model.vocabulary):
        raise ValueError(
            f"draft has {draft.length} tokens of {draft.vocabulary} values, but expected {model.length} of "
            f"{model.vocabulary}, as the model has"
        )
    frontier = Frontier(model, n, ids, prefix)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    target_reader, draft_reader = Reader(model, n, condition), Reader(draft, n, condition)
    while (first := frontier.first) < model.length:
        # Samples that are far ahead wait. What the others draft does not hang on them.
        active = (frontier.done < model.length) & (frontier.done <= first + lookahead)
        count = torch.where(active, (model.length - 1 - frontier.done).clamp(max=lookahead), 0)
        last = int(torch.where(active, frontier.done + count, first).max())
        tokens, draft_logits = _draft(frontier, draft_reader, count, first, last, seed, filters)
        logits = target_reader.read(tokens, first, last + 1)
        offsets = frontier.places(0, lookahead + 1)
        places = (frontier.done[:, None] + offsets).clamp(first, last)
        target_logits = _filtered(_at(logits, places - first), filters)
        drafted = torch.where(offsets < count[:, None], tokens.gather(1, places), -1)[:, :lookahead]
        draft_places = (places[:, :lookahead] - first).clamp(max=max(last - first - 1, 0))
        drawn, accepted, log_prob = ops.speculative_accept(
            drafted, _at(draft_logits, draft_places).to(target_logits.dtype), target_logits, seed=seed,
            sample_ids=frontier.ids, position=frontier.done.clamp(max=model.length - 1),
        )  # fmt: skip
        frontier.take(drawn, log_prob, torch.where(active, accepted + 1, 0))
    return frontier.finish(target_reader.passes, draft_reader.passes)


def _draft(
    frontier: Frontier, reader: Reader, count: Tensor, first: int, last: int, seed: int, filters: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """All tokens (n, length) with count[i] drafted ones after those that sample i knows, and the logits
    (n, last - first, vocabulary) of the elements first .. last - 1 that they were drawn from."""
    tokens, steps = frontier.tokens.clone(), []
    for place in range(first, last):
        logits = _filtered(reader.read(tokens, place, place + 1), filters)
        drawn, _ = frontier.draw(logits, place, seed, {})
        wanted = (place >= frontier.done) & (place < frontier.done + count)
        tokens[:, place] = torch.where(wanted, drawn[:, 0].clamp(min=0), tokens[:, place])
        steps.append(logits)
    if not steps:  # nothing to draft before the last token
        return tokens, torch.zeros(len(tokens), 1, reader.model.vocabulary, device=tokens.device)
    return tokens, torch.cat(steps, dim=1)


def _filtered(logits: Tensor, filters: dict[str, Any]) -> Tensor:
    """The distributions that tokens are drawn from, as logits of the same shape (n, b, vocabulary)."""
    if filters["temperature"] == 1 and all(value is None for name, value in filters.items() if name != "temperature"):
        return logits
    return ops.filter_logits(logits.flatten(0, 1), **filters).view_as(logits)


def _at(logits: Tensor, index: Tensor) -> Tensor:
    """(n, b, vocabulary) and (n, m) to (n, m, vocabulary)."""
    return logits.gather(1, index[:, :, None].expand(-1, -1, logits.shape[2]))
