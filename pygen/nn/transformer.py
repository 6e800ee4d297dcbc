"""A causal transformer: over a whole sequence at once, or token by token from what it kept of the tokens before.

A block is h = x + attention(norm(x)), y = h + mlp(norm(h)) (Xiong et al. 2020, arXiv:2002.04745, figure 1b), where
attention is softmax(q k^T / sqrt(width)) v over a token and those before it (Vaswani et al. 2017, arXiv:1706.03762,
eq. 1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.nn.cache import KeyValueCache
from pygen.nn.layer_caches import Cache, GrowingCache, LayerCaches

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each beside a skip; both start at zero.

    width: of a token. heads: of the attention, which share the width. expansion: hidden units per width.
    dropout: of what is added to the skip.
    """

    def __init__(self, width: int, heads: int, *, expansion: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)
        for layer in (self.project_out, self.contract):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, attend: Attend, temperature: Tensor | None = None) -> Tensor:
        """x (n, length, width) to the same shape; `attend` mixes (n, heads, length, width / heads) of each."""
        n, length, width = x.shape
        packed = self.project_in(self.attention_norm(x)).reshape(n, length, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        if temperature is not None:
            query = query / temperature.to(query.dtype).reshape(-1, 1, 1, 1)
        mixed = attend(query, key, value).transpose(1, 2).reshape(n, length, width)
        x = x + F.dropout(self.project_out(mixed), self.dropout, self.training)
        hidden = F.gelu(self.expand(self.mlp_norm(x)))
        return x + F.dropout(self.contract(hidden), self.dropout, self.training)


class CausalTransformer(nn.Module):
    """(n, length, width) to (n, length, width), where place i of the output depends on the places up to i of the input.

    What a token is made of, and what is read off the output, is the caller's: a layer on either side.

    length: the longest sequence; each place has a learned vector. width, heads, expansion, dropout: of the blocks.
    layers: how many blocks. classes: number of labels, or None. A learned vector of the label is added to every token;
        label number `classes` stands for none, as in classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).

    ValueError: a number that is not positive, or a width that the heads do not divide.
    """

    def __init__(
        self,
        length: int,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        expansion: int = 4,
        classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"length": length, "width": width, "layers": layers, "heads": heads, "expansion": expansion}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, but expected at least 1")
        if width % heads:
            raise ValueError(f"width is {width}, but expected a multiple of the {heads} heads")
        self.length = length
        self.heads = heads
        self.positions = nn.Parameter(torch.empty(length, width))
        self.label = None if classes is None else nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, expansion=expansion, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        # As large as a token: small ones cost a short training most of its steps.
        nn.init.normal_(self.positions)

    def forward(self, x: Tensor, condition: Tensor | None = None, *, temperature: Tensor | None = None) -> Tensor:
        """The whole sequence at once, (n, up to `length`, width).

        condition: int64 (n,) labels; None is no label, whether or not there are classes.
        temperature: (n,), what the scores of each row's attention are divided by; 1 where it is left out.

        ValueError: x has more tokens than `length`, or a label was given without classes.
        """
        if x.shape[1] > self.length:
            raise ValueError(f"x has {x.shape[1]} tokens, but expected at most {self.length}")
        x = self._enter(x, self.positions[: x.shape[1]], condition)
        for block in self.blocks:
            x = block(x, _attend_before, temperature)
        return cast("Tensor", self.norm(x))

    def step(
        self, x: Tensor, cache: Cache, condition: Tensor | None = None, *, temperature: Tensor | None = None
    ) -> Tensor:
        """The next tokens of the sequence, (n, block, width), given those that are in the cache; then they are in too.

        Steps over a sequence, of one token or of several, give what `forward` gives on the whole.
        """
        x = self._enter(x, F.embedding(cache.places(x.shape[1]), self.positions), condition)
        for layer, block in enumerate(self.blocks):
            x = block(x, functools.partial(cache.attend, layer), temperature)
        return cast("Tensor", self.norm(x))

    def cache(self, n: int, capacity: int | None = None, *, differentiable: bool = False) -> Cache:
        """An empty cache for n sequences of at most `capacity` tokens, by default `length`.

        differentiable: keep the graph of every step, for gradients; slower, and memory grows with the square of the
            tokens.
        """
        capacity = self.length if capacity is None else capacity
        width, device = self.positions.shape[1] // self.heads, self.positions.device
        if differentiable:
            return GrowingCache(len(self.blocks), capacity, device=device)
        layers = [KeyValueCache(capacity) for _ in self.blocks]
        for layer in layers:
            layer.allocate(n, self.heads, width, dtype=self.positions.dtype, device=device)
        return LayerCaches(layers)

    def _enter(self, x: Tensor, positions: Tensor, condition: Tensor | None) -> Tensor:
        x = x + positions
        if self.label is not None:
            none = self.label.weight[-1]
            x = x + (none if condition is None else self.label(condition).unsqueeze(1))
        elif condition is not None:
            raise ValueError("condition was given, but the transformer was built without classes (classes=None)")
        return x


def _attend_before(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)
