"""Sampling from logits against transformers' processors with torch.multinomial, and torch.compile; speculative
acceptance against the same steps in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import Case, compiled
from torch import Tensor

from pygen import ops


def eager(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """The same filters in PyTorch."""
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ascending, order = logits.sort(-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)


def transformers_way(options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """What `generate(do_sample=True)` does to the logits of a step; two rows of a pair are guided as there."""
    import transformers

    warpers = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
        "typical_p": transformers.TypicalLogitsWarper,
    }
    processors = transformers.LogitsProcessorList(
        warpers[name](value) for name, value in options.items() if name in warpers
    )
    history, unconditional = options.get("history"), options.get("unconditional")

    def draw(logits: Tensor) -> Tensor:
        if unconditional is not None:
            scores, without = logits.log_softmax(-1), unconditional.log_softmax(-1)
            logits = options["guidance_scale"] * (scores - without) + without
        return torch.multinomial(processors(history, logits).softmax(-1), 1)

    return draw


def filters_of(logits: Tensor) -> dict[str, dict[str, Any]]:
    """Options of `sample_logits` by name, in the order in which they apply."""
    history = torch.randint(logits.shape[1], (len(logits), 500), device=logits.device)
    return {
        "none": {},
        "top-k 50": {"top_k": 50},
        "top-p .95": {"top_p": 0.95},
        "both": {"top_k": 50, "top_p": 0.95},
        "min-p .05": {"min_p": 0.05},
        "typical .9": {"typical_p": 0.9},
        "penalty, both": {"repetition_penalty": 1.2, "history": history, "top_k": 50, "top_p": 0.95},
        "guidance, both": {
            "guidance_scale": 2.0, "unconditional": torch.randn_like(logits), "top_k": 50, "top_p": 0.95,
        },
    }  # fmt: skip


AIMS = {"none": 30.0, "top-k 50": 20.0, "top-p .95": 20.0, "both": 20.0}  # of 8 rows of 50,257


def accept(tokens: Tensor, draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Leviathan et al.'s algorithm 1 after the drafts, as it is usually written: the drafts, and a token after them."""
    p, q = target.softmax(-1), draft.softmax(-1)
    own = tokens[..., None]
    keep = torch.rand_like(tokens, dtype=p.dtype) < (p[:, :-1].gather(2, own) / q.gather(2, own))[..., 0]
    accepted = keep.int().cumprod(1).sum(1)
    residual = torch.cat(((p[:, :-1] - q).clamp(min=0), p[:, -1:]), 1)
    at = residual.gather(1, accepted[:, None, None].expand(-1, 1, p.shape[2]))[:, 0]
    return accepted, torch.multinomial(at, 1)


def cases(device: torch.device) -> Iterator[Case]:
    """Vocabularies of image codes and of text, each filter alone and together, steep and flat rows."""
    shapes = ((8, 1024, 2.0), (8, 16_384, 2.0), (8, 50_257, 2.0), (8, 50_257, 0.5), (1, 50_257, 2.0))
    for rows, vocabulary, spread in shapes:
        logits = spread * torch.randn(rows, vocabulary, device=device)
        ids = torch.arange(rows, device=device)
        for name, options in filters_of(logits).items():
            rivals: dict[str, Callable[[], Any]] = {}
            if options.keys() <= {"top_k", "top_p"}:
                top_k, top_p = options.get("top_k"), options.get("top_p")
                rivals["eager"] = partial(eager, logits, top_k, top_p)
                rivals["compiled"] = partial(compiled(eager), logits, top_k, top_p)
            note = ""
            try:
                rivals["transformers"] = partial(transformers_way(options), logits)
            except ImportError:
                note = "transformers is not installed: pip install pygen-torch[benchmark]"
            yield Case(
                f"sample, {name}, spread {spread}", f"({rows}, {vocabulary})",
                partial(ops.sample_logits, logits, seed=0, sample_ids=ids, position=0, **options),
                rivals, 4 * logits.numel() * (2 if "unconditional" in options else 1),
                {"transformers": AIMS[name]} if (rows, vocabulary) == (8, 50_257) and name in AIMS else {}, note,
            )  # fmt: skip
    for rows, drafts, vocabulary in ((1, 4, 50_257), (8, 4, 50_257), (8, 4, 1024)):
        target = 2 * torch.randn(rows, drafts + 1, vocabulary, device=device)
        draft = target[:, :drafts] + 0.3 * torch.randn(rows, drafts, vocabulary, device=device)
        ids = torch.arange(rows, device=device)
        tokens = torch.stack(
            [ops.sample_logits(draft[:, i], seed=0, sample_ids=ids, position=i)[0] for i in range(drafts)], 1
        )
        yield Case(
            f"accept {drafts} drafts", f"({rows}, {vocabulary})",
            partial(ops.speculative_accept, tokens, draft, target, seed=0, sample_ids=ids, position=0),
            {
                "eager": partial(accept, tokens, draft, target),
                "compiled": partial(compiled(accept), tokens, draft, target),
            },
            4 * (draft.numel() + target.numel()),
        )  # fmt: skip
