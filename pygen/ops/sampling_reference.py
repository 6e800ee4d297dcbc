"""Sampling from logits in plain PyTorch, by sorting: what `pygen/ops/sampling.py` promises, step by step.

Weights are whole numbers round(2^b exp((score - peak) / temperature)) with a sum below 2^53, so that sums in float64
are exact, hence the same in any order: thresholds and draws need no tolerance. `csrc/sampling.h` has the same
arithmetic.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pygen.ops.noise import TOKEN_STREAM, philox_reference, signed_seed

_LN2 = math.log(2)


class Filters(NamedTuple):
    """The options of `sample_logits`, in the order in which they apply; each at its default leaves a row as it is."""

    guidance_scale: float = 1.0
    unconditional: Tensor | None = None
    repetition_penalty: float = 1.0
    history: Tensor | None = None
    allowed: Tensor | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    ties: str = "keep"


class _Kept(NamedTuple):
    """Rows after all filters: their valid ones, (score - peak) / temperature, and the weight of what is kept."""

    valid: Tensor  # bool (rows,): finite maximum and no NaN
    depth: Tensor  # (rows, vocabulary)
    weight: Tensor  # float64 (rows, vocabulary), whole numbers
    holds: Tensor  # bool (rows, vocabulary): kept, however little it weighs
    bits: int


def weight_bits(vocabulary: int) -> int:
    """b: the sum of `vocabulary` weights of at most 2^b stays within 2^53."""
    return min(53 - vocabulary.bit_length(), 48)


def uniform_reference(seed: int | Tensor, sample_ids: Tensor, position: int | Tensor) -> Tensor:
    """Float64 uniform in [0, 1), 53 bits of the words 0 and 1 of block 0 of the token stream."""
    seeds = seed if isinstance(seed, Tensor) else sample_ids.new_tensor(signed_seed(seed))
    positions = position if isinstance(position, Tensor) else sample_ids.new_tensor(position)
    return uniform_of_words(philox_reference(seeds, sample_ids, TOKEN_STREAM, positions, torch.zeros_like(sample_ids)))


def uniform_of_words(words: Tensor) -> Tensor:
    """(..., 2 or more) words to a float64 multiple of 2^-53 in [0, 1), from the first two."""
    return ((words[..., 0] >> 5) * 2**26 + (words[..., 1] >> 6)).double() * 2.0**-53


def inverse_reference(weight: Tensor, u: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds u times the whole, (rows,)."""
    cumulative = weight.cumsum(-1)
    total = cumulative[:, -1]
    # Rounding could make the target the total itself, which no cumulative sum exceeds.
    target = torch.minimum(u * total, total - 1)
    return (cumulative > target.unsqueeze(-1)).int().argmax(-1)


def weights_reference(depth: Tensor) -> Tensor:
    """Whole weights of (score - peak) / temperature, float64."""
    return (depth.exp() * 2.0 ** weight_bits(depth.shape[-1])).round().double()


def _normalized(x: Tensor) -> Tensor:
    """log-softmax, with an exact sum."""
    below = x - x.amax(-1, keepdim=True)
    total = weights_reference(below).sum(-1, keepdim=True).log() - weight_bits(x.shape[-1]) * _LN2
    return below - total.to(x.dtype)


def scores_reference(logits: Tensor, filters: Filters) -> Tensor:
    """Guided, penalized and masked logits, float32 (float64 for float64)."""
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    penalized = filters.history is not None and filters.repetition_penalty != 1
    if filters.guidance_scale != 1:
        assert filters.unconditional is not None
        u = filters.unconditional.to(x.dtype)
        if penalized:  # a normalization cancels in a distribution, but not where the sign of a score counts
            x, u = _normalized(x), _normalized(u)
        excluded = (x == -math.inf) | (u == -math.inf)
        x = torch.where(excluded, -math.inf, u + filters.guidance_scale * (x - u))
    if penalized:
        assert filters.history is not None
        vocabulary = x.shape[1]
        ids = torch.where((filters.history >= 0) & (filters.history < vocabulary), filters.history, vocabulary)
        seen = torch.zeros(x.shape[0], vocabulary + 1, dtype=torch.bool, device=x.device).scatter_(1, ids, True)
        penalty = filters.repetition_penalty
        x = torch.where(seen[:, :vocabulary], torch.where(x < 0, x * penalty, x / penalty), x)
    if filters.allowed is not None:
        x = torch.where(filters.allowed, x, -math.inf)
    return x


