"""Sampling from logits against transformers' processors with torch.multinomial, and torch.compile."""

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


def transformers_way(top_k: int | None, top_p: float | None) -> Callable[[Tensor], Tensor]:
    """What `generate(do_sample=True)` does to the logits of a step."""
    from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

    processors: Any = LogitsProcessorList()
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(TopPLogitsWarper(top_p))
    return lambda logits: torch.multinomial(processors(None, logits).softmax(-1), 1)


def cases(device: torch.device) -> Iterator[Case]:
    """Vocabularies of image codes and of text, each filter alone and both, steep and flat rows."""
    filters: list[tuple[str, int | None, float | None]] = [
        ("none", None, None), ("top-k 50", 50, None), ("top-p .95", None, 0.95), ("both", 50, 0.95),
    ]  # fmt: skip
    shapes = ((8, 1024, 2.0), (8, 16_384, 2.0), (8, 50_257, 2.0), (8, 50_257, 0.5), (1, 50_257, 2.0))
    for rows, vocabulary, spread in shapes:
        logits = spread * torch.randn(rows, vocabulary, device=device)
        ids = torch.arange(rows, device=device)
        for name, top_k, top_p in filters:
            rivals: dict[str, Callable[[], Tensor]] = {
                "eager": lambda x=logits, k=top_k, p=top_p: eager(x, k, p),
                "compiled": partial(compiled(eager), logits, top_k, top_p),
            }
            note = ""
            try:
                way = transformers_way(top_k, top_p)
                rivals["transformers"] = lambda x=logits, way=way: way(x)
            except ImportError:
                note = "transformers is not installed: pip install pygen-torch[benchmark]"
            yield Case(
                f"sample, {name}, spread {spread}", f"({rows}, {vocabulary})",
                lambda x=logits, ids=ids, k=top_k, p=top_p: ops.sample_logits(
                    x, seed=0, sample_ids=ids, position=0, top_k=k, top_p=p
                ),
                rivals, 4 * logits.numel(), {"transformers": 10.0} if vocabulary == 50_257 and top_p else {}, note,
            )  # fmt: skip
