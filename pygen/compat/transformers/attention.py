"""Attention in transformers' interface, over the layers of pygen's caches: the implementation "pygen".

`model.set_attn_implementation("pygen")` chooses it; `patch()` puts it beneath "sdpa". Keys that no pygen cache holds go
to transformers' own function for scaled dot-product attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pygen.compat.transformers.held import Held

NAME = "pygen"

# First blocks at least so long are products of matrices, which PyTorch's attention is quicker at on a GPU.
FIRST_BLOCK = 16
# Arguments that change the scores, or want them.
_SPECIAL = ("position_bias", "softcap", "s_aux", "cache")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Attend to what a layer holds, and append the block that waits there, in one call.

    query: (batch, heads, block, width). key, value: what the layer's `update` returned, or tensors of any origin,
        (batch, kv_heads, length, width). attention_mask: None, or (batch or 1, heads or 1, block, length).

    Returns (batch, block, heads, width) and None, as transformers expects it.
    """

    def as_they_are(key: Tensor, value: Tensor) -> Any:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )

    if (
        type(key) is not Held
        or dropout
        or query.requires_grad
        or any(kwargs.get(name) is not None for name in _SPECIAL)
    ):
        return as_they_are(key, value)
    layer = key.reading.layer
    block = query.shape[2]
    # In a ring, too, where the model's mask may show a token what comes behind it (pictures in a prompt).
    if block >= FIRST_BLOCK and layer.sees_all(block) and (layer.is_sliding or query.device.type != "cpu"):
        first = layer.take_first()
        if first is not None:
            return as_they_are(*first)
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return layer.attend(query, attention_mask, causal, scaling).transpose(1, 2), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Any:
    """`sdpa_mask`, which one new token in its window needs for padding only: that is a view of what the user gave.

    Without it among the registered mask functions, transformers would give the attention function no mask at all.
    """
    whole_window = (
        local_size is None
        or kv_length < local_size
        or (kv_length == local_size and getattr(config, "attention_chunk_size", None) is None)
    )
    if q_length == 1 and whole_window and allow_is_causal_skip and not use_vmap:
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] >= kv_offset + kv_length:
            return attention_mask[:, None, None, kv_offset : kv_offset + kv_length]
    return masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
        allow_is_causal_skip, use_vmap=use_vmap, config=config, **kwargs,
    )  # fmt: skip


AttentionInterface.register(NAME, attention)
masking_utils.AttentionMaskInterface.register(NAME, mask)
