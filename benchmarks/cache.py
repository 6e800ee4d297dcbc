"""Cached attention, one query on a long context, against PyTorch's scaled dot-product attention and torch.compile; then
with each of the ways to keep fewer bytes, in pages, and with the rotary embedding in the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Case, compiled
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pygen import ops
from pygen.ops.cache_reference import quantize

try:
    from flash_attn import flash_attn_with_kvcache
except ModuleNotFoundError:
    flash_attn_with_kvcache = None

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def eager(query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, length: int) -> Tensor:
    """What a static cache does: write the new slots, attend to the valid part."""
    end = length + key.shape[2]
    key_cache[:, :, length:end] = key
    value_cache[:, :, length:end] = value
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key_cache[:, :, :end], value_cache[:, :, :end], enable_gqa=grouped)


def formula(query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, length: int) -> Tensor:
    """The same from matrix products, for the compiler to fuse."""
    end = length + key.shape[2]
    key_cache[:, :, length:end] = key
    value_cache[:, :, length:end] = value
    batch, kv_heads = key.shape[:2]
    packed = query.reshape(batch, kv_heads, -1, query.shape[3])
    scores = packed @ key_cache[:, :, :end].transpose(2, 3) * query.shape[3] ** -0.5
    return (scores.float().softmax(-1).to(query.dtype) @ value_cache[:, :, :end]).reshape(query.shape)


def flash(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor
) -> Callable[[], Tensor]:
    """flash-attention's own call for it, which appends too, on tensors in its order: (batch, length, heads, width)."""
    query, key, value, key_cache, value_cache = (
        x.transpose(1, 2).contiguous() for x in (query, key, value, key_cache, value_cache)
    )  # fmt: skip
    return lambda: flash_attn_with_kvcache(
        query, key_cache, value_cache, key, value, cache_seqlens=lengths, causal=True
    )  # fmt: skip


def decoded(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor
) -> Tensor:
    """What a quantized cache does in PyTorch: decode all of it, join the new token, attend."""
    key = torch.cat(((keys.to(key.dtype) * key_scales.to(key.dtype).unsqueeze(-1))[:, :, :-1], key), 2)
    value = torch.cat(((values.to(key.dtype) * value_scales.to(key.dtype).unsqueeze(-1))[:, :, :-1], value), 2)
    return scaled_dot_product_attention(query, key, value)


def gathered(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, pages: Tensor) -> Tensor:
    """Pages in PyTorch: write the new token, join the pages of each sequence, attend."""
    for cache, new in ((keys, key), (values, value)):
        cache[pages[:, -1], :, -1] = new[:, :, 0]
    joined = (cache[pages].transpose(1, 2).flatten(2, 3) for cache in (keys, values))
    return scaled_dot_product_attention(query, *joined)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding as transformers writes it, of whole-width tables."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def cases(device: torch.device) -> Iterator[Case]:
    """Batches, widths, groups of heads, dtypes; and a short context, where the call itself is what costs."""
    shapes = [
        (1, 8, 8, 64, 4096, torch.bfloat16), (8, 8, 8, 64, 4096, torch.bfloat16), (1, 8, 8, 128, 4096, torch.bfloat16),
        (8, 8, 8, 128, 4096, torch.bfloat16), (8, 8, 2, 128, 4096, torch.bfloat16), (8, 8, 8, 64, 4096, torch.float16),
        (8, 8, 8, 64, 4096, torch.float32), (1, 8, 8, 64, 64, torch.float32),
    ]  # fmt: skip
    for batch, heads, kv_heads, width, context, dtype in shapes:
        query, key, value, *caches = tensors(batch, heads, kv_heads, width, context, dtype, device)
        lengths, full = counters(batch, context, device)

        def ours(inputs=(query, key, value, *caches), lengths=lengths, full=full) -> Tensor:
            lengths.copy_(full)
            return ops.attend_cached(*inputs, lengths)

        def rival(function, inputs=(query, key, value, *caches), length=context - 1):
            return lambda: function(*inputs, length)

        rivals = {
            "SDPA": rival(eager), "SDPA compiled": rival(compiled(eager)), "formula compiled": rival(compiled(formula))
        }  # fmt: skip
        targets = {"SDPA": 8.0 if device.type == "cpu" else 1.0, "SDPA compiled": 1.0, "formula compiled": 1.0}
        if flash_attn_with_kvcache is not None and device.type == "cuda" and dtype != torch.float32:
            rivals["flash-attention"] = flash(query, key, value, *caches, full)
            targets["flash-attention"] = 1.0
        yield Case(
            f"attend, {str(dtype).removeprefix('torch.')}", f"{batch}x{heads}/{kv_heads}, {context}x{width}", ours,
            rivals, 2 * caches[0].numel() * caches[0].element_size(), targets if dtype == torch.bfloat16 else {},
        )  # fmt: skip
    yield from fewer_bytes(device)
    yield rotary(device)


