"""A cache for `generate(past_key_values=...)` over `pygen.nn.cache.KeyValueCache`: one buffer a layer, filled in place.

It grows by doubling, or has a capacity; keeps a window with sinks (Xiao et al. 2023, arXiv:2309.17453); holds floats,
int8 or float8 codes. Beam search, assisted decoding and continued generation use it as they use transformers' own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from pygen.compat.transformers.held import Block, HeldLayer
from pygen.nn.cache import KeyValueCache, Storage
from pygen.ops import Rotary

UNMASKED = "sliding_attention without a mask"
SERVED = {"full_attention", "sliding_attention"}  # the kinds of layers that pygen has

# What a window's ring keeps at least beyond the window where tokens may be taken back (assisted decoding).
_TAKEN_BACK = 256
# Models whose layers let go of tokens that their masks still show: of a prompt, every token sees all before it.
_UNMASKED_WINDOWS = {"moshi", "kyutai_speech_to_text"}


def kinds_of_layers(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The kinds of a model's layers, by the names of transformers', and the options of their caches."""
    config = config.get_text_config(decoder=True)
    kinds, options = cache_utils.get_layer_types_and_kwargs(config)
    if config.model_type in _UNMASKED_WINDOWS:
        kinds = [UNMASKED if kind == "sliding_attention" else kind for kind in kinds]
    return kinds, options


