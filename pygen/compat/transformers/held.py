"""What pygen's cache layers share: keys and values that stay in place until somebody else reads them.

`update` copies nothing of what a layer holds. It returns stand-ins, which pygen's attention function follows back to
the layer, so that appending and attending are one call, and which any other function finds to be keys and values.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
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
    """The last `length` keys and values of a layer, read together and once.

    block: how many of them are new; after: tokens of the layer with these.
    """

    layer: HeldLayer
    length: int
    block: int
    after: int
    read: Block | None = None

    def both(self) -> Block:
        if self.read is None:
            self.read = self.layer.read(self.length)
        return self.read

    def can_be_attended_to(self, block: int) -> bool:
        """Whether the layer can attend from so many queries: not where it was read, which a ring may have nothing left
        of, or has gone on since; nor from other tokens than the new ones, as in cross-attention."""
        return (
            self.read is None
            and block == self.block
            and self.after == self.layer.get_seq_length()
            and self.layer.holds(block)
        )


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
        self._graph: Block | None = None  # all that is visible, where a gradient goes through it
        self._before = 0  # tokens before the last block
        # The first of a cache's layers, which the others are to agree with.
        self.leader: HeldLayer | None = None

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
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return self._update_with_graph((key_states, value_states))
        self._graph = None
        block = key_states.shape[2]
        length = self.get_mask_sizes(block)[0]
        self._enter(block)
        self._waiting = key_states, value_states
        reading = Reading(self, length, block, self._length)
        return Held(reading, 0, key_states), Held(reading, 1, value_states)

    def _update_with_graph(self, block: Block) -> Block:
        """Append a block, and return ordinary tensors, through which a gradient goes as in transformers' caches."""
        before = self._graph
        if before is None and self._length:
            before = self.read(self.get_mask_sizes(0)[0])  # which had no gradient
        new = block[0].shape[2]
        length = self.get_mask_sizes(new)[0]
        self._enter(new)
        self._waiting = block[0].detach(), block[1].detach()
        self.settle()
        if before is not None:
            keys, values = (torch.cat((old.to(own.dtype), own), 2) for old, own in zip(before, block, strict=True))
            block = keys, values
        keys, values = (whole[:, :, whole.shape[2] - length :] for whole in block)
        self._graph = keys, values
        return keys, values

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
        self._graph = None
        with self._counted():
            self._enter(query.shape[2])
            return self._attend(query, block, self._wide(mask), causal, scale, rotary)

    def holds(self, block: int) -> bool:
        """Whether all that the tokens of the last block see is here, once it is appended."""
        return True

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
        """Count new tokens, before they are appended. RuntimeError: the first layer had other tokens before them."""
        leader = self.leader
        if leader is not None and leader._length and leader._before != self._length:
            raise RuntimeError(
                f"a layer of the cache has {self._length} tokens, but expected {leader._before}, as many as the first "
                "layer had before this block: a step before it broke off, and the cache is to be reset"
            )
        self._before = self._length
        self._length += block

    def _follow(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do with what has a gradient what was done with the rows."""
        if self._graph is not None:
            keys, values = self._graph
            self._graph = change(keys), change(values)

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
