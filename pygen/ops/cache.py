"""Attention over a key/value cache that it appends to: out = softmax(scale q k^T) v over the keys seen so far.

Scaled dot-product attention is Vaswani et al. 2017 (arXiv:1706.03762, eq. 1); groups of query heads share a key/value
head as in Ainslie et al. 2023 (arXiv:2305.13245, section 2.2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pygen import _native

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WIDEST_ON_CUDA = 512


def attend_cached_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """`attend_cached` in plain PyTorch: its specification, its fallback, and the oracle of its tests.

    It reads the whole of the caches and masks what is not valid.
    """
    batch, _, block, width = query.shape
    kv_heads, capacity = key_cache.shape[1:3]
    fits = (lengths >= 0) & (lengths <= capacity - block)  # (batch,)
    slots = lengths.long().unsqueeze(-1) + torch.arange(block, device=query.device)  # (batch, block)
    index = slots.clamp(0, capacity - 1)[:, None, :, None].expand(-1, kv_heads, -1, width)
    for cache, new in ((key_cache, key), (value_cache, value)):
        kept = cache.gather(2, index)
        cache.scatter_(2, index, torch.where(fits[:, None, None, None], new.to(cache.dtype), kept))
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    places = torch.arange(capacity, device=query.device)
    queries = query.to(compute).reshape(batch, kv_heads, -1, block, width)
    scores = torch.einsum("bhgld,bhtd->bhglt", queries, key_cache.to(compute))
    scores = scores * (1 / math.sqrt(width) if scale is None else scale)
    seen = (places <= slots.unsqueeze(-1))[:, None, None]  # (batch, 1, 1, block, capacity)
    probability = scores.masked_fill(~seen, -math.inf).softmax(-1)
    # Past the length a value may be anything, and NaN times a weight of zero is NaN.
    unwritten = (places >= (lengths.unsqueeze(-1) + block))[:, None, :, None]
    values = value_cache.to(compute).masked_fill(unwritten, 0.0)
    out = torch.einsum("bhglt,bhtd->bhgld", probability, values).reshape(query.shape)
    lengths.add_(torch.where(fits, block, 0))
    return torch.where(fits[:, None, None, None], out, math.nan).to(query.dtype)


@_native.register_fake("attend_cached")
def _attend_cached_fake(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


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
    """Append a block of keys and values to a cache in place, and attend to it causally.

    Key i of the block goes to slot lengths[b] + i of sample b; query i sees the slots 0 .. lengths[b] + i; then
    lengths[b] grows by the block. Only valid slots are read. To take tokens back, set `lengths` back: the slots beyond
    are written again, and the same tokens give the same bits.

    Args:
        query: (batch, heads, block, width), any strides; heads is a multiple of kv_heads, and query head h reads
            key/value head h // (heads / kv_heads).
        key, value: (batch, kv_heads, block, width), the block's own, any strides; rounded to the cache's dtype.
        key_cache, value_cache: (batch, kv_heads, capacity, width), the last dimension dense, else any strides;
            changed in place.
        lengths: int32 (batch,), how many slots were valid before; changed in place.
        scale: multiplies query times key; 1 / sqrt(width) by default.

        The dtypes are float32, bfloat16 and float16 in any mixture, or float64 for all; both caches share one.

    Returns:
        (batch, heads, block, width) in query's dtype, contiguous. Arithmetic is in float32 (float64 for float64).
        A sample whose block does not fit (lengths[b] + block > capacity, or lengths[b] < 0) is marked: its output is
        NaN, and its caches and its length stay as they were; check once after a loop.
        A row's bits do not depend on the batch around it or on the number of threads. There is no gradient: all
        arguments count as constants.

    Raises:
        ValueError: for shapes or devices that do not fit, a cache whose last dimension is not dense (a copy would
            defeat the append), or a cache or lengths with elements that share memory (of stride 0, as from `expand`).
        TypeError: for dtypes other than those above.
    """
    shape = key_cache.shape
    if (
        query.dim() != 4
        or len(shape) != 4
        or value_cache.shape != shape
        or key.shape != (shape[0], shape[1], query.shape[2], shape[3])
        or value.shape != key.shape
        or query.shape[0] != shape[0]
        or query.shape[3] != shape[3]
        or 0 in shape[1:]
        or query.shape[1] % shape[1]
        or lengths.shape != shape[:1]
        or (shape[3] > 1 and (key_cache.stride(3) != 1 or value_cache.stride(3) != 1))
        or _shared_dimension(key_cache) is not None
        or _shared_dimension(value_cache) is not None
        or _shared_dimension(lengths) is not None
        or lengths.dtype != torch.int32
        or not query.device == key.device == value.device == key_cache.device == value_cache.device == lengths.device
        or not _dtypes_fit(query.dtype, key.dtype, value.dtype, key_cache.dtype, value_cache.dtype)
    ):
        _refuse(query, key, value, key_cache, value_cache, lengths)
    kernels = _native.kernels_for(query)
    wide = query.device.type == "cuda" and shape[3] > _WIDEST_ON_CUDA
    if _native.wants_gradient(query, key, value, key_cache, value_cache):
        query, key, value, key_cache, value_cache = (
            tensor.detach() for tensor in (query, key, value, key_cache, value_cache)
        )
    if kernels is None or wide:
        return attend_cached_reference(query, key, value, key_cache, value_cache, lengths, scale=scale)
    if scale is None:
        scale = 1 / math.sqrt(shape[3])
    out: Tensor = kernels.attend_cached(query, key, value, key_cache, value_cache, lengths, scale)
    return out


def _shared_dimension(tensor: Tensor) -> int | None:
    """The first dimension whose elements are one in memory, which nothing changed in place may have."""
    strides = tensor.stride()
    if 0 not in strides:
        return None
    return next((d for d, size in enumerate(tensor.shape) if size > 1 and strides[d] == 0), None)


def _dtypes_fit(query: torch.dtype, key: torch.dtype, value: torch.dtype, *caches: torch.dtype) -> bool:
    double = query == torch.float64
    return caches[0] == caches[1] and all(
        dtype in _DTYPES and (dtype == torch.float64) == double for dtype in (query, key, value, *caches)
    )


def _refuse(query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> None:
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}, but expected (batch, heads, block, width)")
    batch, heads, block, width = query.shape
    if key_cache.dim() != 4 or 0 in key_cache.shape[1:]:
        raise ValueError(
            f"key_cache has shape {tuple(key_cache.shape)}, but expected (batch, kv_heads, capacity, width), none of "
            "the last three 0"
        )
    kv_heads, capacity = key_cache.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads, but expected a multiple of the {kv_heads} heads of key_cache")
    expected = {
        "key_cache": (batch, kv_heads, capacity, width), "value_cache": (batch, kv_heads, capacity, width),
        "key": (batch, kv_heads, block, width), "value": (batch, kv_heads, block, width), "lengths": (batch,),
    }  # fmt: skip
    tensors = {
        "query": query, "key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache,
        "lengths": lengths,
    }  # fmt: skip
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, but expected {shape}")
    for name, tensor in tensors.items():
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, but expected {query.device}, where query is")
    if lengths.dtype != torch.int32:
        raise TypeError(f"lengths has dtype {lengths.dtype}, but expected torch.int32")
    for name in ("key_cache", "value_cache"):
        if width > 1 and tensors[name].stride(3) != 1:
            raise ValueError(
                f"{name} has stride {tensors[name].stride(3)} in its last dimension, but expected 1: it is appended "
                "to in place and never copied"
            )
    for name in ("key_cache", "value_cache", "lengths"):
        shared = _shared_dimension(tensors[name])
        if shared is not None:
            raise ValueError(
                f"{name} has stride 0 in dimension {shared}, but expected memory of its own for every element: it is "
                "changed in place"
            )
    dtypes = ", ".join(str(tensor.dtype) for tensor in tensors.values())
    raise TypeError(
        f"query, key, value, key_cache, value_cache and lengths have dtypes {dtypes}, but expected float32, bfloat16 "
        "or float16, or float64 for all, with both caches alike, and int32 lengths"
    )
