"""How the tokens of autoregressive models are drawn, and how likely they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sampling(NamedTuple):
    """How tokens are drawn; see `AutoregressiveModel.sample`."""

    ids: Tensor
    condition: Tensor | None
    seed: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    guidance: float | None = None

    @property
    def filtered(self) -> bool:
        """Whether the tokens' distribution is changed before they are drawn."""
        return tuple(self.filters.values()) != (1.0, None, None, None, None)

    @property
    def filters(self) -> dict[str, Any]:
        """The arguments of `ops.sample_logits` that change the distribution."""
        names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
        return {name: getattr(self, name) for name in names}


def sequence_log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """log P in nats, (n,), of int64 tokens (n, length) under logits (n, length, vocabulary)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(wide.transpose(1, 2), tokens, reduction="none").sum(1)
