"""Cached attention in plain PyTorch: the specification of `ops.attend_cached` and `ops.append_cached`, their fallback,
and the oracle of their tests. It gathers every token that a block may see, and masks what a token does not."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pygen.ops.rotary import Rotary, turn

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x float32 (..., width) as codes of an 8-bit dtype and their scales (...): x is about codes * scale.

    A scale is the largest |x| of a row over the largest code: int8 is off by at most half a scale, and float8_e4m3fn by
    at most |x| / 16, or 2^-10 scales where that is more. A row that is not finite has a scale of NaN; a row too small
    for a scale of normal size is kept as 0.
    """
    largest = x.abs().amax(-1)
    scale = largest / torch.full_like(largest, LARGEST_CODE[dtype])
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    scale = torch.where(largest.isfinite(), scale, math.nan)
    codes = torch.where(scale.unsqueeze(-1) > 0, x / scale.unsqueeze(-1), 0.0)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


@dataclasses.dataclass
class _Block:
    """Where a block of new tokens stands in the cache."""

    before: Tensor  # (batch,), tokens before the block
    fits: Tensor  # (batch,)
    appended: bool
    rows: Tensor  # (batch, block), rows of the rotary table


@dataclasses.dataclass
class _Cache:
    keys: Tensor
    values: Tensor
    lengths: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    pages: Tensor | None
    window: int | None
    sinks: int

    @property
    def capacity(self) -> int:
        return self.keys.shape[2] * (1 if self.pages is None else self.pages.shape[1])

    def locate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The index along the caches' first dimension and the place along their third of positions (batch, n)."""
        if self.pages is not None:
            size = self.keys.shape[2]
            page = self.pages.long().gather(1, (positions // size).clamp(0, self.pages.shape[1] - 1))
            return page.clamp(0, self.keys.shape[0] - 1), positions % size
        batch = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1).expand_as(positions)
        if self.window is not None:
            turn_length = self.capacity - self.sinks
            behind = self.sinks + (positions - self.sinks) % max(turn_length, 1)
            positions = torch.where(positions < self.capacity, positions, behind)
        return batch, positions.clamp(0, self.capacity - 1)

    def visible(self, block: _Block, size: int) -> Tensor:
        """Positions (batch, n) among which are all that a block of `size` tokens sees."""
        if self.window is None:
            return torch.arange(self.capacity, device=self.lengths.device).expand(self.lengths.shape[0], -1)
        start = (block.before - self.window + 1).clamp(min=self.sinks).unsqueeze(1)
        rest = start + torch.arange(self.window + size - 1, device=start.device)
        return torch.cat((torch.arange(self.sinks, device=start.device).expand(len(start), -1), rest), 1)

    def enter(self, size: int, appended: bool, rotary: Rotary | None) -> _Block:
        before = self.lengths.long() - (0 if appended else size)
        slots = before.unsqueeze(1) + torch.arange(size, device=before.device)
        fits = before >= 0
        if self.window is None or self.pages is not None:
            fits = fits & (before + size <= self.capacity)
        rows = slots
        if rotary is not None:
            if rotary.positions is not None:
                rows = rotary.positions.long().expand(slots.shape)
            fits = fits & ((rows >= 0) & (rows < rotary.cos.shape[0])).all(1)
            rows = rows.clamp(0, rotary.cos.shape[0] - 1)
        block = _Block(before, fits, appended, rows)
        if self.pages is not None:
            seen = self.visible(block, size)
            needed = torch.cat((seen, slots), 1)
            page = self.pages.long().gather(1, (needed // self.keys.shape[2]).clamp(0, self.pages.shape[1] - 1))
            exists = (page >= 0) & (page < self.keys.shape[0])
            block.fits = fits & (exists | (needed >= before.unsqueeze(1) + size)).all(1)
        return block

    def append(self, key: Tensor, value: Tensor, rotary: Rotary | None) -> _Block:
        size = key.shape[2]
        block = self.enter(size, True, rotary)
        first, place = self.locate(block.before.unsqueeze(1) + torch.arange(size, device=key.device))
        if rotary is not None:
            key = turn(key.to(_compute(key)), rotary, block.rows)
        for cache, scales, new in ((self.keys, self.key_scales, key), (self.values, self.value_scales, value)):
            if scales is not None:
                codes, scale = quantize(new.float(), cache.dtype)
                self._put(scales, first, place, scale, block.fits)
                new = codes
            self._put(cache, first, place, new.to(cache.dtype), block.fits)
        self.lengths.add_(torch.where(block.fits, size, 0))
        return block

    def _put(self, target: Tensor, first: Tensor, place: Tensor, new: Tensor, fits: Tensor) -> None:
        """new (batch, heads, block, ...) where it fits."""
        new = new.transpose(1, 2)  # (batch, block, heads, ...)
        if target.dtype == torch.float8_e4m3fn:
            target, new = target.view(torch.int8), new.view(torch.int8)
        if self.pages is not None:
            # Another row may own the pages that stand in for those that a row lacks.
            target[first[fits], :, place[fits]] = new[fits]
        else:
            kept = target[first, :, place]
            fits = fits.view(-1, *(1 for _ in range(new.dim() - 1)))
            target[first, :, place] = torch.where(fits, new, kept)

    def read(self, cache: Tensor, scales: Tensor | None, positions: Tensor, compute: torch.dtype) -> Tensor:
        """(batch, heads, n, width), decoded."""
        first, place = self.locate(positions)
        if scales is None:
            return cache[first, :, place].to(compute).transpose(1, 2)
        codes = cache.view(torch.int8)[first, :, place].view(cache.dtype).to(compute)
        return (codes * scales[first, :, place].unsqueeze(-1)).transpose(1, 2)


def append_cached_reference(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    pages: Tensor | None = None,
    window: int | None = None,
    sinks: int = 0,
    rotary: Rotary | None = None,
) -> None:
    """`append_cached` in plain PyTorch."""
    _Cache(key_cache, value_cache, lengths, key_scales, value_scales, pages, window, sinks).append(key, value, rotary)


def attend_cached_reference(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    pages: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    sink_positions: str = "cache",
    rotary: Rotary | None = None,
) -> Tensor:
    """`attend_cached` in plain PyTorch."""
    heads, size, width = query.shape[1:]
    kv_heads = key_cache.shape[1]
    cache = _Cache(key_cache, value_cache, lengths, key_scales, value_scales, pages, window, sinks)
    if key is not None and value is not None:
        block = cache.append(key, value, rotary)
    else:
        block = cache.enter(size, False, rotary)
    compute = _compute(query)
    positions = cache.visible(block, size)  # (batch, n)
    token = block.before.unsqueeze(1) + torch.arange(size, device=query.device)  # (batch, block)
    end = token + 1 if causal else (block.before + size).unsqueeze(1).expand_as(token)
    at = positions[:, None]
    seen = at < end[:, :, None]  # (batch, block, n)
    if window is not None:
        seen = seen & ((at > token[:, :, None] - window) | (at < sinks))
    seen = seen.unsqueeze(1)  # (batch, 1, block, n)
    bias = None
    if mask is not None:
        seen, bias = _masked(mask, seen, positions, heads)
    seen = seen.expand(-1, heads, -1, -1).unflatten(1, (kv_heads, -1))

    keys = cache.read(key_cache, key_scales, positions, compute)
    queries = query.to(compute)
    scores = _scores(queries if rotary is None else turn(queries, rotary, block.rows), keys)
    if rotary is not None and window is not None and sinks and sink_positions == "cache":
        dropped = (token - (sinks + window - 1)).clamp(min=0)
        to_sinks = _scores(turn(queries, rotary, (block.rows - dropped).clamp(min=0)), keys)
        scores = torch.where((positions < sinks)[:, None, None, None], to_sinks, scores)
    scores = scores * (1 / math.sqrt(width) if scale is None else scale)
    if bias is not None:
        scores = scores + bias.to(compute).expand(-1, heads, -1, -1).unflatten(1, (kv_heads, -1))
        seen = seen & (scores != -math.inf)
    scores = scores.masked_fill(~seen, -math.inf)
    probability = torch.where(seen.any(-1, keepdim=True), scores, 0.0).softmax(-1).masked_fill(~seen, 0.0)
    # What no token sees may be anything, and NaN times a weight of zero is NaN.
    values = cache.read(value_cache, value_scales, positions, compute)
    values = values.masked_fill(~seen.any(2).any(2).unsqueeze(-1), 0.0)
    out = torch.einsum("bhglt,bhtd->bhgld", probability, values).reshape(query.shape)
    return torch.where(block.fits[:, None, None, None], out, math.nan).to(query.dtype)


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.einsum("bhgld,bhtd->bhglt", queries.unflatten(1, (keys.shape[1], -1)), keys)


def _masked(mask: Tensor, seen: Tensor, positions: Tensor, heads: int) -> tuple[Tensor, Tensor | None]:
    """What is seen, and what is added to the scores, both (batch, heads or 1, block, n)."""
    columns = mask.shape[3]
    index = positions.clamp(max=max(columns - 1, 0))[:, None, None]
    batch, block = seen.shape[0], seen.shape[2]
    if columns == 0:
        return torch.zeros_like(seen), None
    chosen = mask.expand(batch, -1, block, -1)
    chosen = chosen.gather(3, index.expand(-1, chosen.shape[1], block, -1))
    seen = seen & (positions < columns)[:, None, None]
    if mask.dtype == torch.bool:
        return seen & chosen, None
    return seen & (chosen != -math.inf), chosen
