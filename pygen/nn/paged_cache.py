"""A key/value cache of many sequences over one pool of pages (Kwon et al. 2023, arXiv:2309.06180, section 4).

Memory is taken a page at a time, forks share pages until one of them writes, and sequences that begin with the same
tokens share the pages of their beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pygen import _native, ops
from pygen.nn.cache import CODES, Storage, plain, storage_dtype
from pygen.ops import Rotary


class PagedCache:
    """Keys and values of all layers, in `pages` pages of `page_size` tokens each.

    A step opens a block with `extend`, and then calls `append_and_attend` once for each layer:

        number, known = cache.add(prompt)              # `known` leading tokens need not be computed again
        cache.extend([number], len(prompt) - known, [prompt[known:]])
        out = cache.append_and_attend(0, query, key, value)

    Heads, width, dtype and device are those of a layer's first keys.

    window, sinks, sink_positions: as in `KeyValueCache`; pages behind the window stay.
    storage: "int8", "fp8" or a dtype, as in `KeyValueCache`.

    RuntimeError: pygen was built without its runtime module, which holds the page table.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        *,
        page_size: int = 16,
        window: int | None = None,
        sinks: int = 0,
        storage: Storage | None = None,
        sink_positions: Literal["cache", "absolute"] = "cache",
    ) -> None:
        if _native._runtime is None:
            raise RuntimeError(_native._runtime_absent)
        self.table = _native._runtime.PageTable(pages, page_size)
        self.window = window
        self.sinks = sinks
        self.sink_positions = sink_positions
        self.storage = storage_dtype(storage)
        self._buffers: list[list[Tensor]] = [[] for _ in range(layers)]
        self._dtypes: list[torch.dtype | None] = [None] * layers
        # The block that is open: its sequences, their lengths before (n,), their pages (n, columns).
        self._open: tuple[list[int], int, Tensor, Tensor] | None = None
        self._unwritten: set[int] = set()  # the layers that the block is still to be appended to

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return int(self.table.free_pages)

    def add(self, tokens: Sequence[int] = ()) -> tuple[int, int]:
        """A new sequence: its number, and how many of the leading `tokens` are in the cache already, of sequences that
        were given theirs; never all of them, because the last one's output is still to be computed."""
        number, known = self.table.add(list(tokens))
        return int(number), int(known)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, those of an open block among them."""
        return int(self.table.length(sequence))

    def extend(self, sequences: Sequence[int], block: int, tokens: Sequence[Sequence[int]] | None = None) -> None:
        """Open a block of so many more tokens for each of the sequences, in the order of the batch.

        Pages that are shared and written to are copied, in all layers. tokens: the ids of each sequence's new tokens;
        sequences whose ids are known lend their beginning to those that `add` begins alike, once all layers have it. A
        block that is given up half-way is to be taken back by `crop`.

        ValueError: a sequence that was freed, or is not there, or was given twice. RuntimeError: too few free pages.
        Nothing is changed then.
        """
        numbers = list(sequences)
        copies = self.table.append(numbers, block, [] if tokens is None else [list(own) for own in tokens])
        if copies:
            for buffer in (plain(buffer) for layer in self._buffers for buffer in layer):
                source, target = torch.tensor(copies, device=buffer.device).unbind(1)
                buffer[target] = buffer[source]
        lengths = torch.tensor([self.table.length(number) - block for number in numbers], dtype=torch.int32)
        columns = max((len(self.table.pages_of(number)) for number in numbers), default=0)
        pages = torch.zeros(len(numbers), columns, dtype=torch.int32)
        if pages.numel():
            pages = torch.frombuffer(bytearray(self.table.table(numbers, columns)), dtype=torch.int32).view_as(pages)
        self._open = numbers, block, lengths, pages
        self._unwritten = set(range(len(self._buffers)))

    def append_and_attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = True,
        scale: float | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Append the open block's keys and values to a layer and attend: (n, heads, block, width), as
        `ops.attend_cached`.

        ValueError: no block is open (a sequence of it was freed or cropped since `extend`), or key is not of its size.
        """
        if self._open is None:
            raise ValueError("append_and_attend was called without an open block, but expected `extend` before it")
        numbers, block, lengths, pages = self._open
        if key.dim() != 4 or (key.shape[0], key.shape[2]) != (len(numbers), block):
            raise ValueError(
                f"key has shape {tuple(key.shape)}, but expected ({len(numbers)}, kv_heads, {block}, width), the block "
                "that is open"
            )
        if pages.device != key.device:
            lengths, pages = lengths.to(key.device), pages.to(key.device)
            self._open = numbers, block, lengths, pages
        if not self._buffers[layer]:
            self._allocate(layer, key)
        keys, values, *scales = self._buffers[layer]
        out = ops.attend_cached(
            query, key, value, keys, values, lengths.clone(), pages=pages, mask=mask, causal=causal, scale=scale,
            rotary=rotary, window=self.window, sinks=self.sinks, sink_positions=self.sink_positions,
            **dict(zip(("key_scales", "value_scales"), scales, strict=False)),
        )  # fmt: skip
        if layer in self._unwritten:
            self._unwritten.remove(layer)
            if not self._unwritten:
                self.table.written(numbers)
        return out

    def fork(self, sequence: int, copies: int = 1) -> list[int]:
        """So many further sequences with the same tokens, which take no memory until they go on."""
        return [int(number) for number in self.table.fork(sequence, copies)]

    def crop(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens. ValueError: it has fewer."""
        self.table.crop(sequence, length)
        self._close(sequence)

    def free(self, sequence: int) -> None:
        """Give a sequence up. ValueError: it was freed already, or is not there."""
        self.table.free(sequence)
        self._close(sequence)

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """The keys and the values of a sequence, (kv_heads, length, width) each, a copy."""
        length = self.length(sequence)
        if not self._buffers[layer]:
            raise ValueError(f"layer {layer} is empty, but expected an append before it is read")
        keys, values, *scales = self._buffers[layer]
        pages = torch.tensor(self.table.pages_of(sequence), dtype=torch.int64, device=keys.device)

        def gather(buffer: Tensor) -> Tensor:
            return plain(buffer)[pages].view(buffer.dtype).transpose(0, 1).flatten(1, 2)[:, :length]

        if not scales:
            return gather(keys), gather(values)
        key, value = (
            (gather(codes).to(torch.float32) * gather(scale).unsqueeze(-1)).to(self._dtypes[layer])
            for codes, scale in zip((keys, values), scales, strict=True)
        )
        return key, value

    def _allocate(self, layer: int, key: Tensor) -> None:
        shape = (self.table.page_count, key.shape[1], self.table.page_size, key.shape[3])
        options: dict[str, Any] = {"device": key.device}
        buffers = [torch.empty(shape, dtype=self.storage or key.dtype, **options) for _ in range(2)]
        if self.storage in CODES.values():
            buffers += [torch.empty(shape[:3], dtype=torch.float32, **options) for _ in range(2)]
        self._buffers[layer], self._dtypes[layer] = buffers, key.dtype

    def _close(self, sequence: int) -> None:
        if self._open is not None and sequence in self._open[0]:
            self._open = None
