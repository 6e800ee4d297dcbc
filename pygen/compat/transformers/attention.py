"""Attention in transformers' interface, over the layers of pygen's caches.

`under_sdpa()`, which `patch()` and `convert(model)` call, puts it beneath "sdpa" for the whole process. Keys that no
pygen cache holds go to the function that was there. `model.set_attn_implementation("pygen")` chooses it by a name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pygen.compat.handle import Changes, Patch, qualified_name
from pygen.compat.transformers.held import Held

NAME, SDPA = "pygen", "sdpa"

# First blocks at least so long are products of matrices, which PyTorch's attention is quicker at on a GPU.
FIRST_BLOCK = 16
# Arguments that change the scores, or want them, and are the business of transformers' function.
_SPECIAL = ("position_bias", "softcap", "cache")
# Arguments that change the scores, and that transformers' function would pass over: models that give it them have the
# same in the mask, where the attention's name tells them that it is not one that knows them.
_NOT_IN_SDPA = ("indices", "block_indices", "s_aux")


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attend to what a layer holds, and append the block that waits there, in one call.

    query: (batch, heads, block, width). key, value: what the layer's `update` returned, or tensors of any origin,
        (batch, kv_heads, length, width). attention_mask: None, or (batch or 1, heads or 1, block, length).

    Returns (batch, block, heads, width) and None, as transformers expects it.

    ValueError: an argument that changes the scores and that "sdpa" does not have.
    """
    for name in _NOT_IN_SDPA:
        if kwargs.get(name) is not None:
            raise ValueError(
                f'{name} was given to attention "{NAME}", but expected None: such a model is to keep its attention, as '
                "patch() and convert(model) let it"
            )
    return _attend(sdpa_attention_forward, module, query, key, value, *args, **kwargs)


def _attend(
    original: Callable[..., Any],
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
    def as_they_are() -> Any:
        keys, values = (held.read() if type(held) is Held else held for held in (key, value))
        given = kwargs if is_causal is None else {"is_causal": is_causal, **kwargs}
        return original(module, query, keys, values, attention_mask, scaling=scaling, dropout=dropout, **given)

    if (
        type(key) is not Held
        or type(value) is not Held
        or key.reading is not value.reading
        or (key.which, value.which) != (0, 1)
        or dropout
        or query.requires_grad
        or any(kwargs.get(name) is not None for name in _SPECIAL)
    ):
        return as_they_are()
    reading, block = key.reading, query.shape[2]
    layer = reading.layer
    if not reading.can_be_attended_to(block):
        return as_they_are()
    # In a ring, too, where the model's mask may show a token what comes behind it (pictures in a prompt).
    if block >= FIRST_BLOCK and layer.sees_all(block) and (layer.is_sliding or query.device.type != "cpu"):
        reading.read = layer.take_first()
        if reading.read is not None:
            return as_they_are()
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # Some models go on with `view`.
    return layer.attend(query, attention_mask, causal, scaling).transpose(1, 2).contiguous(), None


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


def _install(changes: Changes) -> None:
    def over(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def instead(*args: Any, **kwargs: Any) -> Any:
            return (function if changes.in_force else original)(*args, **kwargs)

        return instead

    functions = AttentionInterface._global_mapping
    original = functions[SDPA]
    changes.set(functions, SDPA, over(original, functools.partial(_attend, original)))
    changes.report_replaced(qualified_name(original), qualified_name(attention), SDPA)
    functions = masking_utils.AttentionMaskInterface._global_mapping
    original = functions[SDPA]
    if original is masking_utils.sdpa_mask:  # somebody else's may want more than padding
        changes.set(functions, SDPA, over(original, mask))
        changes.report_replaced(qualified_name(original), qualified_name(mask), SDPA)


# A handle on pygen's attention beneath "sdpa"; the last of nested ones to end takes it back.
under_sdpa = Patch("transformers.attention", _install)

AttentionInterface.register(NAME, attention)
masking_utils.AttentionMaskInterface.register(NAME, mask)
