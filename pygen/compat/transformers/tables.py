"""Tables of a model's rotary embedding by position, for keys that are met at other places than their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from pygen.compat.transformers.swapped import same_code
from pygen.ops import Rotary
from pygen.ops.kept import KeptResult, versions

_FIRST_ROWS = 64


class PositionTables:
    """The cosines and sines of positions 0, 1, ... as a model's own rotary embedding has them.

    They are kept, and doubled when a position is past them; made anew when the frequencies have changed.
    """

    def __init__(self, embedding: nn.Module) -> None:
        self._embedding: Any = embedding
        self._rows = _FIRST_ROWS
        self._kept: dict[torch.device, KeptResult[tuple[Tensor, Tensor]]] = {}

    def rotary(self, cos: Tensor, positions: Tensor) -> Rotary:
        """Tables for `ops.attend_cached` of tokens at these places, int64 (batch or 1, block); `cos`, (batch or 1,
        block, width), is the embedding's for them, and tells the dtype that the tables are rounded to."""
        kept: tuple[Tensor, PositionTables, Rotary] | None = getattr(cos, "_pygen_placed", None)
        if kept is not None and kept[0] is positions and kept[1] is self:
            return kept[2]  # made for the layer before
        last = int(positions.max()) if positions.numel() else 0
        if last >= self._rows:
            self._rows = 1 << last.bit_length()
        frequencies = [self._embedding.inv_freq]
        key = self._rows, cos.dtype, self._embedding.attention_scaling, versions(frequencies)
        tables = self._kept.setdefault(cos.device, KeptResult()).get(key, frequencies, lambda: self._make(cos))
        rotary = Rotary(*tables, positions)
        cos._pygen_placed = positions, self, rotary  # type: ignore[attr-defined]
        return rotary

    def _make(self, cos: Tensor) -> tuple[Tensor, Tensor]:
        pairs = cos.shape[2] // 2
        compute = torch.float64 if cos.dtype == torch.float64 else torch.float32
        every = torch.arange(self._rows, device=cos.device).unsqueeze(0)
        made, of_sine = self._embedding(cos, every)
        return made[0, :, :pairs].to(compute).contiguous(), of_sine[0, :, :pairs].to(compute).contiguous()


def position_tables(model: nn.Module) -> dict[nn.Module, PositionTables]:
    """For every module below one with a `rotary_emb`, the tables of the nearest; none where an angle does not follow
    from the position alone, as with the frequencies of "dynamic" and "longrope", which change with the text's length.
    """
    found: dict[nn.Module, PositionTables] = {}
    for part in model.modules():  # the outer before the inner
        embedding = getattr(part, "rotary_emb", None)
        if not isinstance(embedding, nn.Module):
            continue
        tables = PositionTables(embedding) if _is_of_positions(embedding) else None
        for layer in part.modules():
            found.pop(layer, None)
            if tables is not None:
                found[layer] = tables
    return found


def _is_of_positions(embedding: Any) -> bool:
    known = same_code(type(embedding).forward, modeling_llama.LlamaRotaryEmbedding.forward)
    kind = getattr(embedding, "rope_type", None)
    # The kinds that transformers' `dynamic_rope_update` recomputes.
    return (
        known
        and "forward" not in vars(embedding)
        and isinstance(kind, str)
        and not ("dynamic" in kind or kind == "longrope")
    )
