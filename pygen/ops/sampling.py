"""One token per row from logits, addressed by (seed, sample id, position): token = min{j : c_j > u c_V}.

c is the cumulative sum, in index order, of the weights exp((logit - max) / temperature) that top-k and top-p keep, and
u is uniform in [0, 1) from Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
Top-k: Fan et al. 2018, arXiv:1805.04833. Top-p: Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TOKEN_STREAM = 2  # the top two bits of `draw`: 0 normal, 1 uniform, 2 token
_MAX_POSITION = 1 << 30


def _uniform(seed: Tensor, sample_ids: Tensor, position: Tensor) -> Tensor:
    """Float64 uniform in [0, 1) with 53 random bits; int64 arguments broadcast."""
    mask = 0xFFFFFFFF
    seed, sample_ids, position = torch.broadcast_tensors(seed, sample_ids, position)
    counter = [
        torch.zeros_like(sample_ids),
        (position & (_MAX_POSITION - 1)) | (_TOKEN_STREAM << 30),
        sample_ids & mask,
        (sample_ids >> 32) & mask,
    ]
    key0, key1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            ((second >> 32) & mask) ^ counter[1] ^ key0,
            second & mask,
            ((first >> 32) & mask) ^ counter[3] ^ key1,
            first & mask,
        ]
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return ((counter[0] >> 5) * (1 << 26) + (counter[1] >> 6)).double() * 2.0**-53


def sample_logits_reference(
    logits: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    position: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_logits` in plain PyTorch, by sorting; seed and position are int64 tensors that broadcast with (rows,)."""
    rows, vocabulary = logits.shape
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    peak = x.amax(-1, keepdim=True)
    valid = peak.isfinite() & ~x.isnan().any(-1, keepdim=True)  # +inf, NaN and rows of -inf are not distributions
    x = torch.where(valid, x, 0.0)
    peak = torch.where(valid, peak, 0.0)
    if temperature == 0:
        token = x.argmax(-1)
        log_prob = torch.zeros_like(peak[:, 0])
    else:
        limits = torch.finfo(x.dtype)
        shifted = (x - peak) / min(max(temperature, limits.tiny), limits.max)
        # Weights are rounded to multiples of 2^-bits: their float64 sums are then exact, hence the same in any order.
        bits = min(53 - vocabulary.bit_length(), 48)
        weight = (shifted.exp() * 2.0**bits).round().double()
        if top_k is not None and top_k < vocabulary:
            weight = torch.where(x >= x.topk(top_k, -1).values[:, -1:], weight, 0.0)
        if top_p is not None and top_p < 1:
            order = x.argsort(-1, descending=True)
            reached = weight.gather(-1, order).cumsum(-1) >= top_p * weight.sum(-1, keepdim=True)
            last = reached.int().argmax(-1, keepdim=True)
            weight = torch.where(x >= x.gather(-1, order.gather(-1, last)), weight, 0.0)
        cumulative = weight.cumsum(-1)
        total = cumulative[:, -1]
        target = torch.minimum(_uniform(seed, sample_ids, position) * total, total - 1)
        token = (cumulative > target.unsqueeze(-1)).int().argmax(-1)
        log_prob = shifted.gather(-1, token.unsqueeze(-1)).squeeze(-1).double() - (total.log() - bits * math.log(2.0))
        log_prob = log_prob.to(x.dtype)
    valid = valid[:, 0]
    return torch.where(valid, token, -1), torch.where(valid, log_prob, math.nan)


def _per_row(value: int | Tensor, name: str, rows: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {value.dtype}, but expected an int or an int64 tensor")
        if value.dim() > 1 or value.numel() not in (1, rows):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but expected () or ({rows},)")
        return value
    return torch.tensor(value, device=device)


def sample_logits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    position: int | Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row: (token int64 (rows,), log_prob (rows,))."""
    rows = logits.shape[0]
    return sample_logits_reference(
        logits.detach(),
        _per_row(seed, "seed", rows, logits.device),
        sample_ids,
        _per_row(position, "position", rows, logits.device),
        temperature,
        top_k,
        top_p,
    )
