"""Attention over a key/value cache that it appends to: out = softmax(scale q k^T) v over the keys seen so far.

Scaled dot-product attention is Vaswani et al. 2017 (arXiv:1706.03762, eq. 1); groups of query heads share a key/value
head as in Ainslie et al. 2023 (arXiv:2305.13245, section 2.2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend_cached_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """`attend_cached` in plain PyTorch; it reads the whole of the caches and masks what is not valid."""
    batch, heads, block, width = query.shape
    kv_heads, capacity = key_cache.shape[1:3]
    fits = (lengths >= 0) & (lengths <= capacity - block)  # (batch,)
    slots = lengths.long().unsqueeze(-1) + torch.arange(block, device=query.device)  # (batch, block)
    index = slots.clamp(0, capacity - 1)[:, None, :, None].expand(-1, kv_heads, -1, width)
    for cache, new in ((key_cache, key), (value_cache, value)):
        kept = cache.gather(2, index)
        cache.scatter_(2, index, torch.where(fits[:, None, None, None], new.to(cache.dtype), kept))
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    places = torch.arange(capacity, device=query.device)
    unwritten = (places >= (lengths.unsqueeze(-1) + block))[:, None, :, None]
    keys = key_cache.to(compute)
    values = value_cache.to(compute).masked_fill(unwritten, 0.0)  # what lies past the length may be NaN
    queries = query.to(compute).reshape(batch, kv_heads, -1, block, width)
    scores = torch.einsum("bhgld,bhtd->bhglt", queries, keys) * scale
    seen = (places <= slots.unsqueeze(-1))[:, None, None]  # (batch, 1, 1, block, capacity)
    probability = scores.masked_fill(~seen, -math.inf).softmax(-1)
    out = torch.einsum("bhglt,bhtd->bhgld", probability, values).reshape(query.shape)
    lengths.add_(torch.where(fits, block, 0))
    return torch.where(fits[:, None, None, None], out, math.nan).to(query.dtype)


def attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Append key and value to the caches at `lengths`, attend causally, advance `lengths`; (batch, heads, block, width)."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    with torch.no_grad():
        return attend_cached_reference(query, key, value, key_cache, value_cache, lengths, scale)
