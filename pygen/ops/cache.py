"""Attention over a key/value cache that it appends to: out = softmax(scale q k^T) v over the keys seen so far.

Scaled dot-product attention is Vaswani et al. 2017 (arXiv:1706.03762, eq. 1); groups of query heads share a key/value
head as in Ainslie et al. 2023 (arXiv:2305.13245, section 2.2); sinks are Xiao et al. 2023 (arXiv:2309.17453), and pages
Kwon et al. 2023 (arXiv:2309.06180).
"""

from __future__ import annotations

import math

from torch import Tensor

from pygen import _native
from pygen.ops.cache_checks import check_options, refuse, regular
from pygen.ops.cache_reference import append_cached_reference, attend_cached_reference
from pygen.ops.rotary import Rotary

_WIDEST_ON_CUDA = 512
_NO_ROTARY = (None, None, None, False, 1)


@_native.register_fake("attend_cached")
def _attend_cached_fake(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


@_native.register_fake("append_cached")
def _append_cached_fake(*_: object) -> None:
    return None


def attend_cached(
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
    """Append a block of keys and values to a cache in place, and attend to it.

    Key i of the block becomes the token at position lengths[b] + i of sample b; query i sees the positions
    0 .. lengths[b] + i; then lengths[b] grows by the block. Only valid places are read. To take tokens back, set
    `lengths` back: the places beyond are written again, and the same tokens give the same bits.

    Args:
        query: (batch, heads, block, width), any strides; heads is a multiple of kv_heads, and query head h reads
            key/value head h // (heads / kv_heads).
        key, value: (batch, kv_heads, block, width), the block's own, any strides; rounded to the cache's dtype. None,
            both, where the block is among the `lengths` tokens already: then nothing is written.
        key_cache, value_cache: (batch, kv_heads, capacity, width), the last dimension dense, else any strides;
            changed in place. With `pages`, (pages, kv_heads, page size, width), the page size a power of two.
        lengths: int32 (batch,), how many tokens were in before; changed in place.
        scale: multiplies query times key; 1 / sqrt(width) by default.
        key_scales, value_scales: float32, the shape of the caches without their width: with caches of int8 or
            float8_e4m3fn, whose rows are kept as codes times one scale each, read as they are by the attention.
            int8 is off by at most half a scale, float8 by at most 1/16 of an element or 2^-10 scales; a scale is the
            row's largest |element| / 127 or / 448, and NaN for a row that is not finite. (One a row: rows that are in
            stay as they are, and it multiplies a score or a weight instead of `width` elements.)
        pages: int32 (batch, pages of a sequence): position p of sample b is in place p mod page size of page
            pages[b, p // page size]. Samples may share pages that no block is appended to.
        mask: bool (True is seen) or floating (added to the scaled scores; -inf is not seen), (batch or 1, heads or 1,
            block or 1, positions), any strides; positions past its last column are not seen. Beside the other limits.
        causal: False lets each token of the block see the whole block.
        window: how many of the last tokens, its own included, a token sees; by default all. Past its capacity an
            unpaged cache then goes round the places behind the sinks: it holds at least
            sinks + window + block - 1 tokens and is never full.
        sinks: how many of the first tokens a token sees besides the window.
        sink_positions: where the rotary embedding has the sinks: in the "cache", as neighbours of the window, as Xiao
            et al. have it (a query stands at most sinks + window - 1 places behind the first of them, however long
            the stream); or "absolute", where they were.
        rotary: turns query and key by their positions; the cache holds turned keys.

        The floating dtypes are float32, bfloat16 and float16 in any mixture, or float64 for all; caches share one.

    Returns:
        (batch, heads, block, width) in query's dtype, contiguous. Arithmetic is in float32 (float64 for float64). A
        token that sees nothing gets 0. A sample whose block does not fit (lengths[b] + block > capacity, lengths[b] <
        0, a page that does not exist, no row in the rotary table) is marked: its output is NaN, and its caches and its
        length stay as they were; check once after a loop.
        A row's bits do not depend on the batch around it or on the number of threads. There is no gradient: all
        arguments count as constants.

    Raises:
        ValueError: for shapes or devices that do not fit, a cache whose last dimension is not dense (a copy would
            defeat the append), or a cache or lengths with elements that share memory (of stride 0, as from `expand`).
        TypeError: for dtypes other than those above.
    """
    if not regular(query, key, value, key_cache, value_cache, lengths, pages):
        refuse(query, key, value, key_cache, value_cache, lengths, pages)
    if key_scales is not None or pages is not None or mask is not None or window is not None or sinks or rotary:
        rotary = check_options(
            query, key_cache, lengths, key_scales, value_scales, pages, mask, window, sinks, sink_positions, rotary
        )
    elif key_cache.element_size() == 1 or value_scales is not None:
        check_options(query, key_cache, lengths, None, value_scales, None, None, None, 0, sink_positions, None)
    kernels = _native.kernels_for(query)
    wide = query.device.type == "cuda" and query.shape[3] > _WIDEST_ON_CUDA
    if _native.wants_gradient(query, key, value, key_cache, value_cache, mask):
        query, key_cache, value_cache = query.detach(), key_cache.detach(), value_cache.detach()
        key, value, mask = (None if x is None else x.detach() for x in (key, value, mask))
    if kernels is None or wide:
        return attend_cached_reference(
            query, key, value, key_cache, value_cache, lengths, scale=scale, key_scales=key_scales,
            value_scales=value_scales, pages=pages, mask=mask, causal=causal, window=window, sinks=sinks,
            sink_positions=sink_positions, rotary=rotary,
        )  # fmt: skip
    if scale is None:
        scale = 1 / math.sqrt(query.shape[3])
    out: Tensor = kernels.attend_cached(
        query, key, value, key_cache, value_cache, lengths, scale, key_scales, value_scales, pages, mask,
        *(_NO_ROTARY if rotary is None else rotary), sink_positions == "cache", causal, window or 0, sinks,
    )  # fmt: skip
    return out


def append_cached(
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
    """Append a block of keys and values to a cache in place, as `attend_cached` does, without attending.

    The arguments, what marks a sample (its cache and its length stay as they were), and the errors are those of
    `attend_cached`.
    """
    if not regular(None, key, value, key_cache, value_cache, lengths, pages):
        refuse(None, key, value, key_cache, value_cache, lengths, pages)
    rotary = check_options(
        key, key_cache, lengths, key_scales, value_scales, pages, None, window, sinks, "cache", rotary
    )
    if _native.wants_gradient(key, value, key_cache, value_cache):
        key, value, key_cache, value_cache = (x.detach() for x in (key, value, key_cache, value_cache))
    kernels = _native.kernels_for(key)
    if kernels is None:
        append_cached_reference(
            key, value, key_cache, value_cache, lengths, key_scales=key_scales, value_scales=value_scales, pages=pages,
            window=window, sinks=sinks, rotary=rotary,
        )  # fmt: skip
        return
    kernels.append_cached(
        key, value, key_cache, value_cache, lengths, key_scales, value_scales, pages,
        *(_NO_ROTARY if rotary is None else rotary), window or 0, sinks,
    )  # fmt: skip
