"""A cache for `generate(past_key_values=...)` over `pygen.nn.paged_cache.PagedCache`: memory is taken by the page.

Beams and samples of one prompt share its pages, and one that goes on copies the page that it writes to (Kwon et al.
2023, arXiv:2309.06180, section 4.4): reordering beams copies no keys.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from pygen.compat.transformers.cache import SERVED, choose_leader, cross_attention_layers, kinds_of_layers
from pygen.compat.transformers.held import Block, HeldLayer
from pygen.nn import paged_cache
from pygen.nn.cache import Storage
from pygen.ops import Rotary


class PagedLayer(HeldLayer):
    """One layer of a `PagedCache`, whose sequences are those of all layers."""

    def __init__(self, cache: PagedCache, number: int, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self._cache = cache
        self._number = number

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Block:
        self._cache.open(self._number, key_states)
        return super().update(key_states, value_states)

    def append_and_attend(
        self,
        query: Tensor,
        block: Block,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        rotary: Rotary,
    ) -> Tensor:
        self._cache.open(self._number, block[0])
        return super().append_and_attend(query, block, mask, causal, scale, rotary)

    def read(self, length: int) -> Block:
        self.settle()
        pool, rows = self._cache.pool, self._cache.rows
        keys, values = (
            torch.stack(parts) for parts in zip(*(pool.read(self._number, row) for row in rows), strict=True)
        )
        return keys[:, :, :length], values[:, :, :length]

    def holds(self, block: int) -> bool:
        return self._waiting is not None  # a block is appended as it is attended from

    def set_length(self, length: int) -> None:
        """What the rows were cropped to, or 0 where there are none any more."""
        self._waiting = None
        self._follow(lambda whole: whole[:, :, :length])
        if not length:
            self._graph = None
        self._length = self._before = length

    def choose(self, chosen: Sequence[int]) -> None:
        """Do with what has a gradient what is done with the rows."""
        self.settle()
        self._follow(lambda whole: whole[list(chosen)])

    def _uncount(self, length: int) -> None:
        super()._uncount(length)
        if not self._number:  # which made the room for all layers
            self._cache.close(length)

    def _append(self, block: Block) -> None:
        # Who attends appends; whoever reads pays for one attention more.
        self._cache.pool.append_and_attend(self._number, block[0], *block)

    def _attend(
        self,
        query: Tensor,
        block: Block | None,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        rotary: Rotary | None,
    ) -> Tensor:
        if block is None:
            raise RuntimeError(
                "a block was attended to twice, but expected once a layer: a paged cache does not serve layers that "
                "share keys"
            )
        return self._cache.pool.append_and_attend(
            self._number, query, *block, mask=mask, causal=causal, scale=scale, rotary=rotary
        )


class PagedCache(cache_utils.Cache):
    """Keys and values of all layers in `pages` pages of `page_size` tokens, which the rows of a batch share.

    config: of the model; all its layers are of full or of sliding attention.
    storage: "int8" or "fp8", as in `Cache`; a dtype; or None, the keys' own.

    `pool` is the `pygen.nn.paged_cache.PagedCache` beneath, `rows` the numbers that the batch's rows have in it.

    ValueError: layers of other kinds. RuntimeError, in a step: too few free pages; nothing is written then.
    """

    def __init__(self, config: Any, pages: int, *, page_size: int = 16, storage: Storage | None = None) -> None:
        kinds, _ = kinds_of_layers(config)
        other = sorted(set(kinds) - SERVED)
        if cross_attention_layers(config):
            other.append("cross-attention")  # of other tokens than the text's, for which there are no pages
        if other:
            raise ValueError(f"config has layers of {', '.join(other)}, but expected full or sliding attention only")
        self.pool = paged_cache.PagedCache(len(kinds), pages, page_size=page_size, storage=storage)
        self.rows: list[int] = []
        layers = [PagedLayer(self, number, kind == "sliding_attention") for number, kind in enumerate(kinds)]
        choose_leader(layers, config)
        super().__init__(layers=layers)

    def open(self, layer: int, key: Tensor) -> None:
        """Make room for a block in all layers, when the first of them is given it."""
        if layer:
            return
        if not self.rows:
            self.rows = [self.pool.add()[0] for _ in range(len(key))]
        if len(key) != len(self.rows):
            raise ValueError(f"key_states has {len(key)} rows, but expected {len(self.rows)}, as the tokens before")
        self.pool.extend(self.rows, key.shape[2])

    def close(self, length: int) -> None:
        """Take back the room for a block that the first layer refused."""
        if not length:
            self.reset()
        for row in self.rows:
            self.pool.crop(row, length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was: another name for its pages."""
        self._choose(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one behind the other."""
        self._choose([row for row in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, int64 (rows,) or bool (batch,)."""
        self._choose((indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices).tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back. ValueError: a positive number."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}, but expected 0, or less to take tokens back")
        if tokens_to_remove and self.rows:
            for layer in self.layers:
                layer.settle()
            length = max(self.get_seq_length() + tokens_to_remove, 0)
            for row in self.rows:
                self.pool.crop(row, length)
            self._set_length(length)

    def reset(self) -> None:
        """Give all pages back."""
        self._set_length(0)
        while self.rows:
            row = self.rows.pop()
            with contextlib.suppress(ValueError):  # the pool's user has freed it
                self.pool.free(row)

    def _choose(self, chosen: Sequence[int]) -> None:
        if not self.rows:
            return
        for layer in self.layers:
            layer.choose(chosen)
        count = Counter(chosen)
        names = {}
        for place, row in enumerate(self.rows):
            if count[place]:
                names[place] = [row, *self.pool.fork(row, count[place] - 1)]
            else:
                self.pool.free(row)
        self.rows = [names[place].pop() for place in chosen]

    def _set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.set_length(length)
