"""What `ops.attend_cached` and `ops.append_cached` check of their arguments, and the sentences they refuse with."""

from __future__ import annotations

import torch
from torch import Tensor

from pygen.ops.rotary import Rotary

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CODES = (torch.int8, torch.float8_e4m3fn)


def regular(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    pages: Tensor | None,
) -> bool:
    """Whether `refuse` would find nothing, asked in the order that is quickest for a small call."""
    shape = key_cache.shape
    new = key if query is None else query
    if new is None or new.dim() != 4 or len(shape) != 4 or 0 in shape[1:] or lengths.dim() != 1:
        return False
    batch, block = lengths.shape[0], new.shape[2]
    fresh = (batch, shape[1], block, shape[3])
    return (
        value_cache.shape == shape
        and new.shape[0] == batch
        and new.shape[3] == shape[3]
        and new.shape[1] % shape[1] == 0
        and (key is None) == (value is None)
        and (key is None or value is None or (key.shape == fresh and value.shape == fresh))
        and (pages is not None or shape[0] == batch)
        and (shape[3] == 1 or (key_cache.stride(3) == 1 and value_cache.stride(3) == 1))
        and shared_dimension(key_cache) is None
        and shared_dimension(value_cache) is None
        and shared_dimension(lengths) is None
        and lengths.dtype == torch.int32
        and new.device == key_cache.device == value_cache.device == lengths.device
        and (key is None or value is None or new.device == key.device == value.device)
        and _dtypes_fit(query, key, value, key_cache, value_cache)
    )


def shared_dimension(tensor: Tensor) -> int | None:
    """The first dimension whose elements are one in memory, which nothing changed in place may have."""
    strides = tensor.stride()
    if 0 not in strides:
        return None
    return next((d for d, size in enumerate(tensor.shape) if size > 1 and strides[d] == 0), None)


def _dtypes_fit(query: Tensor | None, key: Tensor | None, value: Tensor | None, *caches: Tensor) -> bool:
    stored = caches[0].dtype
    if stored != caches[1].dtype or stored not in (*_DTYPES, *_CODES):
        return False
    double = stored == torch.float64
    return all(x is None or (x.dtype in _DTYPES and (x.dtype == torch.float64) == double) for x in (query, key, value))


