"""Stand-ins for the layers of Llama-like models: attention that turns, appends and attends in one call, and RMSNorm.

Rotary embedding is Su et al. 2021 (arXiv:2104.09864), RMSNorm Zhang & Sennrich 2019 (arXiv:1910.07467).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from pygen.compat.transformers.attention import FIRST_BLOCK, NAME
from pygen.compat.transformers.held import HeldLayer
from pygen.compat.transformers.swapped import Swapped, same_code
from pygen.compat.transformers.tables import PositionTables
from pygen.ops import Rotary

TABLES = "_pygen_tables"  # where an attention layer has the tables of its model

_ATTENTIONS = (
    modeling_llama.LlamaAttention.forward,
    modeling_mistral.MistralAttention.forward,
    modeling_qwen2.Qwen2Attention.forward,
    modeling_qwen3.Qwen3Attention.forward,
)
# All of a head's width, and the first part of it, in halves.
_ROTARIES = (modeling_llama.apply_rotary_pos_emb, modeling_gpt_neox.apply_rotary_pos_emb)


class FusedAttention(Swapped):
    """An attention layer that takes its queries, keys and values to a pygen cache as they are projected.

    Without a pygen cache, while training, and for long first blocks it is the layer that it stands in for.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer = _held_layer(past_key_values, self.layer_idx)
        rotary = None
        if (
            layer is not None
            and not torch.is_grad_enabled()
            and not (self.training and self.attention_dropout)
            and self.config._attn_implementation in (NAME, "sdpa")
        ):
            rotary = _rotary_for(self, layer, position_embeddings, kwargs.get("position_ids"))
        if layer is None or rotary is None:
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        out = layer.append_and_attend(
            query.transpose(1, 2), (key.transpose(1, 2), value), attention_mask,
            attention_mask is None and getattr(self, "is_causal", True), self.scaling, rotary,
        )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).reshape(*hidden_states.shape[:2], -1)), None


class FusedRMSNorm(Swapped):
    """x / sqrt(mean(x^2) + eps) * weight in one call.

    In float32 it is the layer's own result on the CPU, to the bit. Of other dtypes it is nearer to the exact one:
    narrower ones are rounded once, at the end, where the layer rounds before the weight, too, and float64 is not
    rounded to float32 in between. An input and a weight of two dtypes are the layer's own matter.
    """

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def stand_in(layer: nn.Module) -> type | None:
    """What stands in for a layer; None where there is nothing, or nothing to gain."""
    cls = type(layer)
    if same_code(cls.forward, modeling_llama.LlamaRMSNorm.forward) and "forward" not in vars(layer):
        return FusedRMSNorm
    if is_attention(layer) and reason_to_leave(layer) is None:
        return FusedAttention
    return None


def is_attention(layer: nn.Module) -> bool:
    """Whether a layer is the attention of a decoder, of which one expects it to be converted."""
    return hasattr(layer, "layer_idx") and type(layer).__name__.endswith("Attention")


def reason_to_leave(layer: nn.Module) -> str | None:
    """Why an attention layer stays; None where it need not."""
    cls = type(layer)
    if issubclass(cls, FusedAttention):
        return "already a layer of pygen's"
    if "forward" in vars(layer):
        return "it has a forward of its own"
    if not same_code(cls.forward, *_ATTENTIONS):
        return "its attention is not that of Llama, Mistral, Qwen2 or Qwen3"
    names = vars(sys.modules[cls.__module__])
    turn, half = names.get("apply_rotary_pos_emb"), names.get("rotate_half")
    if turn is None or half is None or not same_code(turn, *_ROTARIES):
        return "its rotary embedding is not that of Llama"
    return (
        None if same_code(half, modeling_llama.rotate_half) else "its rotary embedding turns other pairs than Llama's"
    )


def _held_layer(cache: Any, number: int) -> HeldLayer | None:
    layers = getattr(cache, "layers", ())
    layer = layers[number] if number < len(layers) else None
    return layer if isinstance(layer, HeldLayer) else None


def _rotary_for(
    attention: Any, layer: HeldLayer, embeddings: tuple[Tensor, Tensor], positions: Tensor | None
) -> Rotary | None:
    """The tables to turn a block with, as it is appended and attended from; None where the model is to do that."""
    cos, sin = embeddings
    if not layer.moves_sinks(cos.shape[1]):
        return None if cos.shape[1] >= FIRST_BLOCK else _rotary(cos, sin)
    # A query meets the sinks at another place than its own, of which the block has no row.
    tables: PositionTables | None = getattr(attention, TABLES, None)
    return None if tables is None or positions is None else tables.rotary(cos, positions)


def _rotary(cos: Tensor, sin: Tensor) -> Rotary:
    """Tables for `ops.attend_cached` of cos and sin (batch or 1, block, width), in which halves repeat; made once for
    all layers that are given the same tensors."""
    kept: tuple[Tensor, Rotary] | None = getattr(cos, "_pygen_rotary", None)
    if kept is not None and kept[0] is sin:
        return kept[1]
    pairs = cos.shape[2] // 2
    compute = torch.float64 if cos.dtype == torch.float64 else torch.float32
    tables = [table[..., :pairs].to(compute).reshape(-1, pairs).contiguous() for table in (cos, sin)]
    places = torch.arange(cos.shape[0] * cos.shape[1], device=cos.device).view(cos.shape[:2])
    rotary = Rotary(tables[0], tables[1], places)
    cos._pygen_rotary = sin, rotary  # type: ignore[attr-defined]
    return rotary
