"""Cached attention, one query on a long context, against PyTorch's scaled dot-product attention and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measure import Case, compiled
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pygen import ops


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


def cases(device: torch.device) -> Iterator[Case]:
    """Batches, widths, groups of heads, dtypes; and a short context, where the call itself is what costs."""
    shapes = [
        (1, 8, 8, 64, 4096, torch.bfloat16), (8, 8, 8, 64, 4096, torch.bfloat16), (1, 8, 8, 128, 4096, torch.bfloat16),
        (8, 8, 8, 128, 4096, torch.bfloat16), (8, 8, 2, 128, 4096, torch.bfloat16), (8, 8, 8, 64, 4096, torch.float16),
        (8, 8, 8, 64, 4096, torch.float32), (1, 8, 8, 64, 64, torch.float32),
    ]  # fmt: skip
    for batch, heads, kv_heads, width, context, dtype in shapes:
        query = torch.randn(batch, heads, 1, width, device=device).to(dtype)
        key, value = (torch.randn(batch, kv_heads, 1, width, device=device).to(dtype) for _ in range(2))
        caches = [torch.randn(batch, kv_heads, context, width, device=device).to(dtype) for _ in range(2)]
        full = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
        lengths = full.clone()

        def ours(inputs=(query, key, value, *caches), lengths=lengths, full=full) -> Tensor:
            lengths.copy_(full)
            return ops.attend_cached(*inputs, lengths)

        def rival(function, inputs=(query, key, value, *caches), length=context - 1):
            return lambda: function(*inputs, length)

        yield Case(
            f"attend, {str(dtype).removeprefix('torch.')}", f"{batch}x{heads}/{kv_heads}, {context}x{width}", ours,
            {
                "SDPA": rival(eager),
                "SDPA compiled": rival(compiled(eager)),
                "formula compiled": rival(compiled(formula)),
            },
            2 * caches[0].numel() * caches[0].element_size(),
            {"SDPA": 4.0, "SDPA compiled": 1.0, "formula compiled": 1.0} if dtype == torch.bfloat16 else {},
        )  # fmt: skip