def tensors(
    batch: int, heads: int, kv_heads: int, width: int, context: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """query, key, value, key_cache, value_cache."""
    shapes = [(heads, 1), (kv_heads, 1), (kv_heads, 1), (kv_heads, context), (kv_heads, context)]
    return [torch.randn(batch, count, places, width, device=device).to(dtype) for count, places in shapes]


def counters(batch: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lengths to be used up by a call, and what they begin with."""
    full = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
    return full.clone(), full


def call(inputs: list[Tensor], context: int, **options: Any) -> Any:
    """A call of ours at a full cache, again and again."""
    lengths, full = counters(inputs[0].shape[0], context, inputs[0].device)

    def ours() -> Tensor:
        lengths.copy_(full)
        return ops.attend_cached(*inputs, lengths, **options)

    return ours


def fewer_bytes(device: torch.device) -> Iterator[Case]:
    """8-bit storage, pages, and a window with sinks, in bfloat16; "plain" is ours without it."""
    batch, heads, width, context = 8, 8, 128, 4096
    inputs = tensors(batch, heads, heads, width, context, torch.bfloat16, device)
    plain, shape = call(inputs, context), f"{batch}x{heads}/{heads}, {context}x{width}"
    for name, dtype in CODES.items():
        (keys, key_scales), (values, value_scales) = (quantize(cache.float(), dtype) for cache in inputs[3:])
        kept = [*inputs[:3], keys, values]
        scales = {"key_scales": key_scales, "value_scales": value_scales}

        def rival(function, kept=kept, scales=scales):
            return lambda: function(*kept, *scales.values())

        rivals = {"plain": plain, "decode + SDPA": rival(decoded), "decode + SDPA compiled": rival(compiled(decoded))}
        yield Case(
            f"attend, {name}", shape, call(kept, context, **scales), rivals,
            2 * keys.numel() + 2 * 4 * key_scales.numel(), {"plain": 1.2, "decode + SDPA compiled": 1.0},
        )  # fmt: skip

    size = 16
    count = batch * context // size
    pages = torch.randperm(count, device=device).int().view(batch, -1)
    pools = [torch.empty(count, heads, size, width, dtype=torch.bfloat16, device=device) for _ in range(2)]
    for pool, cache in zip(pools, inputs[3:], strict=True):
        pool[pages.long()] = cache.unflatten(2, (-1, size)).transpose(1, 2)
    paged = [*inputs[:3], *pools]
    joined, long_pages = compiled(gathered), pages.long()
    yield Case(
        f"attend, pages of {size}", shape, call(paged, context, pages=pages),
        {
            "plain": plain,
            "gather + SDPA": lambda: gathered(*paged, long_pages),
            "gather + SDPA compiled": lambda: joined(*paged, long_pages),
        },
        2 * pools[0].numel() * 2, {"gather + SDPA compiled": 1.0},
    )  # fmt: skip

    window, sinks = 1020, 4
    ring = [*inputs[:3], *(cache[:, :, : window + sinks].contiguous() for cache in inputs[3:])]
    yield Case(
        f"attend, window {window} + {sinks}", shape, call(ring, 100_000, window=window, sinks=sinks),
        {"plain": plain, "SDPA on a ring": lambda: eager(*ring, window + sinks - 1)},
        2 * ring[3].numel() * 2, {"SDPA on a ring": 8.0},
    )  # fmt: skip


def rotary(device: torch.device) -> Case:
    """Rotary embedding in the call against one before it."""
    batch, heads, kv_heads, width, context = 8, 32, 8, 128, 512
    inputs = tensors(batch, heads, kv_heads, width, context, torch.bfloat16, device)
    cos, sin = ops.rotary_tables(context, width, device=device)
    row = [torch.cat((table[-1:], table[-1:]), -1).to(torch.bfloat16) for table in (cos, sin)]
    alone = call(inputs, context)
    lengths, full = counters(batch, context, device)

    def before(turn) -> Tensor:
        lengths.copy_(full)
        query, key = turn(inputs[0], *row), turn(inputs[1], *row)
        return ops.attend_cached(query, key, *inputs[2:], lengths)

    fast = compiled(rotated)
    return Case(
        "attend, rotary in the call", f"{batch}x{heads}/{kv_heads}, {context}x{width}",
        call(inputs, context, rotary=ops.Rotary(cos, sin)),
        {
            "eager rotary before": lambda: before(rotated),
            "compiled rotary before": lambda: before(fast),
            "no rotary": alone,
        },
        2 * inputs[3].numel() * 2, {"eager rotary before": 1.0, "compiled rotary before": 1.0},
    )  # fmt: skip
