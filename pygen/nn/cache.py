"""A key/value cache: the keys and values of one layer's tokens so far, which `ops.attend_cached` adds to and reads.

`pygen.nn.layer_caches` has those of all layers of a network, `pygen.nn.paged_cache` one of many sequences over a pool
of pages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from pygen import ops
from pygen.ops import Rotary

Storage = Literal["int8", "fp8"] | torch.dtype
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

# Places that a growing cache begins with; tokens that a window's ring has beyond it, so that a block goes in at once.
_FIRST_ROOM = 64
_MOST_SLACK = 256


class KeyValueCache:
    """One layer's keys and values, appended to in place.

    Sizes, dtype and device are those of the first keys. A batch row may be ahead of another. Steps that are compiled,
    or recorded in a CUDA graph, want a capacity: there the host does not count, and the kernel marks a full row.

    capacity: room for so many tokens; by default the cache doubles its room when it is full, so that a token is copied
        about once. With a window, the room of the ring, by default a little more than sinks and window.
    window: keep the last so many tokens, and attend to them alone; a token's place is used again behind the window.
    sinks: the first so many tokens are kept besides (Xiao et al. 2023, arXiv:2309.17453).
    storage: "int8" or "fp8" (float8_e4m3fn): codes with one scale a row, read as they are; or the dtype to keep keys
        and values in, by default their own.
    sink_positions: "cache" or "absolute": where a rotary embedding has the sinks, see `ops.attend_cached`.

    lengths: int32 (batch,), how many tokens each row has; None before the first append. Rows shorter than the longest
        have anything at the end of `keys` and `values`.

    ValueError: sinks without a window, or a capacity that does not hold them.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        window: int | None = None,
        sinks: int = 0,
        storage: Storage | None = None,
        sink_positions: Literal["cache", "absolute"] = "cache",
    ) -> None:
        if window is None and sinks:
            raise ValueError(f"sinks is {sinks}, but expected 0 without a window")
        if window is not None and capacity is None:
            capacity = sinks + window + min(window, _MOST_SLACK)
        least = 1 if window is None else sinks + window
        if capacity is not None and capacity < least:
            raise ValueError(f"capacity is {capacity}, but expected at least {least}")
        self.capacity = capacity
        self.window = window
        self.sinks = sinks
        self.sink_positions = sink_positions
        self.storage = storage_dtype(storage)
        self.lengths: Tensor | None = None
        self._dtype: torch.dtype | None = None  # of the first keys
        self._buffers: list[Tensor] = []  # keys, values, and their scales where codes are kept
        # The most tokens that a row can have, as far as the host knows; None where a compiled step has not told it.
        self._most: int | None = 0
        self._written = 0  # the most that any row ever had, which tells what a ring has written over
        self._lost = 0  # tokens before this one, but for sinks, were let go of when the ring was resized
        self._recorded = False  # whether a CUDA graph appends, of whose replays the host is not told

    @property
    def batch(self) -> int:
        """How many rows there are; 0 before the first append."""
        return 0 if self.lengths is None else self.lengths.shape[0]

    @property
    def length(self) -> int:
        """Tokens of the longest row; after a crop by a tensor or a reorder, of which the host knows nothing, at most so
        many."""
        return self._count()

    @property
    def room(self) -> int:
        """Tokens that there is memory for now."""
        return self._buffers[0].shape[2] if self._buffers else 0

    @property
    def keys(self) -> Tensor:
        """(batch, kv_heads, length, width), a view; in order and decoded, a copy, with a window or of codes. With a
        window, the sinks and the window alone."""
        return self._read(0)

    @property
    def values(self) -> Tensor:
        """As `keys`."""
        return self._read(1)

    def recent(self, count: int) -> tuple[Tensor, Tensor]:
        """The keys and the values of the last `count` tokens of a window's ring, which has more than the window; those
        of the sinks before them.

        ValueError: no window, or tokens that were written over.
        """
        if self.window is None:
            raise ValueError(f"count is {count}, but expected a cache with a window")
        shortest = 0 if self.lengths is None or not self.batch else int(self.lengths.min())
        if count > self.window and max(shortest - count, self.sinks) < self._let_go():
            most = max(shortest - self._let_go(), self.window)
            raise ValueError(f"count is {count}, but expected at most {most}, which were not written over")
        return self._read(0, count), self._read(1, count)

    def allocate(
        self, batch: int, kv_heads: int, width: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        """Make an empty cache of these sizes, which the first append else does."""
        self._dtype = dtype
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._most = self._written = self._lost = 0
        shape = (batch, kv_heads, self.capacity or _FIRST_ROOM, width)
        self._buffers = [torch.empty(shape, dtype=self.storage or dtype, device=device) for _ in range(2)]
        if self.storage in CODES.values():
            self._buffers += [torch.empty(shape[:3], dtype=torch.float32, device=device) for _ in range(2)]

    def append(self, key: Tensor, value: Tensor, *, rotary: Rotary | None = None) -> None:
        """Append (batch, kv_heads, block, width), turned by `rotary` where it is given.

        ValueError: other sizes than before, or more tokens than `capacity`; nothing is written then.
        """
        with self._counting():
            lengths = self._enter(key, value)
            keys, values = self._buffers[:2]
            key_scales, value_scales = self._scales()
            for part in self._parts(key.shape[2], True):
                ops.append_cached(
                    key[:, :, part], value[:, :, part], keys, values, lengths, key_scales=key_scales,
                    value_scales=value_scales, window=self.window, sinks=self.sinks, rotary=_part_of(rotary, part),
                )  # fmt: skip

    def attend(
        self,
        query: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = True,
        scale: float | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Attend from the last `block` tokens that were appended: (batch, heads, block, width) to the same.

        The arguments are those of `ops.attend_cached`. ValueError: nothing was appended yet, or more tokens attend than
        a window's ring keeps the windows of, which `append_and_attend` does in parts.
        """
        if self.lengths is None:
            raise ValueError("query was given to an empty cache, but expected an append before")
        return self._attend(query, None, None, self.lengths, mask, causal, scale, rotary)

    def append_and_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = True,
        scale: float | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Append a block and attend from it, in one call: (batch, heads, block, width), as `ops.attend_cached`.

        ValueError: other sizes than before, or more tokens than `capacity`; nothing is written then.
        """
        with self._counting():
            lengths = self._enter(key, value)
            parts = self._parts(key.shape[2], causal)
            if len(parts) == 1:
                return self._attend(query, key, value, lengths, mask, causal, scale, rotary)
            return torch.cat(
                [
                    self._attend(
                        query[:, :, part], key[:, :, part], value[:, :, part], lengths,
                        mask if mask is None or mask.shape[2] == 1 else mask[:, :, part], causal, scale,
                        _part_of(rotary, part),
                    )
                    for part in parts
                ],
                dim=2,
            )  # fmt: skip

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep at most so many tokens of each row, or of all; a negative int takes that many back.

        ValueError: a window's cache lets go of tokens that the window would again hold.
        """
        if self.lengths is None:
            return
        if (self._recorded or self.window is not None) and not self._unseen():
            self._count()
        kept, most = self._cropped(self.lengths, lengths)
        if self.window is not None and (self._lost or self._written > self.room):
            self._check_crop(kept[kept < self.lengths])
        self.lengths.copy_(kept)
        self._most = most
        if most == 0:
            self._written = self._lost = 0

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was, as in beam search; index is int64 (rows,), with repeats or without."""
        if self.lengths is None:
            return
        used = self.room if self.window is not None or self._unseen() else self.length
        for i, buffer in enumerate(self._buffers):
            chosen = torch.empty((len(index), *buffer.shape[1:]), dtype=buffer.dtype, device=buffer.device)
            plain(chosen)[:, :, :used] = plain(buffer)[:, :, :used].index_select(0, index)
            self._buffers[i] = chosen
        self.lengths = self.lengths.index_select(0, index)

    def fork(self, copies: int) -> None:
        """Each row `copies` times, one behind the other."""
        self.reorder(torch.arange(self.batch, device=self._device()).repeat_interleave(copies))

    def select(self, index: Tensor) -> None:
        """Keep these rows: int64 (rows,), or bool (batch,)."""
        self.reorder(index.nonzero().squeeze(1) if index.dtype == torch.bool else index)
        self._most = None

    def resize(self, capacity: int) -> None:
        """Another capacity for a window's ring, which keeps the tokens that it has as far as there is room.

        ValueError: no window, or a capacity that does not hold it with the sinks.
        """
        if self.window is None:
            raise ValueError(f"capacity is {capacity}, but expected a cache with a window to resize")
        if capacity < self.sinks + self.window:
            raise ValueError(f"capacity is {capacity}, but expected at least {self.sinks + self.window}")
        most = self._count()
        self._lost, self._written = max(self._let_go(), most - (capacity - self.sinks), 0), most
        self.capacity = capacity
        if self.lengths is None:
            return
        place, last = torch.arange(capacity, device=self.lengths.device), self.lengths.long().unsqueeze(1) - 1
        token = last - (last - place) % (capacity - self.sinks)  # the latest one whose place this is
        token = torch.where(place < self.sinks, place, token).clamp(min=0)
        source = torch.where(token < self.room, token, self._place_of(token))
        rows = torch.arange(self.batch, device=self.lengths.device).unsqueeze(1)
        for i, buffer in enumerate(self._buffers):
            self._buffers[i] = plain(buffer)[rows, :, source].view(buffer.dtype).transpose(1, 2).contiguous()

    def reset(self) -> None:
        """No tokens; the memory stays."""
        if self.lengths is not None:
            self.lengths.zero_()
        self._most = self._written = self._lost = 0

    def _attend(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        lengths: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        rotary: Rotary | None,
    ) -> Tensor:
        keys, values = self._buffers[:2]
        key_scales, value_scales = self._scales()
        return ops.attend_cached(
            query, key, value, keys, values, lengths, scale=scale, key_scales=key_scales, value_scales=value_scales,
            mask=mask, causal=causal, window=self.window, sinks=self.sinks, sink_positions=self.sink_positions,
            rotary=rotary,
        )  # fmt: skip

    def _scales(self) -> tuple[Tensor | None, Tensor | None]:
        return (self._buffers[2], self._buffers[3]) if len(self._buffers) > 2 else (None, None)

    def _device(self) -> torch.device | None:
        return None if self.lengths is None else self.lengths.device

    def _enter(self, key: Tensor, value: Tensor) -> Tensor:
        """Check the sizes of new tokens and make room for them; the lengths before."""
        if self.lengths is None:
            if key.dim() != 4:
                raise ValueError(f"key has shape {tuple(key.shape)}, but expected (batch, kv_heads, block, width)")
            self.allocate(key.shape[0], key.shape[1], key.shape[3], dtype=key.dtype, device=key.device)
            assert self.lengths is not None
        batch, kv_heads, _, width = self._buffers[0].shape
        block = key.shape[2] if key.dim() == 4 else 0
        for name, new in (("key", key), ("value", value)):
            if new.shape != (batch, kv_heads, block, width):
                raise ValueError(
                    f"{name} has shape {tuple(new.shape)}, but expected ({batch}, {kv_heads}, block, {width}), as the "
                    "tokens before, key and value alike"
                )
        self._make_room(block)
        return self.lengths

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """What an operator refuses is not counted."""
        before = self._most, self._written
        try:
            yield
        except BaseException:
            self._most, self._written = before
            raise

    def _make_room(self, block: int) -> None:
        if self.capacity is not None and self._unseen():
            self._most = None  # the kernel marks a row that does not fit
            return
        most = self._count()
        if self.window is None and most + block > self.room:
            most = self._refresh()  # the longest row may have been cropped or left out
        if self.window is None and most + block > self.room:
            if self.capacity is not None:
                raise ValueError(
                    f"key has {block} tokens behind {most}, but expected at most {self.capacity} in all, the capacity "
                    "of the cache"
                )
            self._grow(max(2 * self.room, most + block))
        self._most = most + block
        self._written = max(self._written, self._most)

    def _unseen(self) -> bool:
        """Whether the host cannot look at the lengths: a step is being compiled, or recorded in a CUDA graph."""
        if _is_recording(self.lengths):
            self._recorded = True
            return True
        return torch.compiler.is_compiling()

    def _grow(self, room: int) -> None:
        for i, buffer in enumerate(self._buffers):
            shape = (*buffer.shape[:2], room, *buffer.shape[3:])
            grown = torch.empty(shape, dtype=buffer.dtype, device=buffer.device)
            grown[:, :, : self._most] = buffer[:, :, : self._most]
            self._buffers[i] = grown

    def _count(self) -> int:
        """The most tokens that a row can have; asked of the device where the host did not count them."""
        return self._refresh() if self._most is None or self._recorded else self._most

    def _refresh(self) -> int:
        self._most = 0 if self.lengths is None or not self.batch else int(self.lengths.max())
        self._written = max(self._written, self._most)
        return self._most

    def _parts(self, block: int, causal: bool) -> list[slice]:
        """What goes in at once: with a window no more than the ring has beside what the first token sees."""
        if self.window is None:
            return [slice(0, block)]
        size = self.room - self.sinks - self.window + 1
        if not causal and block > size:
            raise ValueError(
                f"key has {block} tokens, but expected at most {size} that see each other (causal=False), which a "
                f"capacity of {self.room} has room for beside sinks and window"
            )
        return [slice(start, min(start + size, block)) for start in range(0, block, size)] or [slice(0, 0)]

    def _cropped(self, before: Tensor, lengths: int | Sequence[int] | Tensor) -> tuple[Tensor, int | None]:
        """The lengths after a crop, and the most that the host knows of them."""
        most = self._most
        if isinstance(lengths, int):
            if lengths < 0:
                return (before + lengths).clamp(min=0), None if most is None else max(most + lengths, 0)
            return before.clamp(max=lengths), None if most is None else min(most, lengths)
        if not isinstance(lengths, Tensor):
            most = None
            lengths = torch.tensor(lengths, dtype=torch.int32, device=before.device)
        if lengths.shape != before.shape:
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}, but expected {tuple(before.shape)}")
        return torch.minimum(before, lengths.to(before.dtype)), most

    def _check_crop(self, kept: Tensor) -> None:
        """Refuse lengths that a ring no longer has the window of."""
        assert self.window is not None
        lost = self._let_go()
        for length in kept.tolist():
            if length > self.sinks and max(self.sinks, length - self.window) < lost:
                raise ValueError(
                    f"lengths has {length}, but expected at least {lost + self.window}: of {self._written} tokens "
                    f"those before {lost} were written over, which the window of {self.window} would hold again"
                )

    def _let_go(self) -> int:
        """Tokens before this one, but for sinks, are not in the ring any more."""
        return max(self._lost, self._written - (self.room - self.sinks)) if self.room else 0

    def _place_of(self, token: Tensor) -> Tensor:
        """Where tokens behind the sinks are in a ring."""
        return self.sinks + (token - self.sinks) % (self.room - self.sinks)

    def _read(self, which: int, window: int | None = None) -> Tensor:
        if self.lengths is None or self._dtype is None:
            raise ValueError("the cache is empty, but expected an append before it is read")
        buffer = self._buffers[which]
        scales = self._buffers[2 + which] if len(self._buffers) > 2 else None
        if self.window is None:
            kept = buffer[:, :, : self.length]
            if scales is None:
                return kept
            return (kept.to(torch.float32) * scales[:, :, : self.length].unsqueeze(-1)).to(self._dtype)
        window = self.window if window is None else window
        lengths = self.lengths.long().unsqueeze(1)
        start = (lengths - window).clamp(min=self.sinks)
        count = max(min(window, self.length - self.sinks), 0)
        rest = start + torch.arange(count, device=lengths.device)
        rest = torch.where(rest < self.room, rest, self._place_of(rest))
        first = torch.arange(min(self.sinks, self.length), device=lengths.device).expand(self.batch, -1)
        places = torch.cat((first, rest), 1)
        rows = torch.arange(self.batch, device=lengths.device).unsqueeze(1)
        kept = plain(buffer)[rows, :, places].view(buffer.dtype).transpose(1, 2)
        if scales is None:
            return kept
        return (kept.to(torch.float32) * scales[rows, :, places].transpose(1, 2).unsqueeze(-1)).to(self._dtype)


def storage_dtype(storage: Storage | None) -> torch.dtype | None:
    """The dtype that a storage stands for. ValueError: neither one of the names nor a dtype that is supported."""
    dtype = CODES.get(storage, storage) if isinstance(storage, str) else storage
    floating = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if dtype is not None and dtype not in (*CODES.values(), *floating):
        raise ValueError(f"storage is {storage!r}, but expected 'int8', 'fp8' or a dtype that keys can have")
    return dtype


def _is_recording(lengths: Tensor | None) -> bool:
    """Whether a CUDA graph records what is done to these."""
    return lengths is not None and lengths.is_cuda and torch.cuda.is_current_stream_capturing()


def plain(x: Tensor) -> Tensor:
    """x, or its bytes where PyTorch does not index its dtype."""
    return x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x


def _part_of(rotary: Rotary | None, part: slice) -> Rotary | None:
    if rotary is None or rotary.positions is None:
        return rotary
    return rotary._replace(positions=rotary.positions[:, part])
