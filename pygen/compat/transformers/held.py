"""What pygen's cache layers share: keys and values that stay in place until somebody else reads them.

`update` copies nothing of what a layer holds. It returns stand-ins, which pygen's attention function follows back to
the layer, so that appending and attending are one call, and which any other function finds to be keys and values.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import CacheLayerMixin

from pygen.ops import Rotary

Block = tuple[Tensor, Tensor]  # the keys and the values of new tokens, (batch, kv_heads, block, width) each


@dataclasses.dataclass
class Reading:
    """The last `length` keys and values of a layer, read together and once."""

    layer: HeldLayer
    length: int
    read: Block | None = None

    def both(self) -> Block:
        if self.read is None:
            self.read = self.layer.read(self.length)
        return self.read


class Held(Tensor):
    """The keys, or values, (batch, kv_heads, length, width) that a layer holds; read when an operation uses them."""

    reading: Reading
    which: int

    @staticmethod
    def __new__(cls, reading: Reading, which: int, block: Tensor) -> Held:
        batch, heads, _, width = block.shape
        held: Held = Tensor._make_wrapper_subclass(
            cls, (batch, heads, reading.length, width), dtype=block.dtype, device=block.device
        )
        held.reading, held.which = reading, which
        return held

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Held({'values' if self.which else 'keys'} of {self.reading.layer!r}, {tuple(self.shape)})"

    def read(self) -> Tensor:
        """The keys or values as a tensor of their own kind."""
        return self.reading.both()[self.which]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(Held, Held.read, (args, kwargs or {}))
        return function(*args, **kwargs)


class HeldLayer(CacheLayerMixin):
    """One layer of a cache. A block that `update` was given waits until it is attended to or read, and is then in."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    # Without the base class's, which sets what are properties here.
    def __init__(self) -> None:
        self._length = 0  # with what waits
        self._waiting: Block | None = None

    @property
    def is_initialized(self) -> bool:
        return self._length > 0

    @property
    def keys(self) -> Tensor | None:
        """(batch, kv_heads, tokens, width); None where there are none."""
        return self._all(0)

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self._all(1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: sizes, dtype and device are those of the first keys."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Block:
        """Take new keys and values, (batch, kv_heads, block, width) each; the ones to attend to, as `Held`."""
        self.settle()
        block = key_states.shape[2]
        reading = Reading(self, self.get_mask_sizes(block)[0])
        self._enter(block)
        self._waiting = key_states, value_states
        return Held(reading, 0, key_states), Held(reading, 1, value_states)

    def attend(self, query: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        """Attend from the last block, and append it where it still waits: (batch, heads, block, width)."""
        with self._counted():
            waiting, self._waiting = self._waiting, None
            return self._attend(query, waiting, self._wide(mask), causal, scale, None)

    def append_and_attend(
        self,
        query: Tensor,
        block: Block,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        rotary: Rotary,
    ) -> Tensor:
        """Append a block and attend from it, all turned by `rotary`: (batch, heads, block, width)."""
        self.settle()
        with self._counted():
            self._enter(query.shape[2])
            return self._attend(query, block, self._wide(mask), causal, scale, rotary)

    def sees_all(self, block: int) -> bool:
        """Whether a token sees all tokens before it, were a block the first; masks of the model's aside."""
        return True

    def take_first(self) -> Block | None:
        """Append the block that waits, and return it, where it is all that there is; None where it is not."""
        if self._waiting is None or self._waiting[0].shape[2] != self._length:
            return None
        waiting = self._waiting
        self.settle()
        return waiting

    def settle(self) -> None:
        """Append the block that waits, which nobody has attended to."""
        if self._waiting is not None:
            with self._counted():
                waiting, self._waiting = self._waiting, None
                self._append(waiting)

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        raise NotImplementedError("a cache of pygen's cannot be offloaded, as transformers' own can (offloading=True)")

    def prefetch(self) -> None:
        self.offload()

    def moves_sinks(self, block: int) -> bool:
        """Whether a token of the next block has sinks nearer in the cache than in the sequence."""
        return False

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """A block that is refused is gone, and not counted."""
        waiting = 0 if self._waiting is None else self._waiting[0].shape[2]
        before = self._length - waiting
        try:
            yield
        except BaseException:
            self._uncount(before)
            raise

    def _uncount(self, length: int) -> None:
        """Be of that length again, after a block was refused."""
        self._length = length

    def _enter(self, block: int) -> None:
        """Count new tokens, before they are appended."""
        self._length += block

    def _wide(self, mask: Tensor | None) -> Tensor | None:
        """A mask with a column for every token so far, of one that has those of a window only."""
        if mask is None:
            return None
        before = self._length - mask.shape[3]
        return F.pad(mask, (before, 0), value=False if mask.dtype == torch.bool else -torch.inf) if before > 0 else mask

    def _all(self, which: int) -> Tensor | None:
        return self.read(self.get_mask_sizes(0)[0])[which] if self._length else None

    @abc.abstractmethod
    def _append(self, block: Block) -> None: ...

    @abc.abstractmethod
    def read(self, length: int) -> Block:
        """The last `length` keys and values, of which a block that waits is one."""

    @abc.abstractmethod
    def _attend(
        self,
        query: Tensor,
        block: Block | None,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        rotary: Rotary | None,
    ) -> Tensor:
        """Append the block, or find it appended where it is None, and attend from it."""
