"""What a causal transformer keeps of the tokens before, in all its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen.nn.cache import KeyValueCache


class Cache:
    """The keys and values of the tokens that a causal transformer has seen, in every layer."""

    def places(self, block: int) -> Tensor:
        """The positions, int (block,) or (n, block), of the next `block` tokens in the sequence."""
        raise NotImplementedError(f"{type(self).__name__} does not define places")

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append the keys and values of a block to those of a layer, and attend: (n, heads, block, width) all."""
        raise NotImplementedError(f"{type(self).__name__} does not define attend")


class LayerCaches(Cache):
    """A `KeyValueCache` for each layer, all of one length; there is no gradient through it."""

    def __init__(self, layers: Sequence[KeyValueCache]) -> None:
        self.layers = list(layers)

    @property
    def lengths(self) -> Tensor:
        """int32 (n,), how many tokens each sequence has."""
        lengths = self.layers[0].lengths
        if lengths is None:
            raise ValueError("the caches are empty, but expected `allocate` or an append before")
        return lengths

    def places(self, block: int) -> Tensor:
        next_places = self.lengths.unsqueeze(1) + torch.arange(block, device=self.lengths.device)
        # What does not fit is refused by the attention, not by an index out of range.
        capacity = self.layers[0].capacity
        return next_places if capacity is None else next_places.clamp(max=capacity - 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.layers[layer].append_and_attend(query, key, value)

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep at most so many tokens of each sequence, or of all; a negative int takes that many back."""
        for layer in self.layers:
            layer.crop(lengths)

    def reorder(self, index: Tensor) -> None:
        """Sequence i becomes what sequence index[i] was."""
        for layer in self.layers:
            layer.reorder(index)

    def fork(self, copies: int) -> None:
        """Each sequence `copies` times, one behind the other."""
        for layer in self.layers:
            layer.fork(copies)

    def select(self, index: Tensor) -> None:
        """Keep these sequences: int64 (rows,), or bool (n,)."""
        for layer in self.layers:
            layer.select(index)

    def reset(self) -> None:
        """No tokens; the memory stays."""
        for layer in self.layers:
            layer.reset()


class GrowingCache(Cache):
    """Keys and values joined to those before, so that gradients go through; each step copies what it keeps.

    ValueError, of `places`: more tokens than `capacity`.
    """

    def __init__(self, layers: int, capacity: int, *, device: torch.device) -> None:
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.length = 0
        self.capacity = capacity
        self.device = device

    def places(self, block: int) -> Tensor:
        start, self.length = self.length, self.length + block
        if self.length > self.capacity:
            raise ValueError(f"x has {block} tokens after {start}, but expected at most {self.capacity} in all")
        return torch.arange(start, self.length, device=self.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept = self.kept[layer]
        if kept is not None:
            key, value = torch.cat((kept[0], key), dim=2), torch.cat((kept[1], value), dim=2)
        self.kept[layer] = key, value
        block, length = query.shape[2], key.shape[2]
        seen = torch.ones(block, length, dtype=torch.bool, device=query.device).tril(length - block)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