class Layer(HeldLayer):
    """One layer of a `Cache`.

    capacity, window, sinks, storage: as in `pygen.nn.cache.KeyValueCache`.
    is_sliding: whether the window is the model's own, so that its masks have it too.

    ValueError: sinks without a window, or sinks beside a window of the model's own.
    """

    def __init__(
        self,
        *,
        capacity: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        storage: Storage | None = None,
        is_sliding: bool = False,
    ) -> None:
        super().__init__()
        if is_sliding and sinks:
            raise ValueError(f"sinks is {sinks}, but expected 0 in a layer whose model has a window of its own")
        self.is_sliding = is_sliding
        self.window = window
        self._recording = False
        self._since = 0  # tokens since some were last taken back, while the past is recorded
        self._store = KeyValueCache(
            capacity if window is None else None, window=window, sinks=sinks, storage=storage
        )  # A ring has no end to run into.

    def __repr__(self) -> str:
        store = self._store
        options = {"capacity": store.capacity if store.window is None else None, "window": store.window,
                   "sinks": store.sinks or None, "storage": store.storage}  # fmt: skip
        return f"Layer({', '.join(f'{name}={value}' for name, value in options.items() if value is not None)})"

    def holds(self, block: int) -> bool:
        store = self._store
        if not self.is_sliding or self.window is None or store.capacity is None:
            return True
        return block <= store.capacity - store.sinks - self.window + 1

    def sees_all(self, block: int) -> bool:
        return self.is_sliding or self.window is None or block <= self.window

    def moves_sinks(self, block: int) -> bool:
        return self.window is not None and 0 < self._store.sinks < self._length + block - self.window

    def read(self, length: int) -> Block:
        if not self.is_sliding or self.window is None:
            self.settle()
            if self.window is not None and self._length > self.window:
                raise RuntimeError(
                    "the keys of a window that the model does not know of were used outside of pygen's attention, but "
                    'expected model.set_attn_implementation("pygen"): its masks would show tokens at the wrong places'
                )
            return self._store.keys[:, :, :length], self._store.values[:, :, :length]
        waiting = self._waiting
        if waiting is None:
            return self._store.recent(length)  # they were attended to, and so the ring had room for what they see
        # The block's first token sees more than the ring keeps once the block is in.
        before = (self._store.keys, self._store.values) if self._store.length else None
        self.settle()
        if before is None:
            return waiting
        joined = (torch.cat(pair, 2) for pair in zip(before, waiting, strict=True))
        keys, values = (whole[:, :, whole.shape[2] - length :] for whole in joined)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.is_sliding or self.window is None:
            return super().get_mask_sizes(query_length)
        before = min(self._length, self.window - 1)
        return before + query_length, self._length - before

    def get_max_length(self) -> int:
        if self.window is not None:
            return self.window if self.is_sliding else -1
        return -1 if self._store.capacity is None else self._store.capacity

    def activate_past_recording(self) -> None:
        """Keep, beside a window, all tokens since some were last taken back, and at least a few hundred."""
        self._recording = self.window is not None
        self._fit(_TAKEN_BACK)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back.

        ValueError: a positive number; or a window's ring that has let go of what the window would hold again.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}, but expected 0, or less to take tokens back")
        self.settle()
        if tokens_to_remove:
            self._store.crop(tokens_to_remove)
            self._length = max(self._length + tokens_to_remove, 0)
            if self.window is None:
                self._follow(lambda whole: whole[:, :, : self._length])
            else:
                self._graph = None
        if self._recording:
            self._fit(self._since)
            self._since = 0

    def reset(self) -> None:
        self._waiting = self._graph = None
        self._length = self._before = self._since = 0
        self._store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.settle()
        if self._store.lengths is not None:
            index = beam_idx.to(self._store.lengths.device)
            self._store.reorder(index)
            self._follow(lambda whole: whole.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one behind the other."""
        self.settle()
        self._store.fork(repeats)
        self._follow(lambda whole: whole.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, int64 (rows,) or bool (batch,)."""
        self.settle()
        if self._store.lengths is not None:
            index = indices.to(self._store.lengths.device)
            self._store.select(index)
            self._follow(lambda whole: whole[index])

    def _enter(self, block: int) -> None:
        capacity = self._store.capacity
        if self.window is None and capacity is not None and self._length + block > capacity:
            raise ValueError(
                f"key_states has {block} tokens behind {self._length}, but expected at most {capacity} in all, the "
                "capacity of the cache"
            )
        super()._enter(block)
        if self._recording:
            self._since += block
            self._fit(self._since)

    def _fit(self, more: int) -> None:
        """A ring that keeps so many tokens beside sinks and window; one of several times the length is cut."""
        store = self._store
        if self.window is None or store.capacity is None:
            return
        least = store.sinks + self.window + max(more, _TAKEN_BACK)
        if store.capacity < least:
            store.resize(max(least, 2 * store.capacity))
        elif store.capacity > 4 * least:
            store.resize(2 * least)

    def _append(self, block: Block) -> None:
        self._store.append(*block)

    def _attend(
        self,
        query: Tensor,
        block: Block | None,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        rotary: Rotary | None,
    ) -> Tensor:
        store = self._store
        if store.window is not None and store.capacity is not None:
            # A block that the ring does not hold is gone through in parts, which see nothing of those behind them.
            causal = causal or query.shape[2] > store.capacity - store.sinks - store.window + 1
        if block is None:
            return store.attend(query, mask=mask, causal=causal, scale=scale, rotary=rotary)
        return store.append_and_attend(query, *block, mask=mask, causal=causal, scale=scale, rotary=rotary)


class Cache(cache_utils.Cache):
    """Keys and values of all layers, for `model.generate(past_key_values=Cache(model.config))`.

    config: of the model, which tells of layers with a window of their own; without it every layer sees everything.
    capacity: room for so many tokens, taken at once; by default the buffers double when they are full.
    window: layers that see everything keep the last `window` tokens only, and attend to those alone. It takes pygen's
        attention: `model.set_attn_implementation("pygen")`, `convert(model)`, or `patch()`.
    sinks: and the first `sinks` tokens, padding on the left among them. After `convert(model)` the sinks have the
        places before the window, as Xiao et al. have it; else those where they were, because the model turns keys
        before the cache is given them. There they stay, too, where the model's rotary embedding is not Llama's, or
        changes with the text's length ("dynamic" and "longrope").
    storage: "int8" or "fp8", codes with one scale a token and head, which pygen's attention reads as they are; a dtype;
        or None, the keys' own.

    Layers that are neither of full nor of sliding attention are transformers' own. With a gradient, a step is copied as
    in transformers' caches.

    ValueError: sinks without a window, or a window for a model all of whose layers have their own.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        capacity: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        storage: Storage | None = None,
    ) -> None:
        make = functools.partial(Layer, capacity=capacity, window=window, sinks=sinks, storage=storage)
        if config is None:
            make()  # for its errors
            super().__init__(layer_class_to_replicate=make)
            return
        types, options = kinds_of_layers(config)
        if window is not None and "full_attention" not in types:
            raise ValueError(
                f"window is {window}, but expected None: all layers of the model have windows of their own"
            )
        layers = []
        for kind, own in zip(types, options, strict=True):
            if kind == "full_attention":
                layers.append(make())
            elif kind == "sliding_attention":
                layers.append(Layer(window=own["sliding_window"], storage=storage, is_sliding=True))
            else:
                kind = "sliding_attention" if kind == UNMASKED else kind
                layers.append(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[kind](**own))
        choose_leader(layers, config)
        super().__init__(layers=layers)


def choose_leader(layers: Sequence[Any], config: Any) -> None:
    """Let all layers that hold the tokens of the text agree with the first of them."""
    pictures = cross_attention_layers(config)
    of_text = [layer for n, layer in enumerate(layers) if isinstance(layer, HeldLayer) and n not in pictures]
    for layer in of_text[1:]:
        layer.leader = of_text[0]


def cross_attention_layers(config: Any) -> set[int]:
    """The numbers of the layers that hold other tokens than the text's."""
    return set(getattr(config.get_text_config(decoder=True), "cross_attention_layers", None) or ())