def refuse(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    pages: Tensor | None,
) -> None:
    """Raise the first of the errors, in one sentence."""
    given = {"query": query, "key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None} | {"lengths": lengths}
    if (key is None) != (value is None):
        missing = "key" if key is None else "value"
        raise ValueError(f"{missing} is None, but expected key and value together, or neither")
    name, new = ("key", key) if query is None else ("query", query)
    if new is None or new.dim() != 4:
        shape = None if new is None else tuple(new.shape)
        raise ValueError(f"{name} has shape {shape}, but expected (batch, heads, block, width)")
    batch, heads, block, width = new.shape
    if key_cache.dim() != 4 or 0 in key_cache.shape[1:]:
        raise ValueError(
            f"key_cache has shape {tuple(key_cache.shape)}, but expected (batch, kv_heads, capacity, width), none of "
            "the last three 0"
        )
    first, kv_heads, capacity = key_cache.shape[:3]
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads, but expected a multiple of the {kv_heads} heads of key_cache")
    cache = (batch if pages is None else first, kv_heads, capacity, width)
    expected = {
        "key_cache": cache, "value_cache": cache, "key": (batch, kv_heads, block, width),
        "value": (batch, kv_heads, block, width), "lengths": (batch,),
    }  # fmt: skip
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, but expected {shape}")
    for name, tensor in tensors.items():
        if tensor.device != new.device:
            raise ValueError(f"{name} is on {tensor.device}, but expected {new.device}, where the new tokens are")
    if lengths.dtype != torch.int32:
        raise TypeError(f"lengths has dtype {lengths.dtype}, but expected torch.int32")
    for name in ("key_cache", "value_cache"):
        if width > 1 and tensors[name].stride(3) != 1:
            raise ValueError(
                f"{name} has stride {tensors[name].stride(3)} in its last dimension, but expected 1: it is appended "
                "to in place and never copied"
            )
    for name in ("key_cache", "value_cache", "lengths"):
        shared = shared_dimension(tensors[name])
        if shared is not None:
            raise ValueError(
                f"{name} has stride 0 in dimension {shared}, but expected memory of its own for every element: it is "
                "changed in place"
            )
    dtypes = ", ".join(str(tensor.dtype) for tensor in tensors.values())
    raise TypeError(
        f"{', '.join(tensors)} have dtypes {dtypes}, but expected float32, bfloat16 or float16, or float64 for all, "
        "with both caches alike, of these or of int8 or float8_e4m3fn, and int32 lengths"
    )


def check_options(
    new: Tensor,
    key_cache: Tensor,
    lengths: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    pages: Tensor | None,
    mask: Tensor | None,
    window: int | None,
    sinks: int,
    sink_positions: str,
    rotary: Rotary | None,
) -> Rotary | None:
    """Check what is optional beside new tokens (batch, heads, block, width); the rotary tables as the kernels read
    them."""
    batch, heads, block = new.shape[:3]
    scaled = key_cache.dtype in _CODES
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if (scales is not None) != scaled:
            came = "is None" if scales is None else "was given"
            raise ValueError(f"{name} {came}, but expected it with caches of int8 or float8_e4m3fn, and only with them")
        if scales is None:
            continue
        if scales.shape != key_cache.shape[:3] or scales.dtype != torch.float32:
            raise ValueError(
                f"{name} is {scales.dtype} of shape {tuple(scales.shape)}, but expected torch.float32 of shape "
                f"{tuple(key_cache.shape[:3])}"
            )
        if shared_dimension(scales) is not None:
            raise ValueError(f"{name} has stride 0, but expected memory of its own for every element: it is changed")
    if window is None and sinks:
        raise ValueError(f"sinks is {sinks}, but expected 0 without a window")
    if window is not None and (window < 1 or sinks < 0):
        raise ValueError(f"window is {window} and sinks is {sinks}, but expected at least 1 and at least 0")
    if sink_positions not in ("cache", "absolute"):
        raise ValueError(f"sink_positions is {sink_positions!r}, but expected 'cache' or 'absolute'")
    capacity = key_cache.shape[2]
    if pages is not None:
        if pages.dim() != 2 or pages.shape[0] != batch or pages.dtype != torch.int32:
            raise ValueError(
                f"pages is {pages.dtype} of shape {tuple(pages.shape)}, but expected torch.int32 of shape ({batch}, "
                "pages of a sequence)"
            )
        if capacity & (capacity - 1):
            raise ValueError(f"key_cache has pages of {capacity} tokens, but expected a power of two")
    elif window is not None and capacity < sinks + window + block - 1:
        raise ValueError(
            f"key_cache has a capacity of {capacity}, but expected at least sinks + window + block - 1 = "
            f"{sinks + window + block - 1}"
        )
    if mask is not None:
        full = (batch, heads, block)
        if mask.dim() != 4 or any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=False)):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, but expected ({batch} or 1, {heads} or 1, {block} or 1, "
                "positions)"
            )
        if mask.dtype != torch.bool and mask.dtype not in _DTYPES:
            raise TypeError(f"mask has dtype {mask.dtype}, but expected torch.bool or a floating dtype")
    for name, tensor in (("key_scales", key_scales), ("value_scales", value_scales), ("pages", pages), ("mask", mask)):
        if tensor is not None and tensor.device != lengths.device:
            raise ValueError(f"{name} is on {tensor.device}, but expected {lengths.device}, where lengths is")
    if rotary is None:
        return None
    return _check_rotary(rotary, new, lengths)


def _check_rotary(rotary: Rotary, new: Tensor, lengths: Tensor) -> Rotary:
    batch, _, block, width = new.shape
    cos, sin, positions, _, axes = rotary
    if cos.dim() != 2 or sin.shape != cos.shape or 2 * cos.shape[1] > width:
        raise ValueError(
            f"rotary has cos of shape {tuple(cos.shape)} and sin of shape {tuple(sin.shape)}, but expected both "
            f"(positions, at most {width // 2})"
        )
    if axes not in (1, 2) or cos.shape[1] % axes:
        raise ValueError(f"rotary has {axes} axes and {cos.shape[1]} pairs, but expected 1, or 2 with an even number")
    if positions is not None and (
        positions.shape not in ((batch, block), (1, block)) or positions.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"rotary has positions of {positions.dtype} of shape {tuple(positions.shape)}, but expected int32 or int64 "
            f"of shape ({batch} or 1, {block})"
        )
    for name, tensor in (("cos", cos), ("sin", sin), ("positions", positions)):
        if tensor is not None and tensor.device != lengths.device:
            raise ValueError(f"rotary has {name} on {tensor.device}, but expected {lengths.device}, where lengths is")
    compute = torch.float64 if new.dtype == torch.float64 else torch.float32
    if cos.dtype != compute or sin.dtype != compute or cos.stride(1) != 1 or sin.stride(1) != 1:
        cos, sin = cos.to(compute).contiguous(), sin.to(compute).contiguous()
        return rotary._replace(cos=cos, sin=sin)
    return rotary