def _top_p(x: Tensor, weight: Tensor, top_p: float, ties: str) -> Tensor:
    """bool: the largest scores that together have top_p of the weight."""
    # Of equal ones the last comes first: ascending in a stable order, then turned around.
    order = x.sort(dim=-1, stable=True).indices.flip(-1)
    reached = weight.gather(-1, order).cumsum(-1) >= top_p * weight.sum(-1, keepdim=True)
    last = reached.int().argmax(-1, keepdim=True)
    if ties == "keep":
        return x >= x.gather(-1, order.gather(-1, last))
    rank = torch.arange(x.shape[-1], device=x.device).expand_as(x)
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, rank <= last)


def _typical(depth: Tensor, weight: Tensor, typical_p: float) -> Tensor:
    """bool: the tokens whose information is nearest to the entropy and that together have typical_p of the weight."""
    total = weight.sum(-1, keepdim=True)
    depths = torch.where(weight > 0, -depth.double() * weight, 0.0).round().sum(-1, keepdim=True)
    far = (-depth - (depths / total).to(depth.dtype)).abs()
    far = torch.where(weight > 0, far, math.inf)
    order = far.argsort(-1)
    reached = weight.gather(-1, order).cumsum(-1) >= typical_p * total
    last = order.gather(-1, reached.int().argmax(-1, keepdim=True))
    return far <= far.gather(-1, last)


def _filter(x: Tensor, filters: Filters) -> _Kept:
    vocabulary = x.shape[1]
    peak = x.amax(-1, keepdim=True)
    valid = peak.isfinite() & ~x.isnan().any(-1, keepdim=True)
    x, peak = torch.where(valid, x, 0.0), torch.where(valid, peak, 0.0)
    limits = torch.finfo(x.dtype)
    temperature = min(max(filters.temperature, limits.tiny), limits.max)
    depth = (x - peak) / temperature
    weight = weights_reference(depth)
    holds = torch.ones_like(x, dtype=torch.bool)
    if filters.top_k is not None and filters.top_k < vocabulary:
        holds = x >= x.topk(filters.top_k, -1).values[:, -1:]
    if filters.top_p is not None and filters.top_p < 1:
        holds = holds & _top_p(x, torch.where(holds, weight, 0.0), filters.top_p, filters.ties)
    if filters.min_p is not None and filters.min_p > 0:
        holds = holds & (x >= peak + max(temperature * math.log(filters.min_p), -limits.max))
    weight = torch.where(holds, weight, 0.0)
    if filters.typical_p is not None and filters.typical_p < 1:
        holds = _typical(depth, weight, filters.typical_p)
        weight = torch.where(holds, weight, 0.0)
    return _Kept(valid[:, 0], depth, weight, holds, weight_bits(vocabulary))


def sample_reference(
    logits: Tensor, seed: int | Tensor, sample_ids: Tensor, position: int | Tensor, filters: Filters
) -> tuple[Tensor, Tensor]:
    """Token and log-probability, as `sample_logits` returns them."""
    x = scores_reference(logits, filters)
    kept = _filter(x, filters)
    if filters.temperature == 0:
        token, log_prob = torch.where(kept.valid[:, None], x, 0.0).argmax(-1), torch.zeros_like(x[:, 0])
    else:
        token = inverse_reference(kept.weight, uniform_reference(seed, sample_ids, position))
        chosen = kept.depth.gather(-1, token.unsqueeze(-1)).squeeze(-1).double()
        log_prob = (chosen - (kept.weight.sum(-1).log() - kept.bits * _LN2)).to(x.dtype)
    return torch.where(kept.valid, token, -1), torch.where(kept.valid, log_prob, math.nan)


def filter_reference(logits: Tensor, filters: Filters) -> Tensor:
    """log p of what is kept, as `filter_logits` returns it."""
    x = scores_reference(logits, filters)
    kept = _filter(x, filters)
    valid = kept.valid[:, None]
    if filters.temperature == 0:
        greedy = torch.where(valid, x, 0.0).argmax(-1, keepdim=True)
        log_probs = torch.full_like(x, -math.inf).scatter(-1, greedy, 0.0)
    else:
        log_total = (kept.weight.sum(-1, keepdim=True).log() - kept.bits * _LN2).to(x.dtype)
        log_probs = torch.where(kept.holds, kept.depth - log_total, -math.inf)
    return torch.where(valid, log_probs, math.nan)
