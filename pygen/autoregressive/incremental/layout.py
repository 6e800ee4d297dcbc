"""Where the elements of each field lie: the order of its channels, and for how many rows and columns there is room.

A row is forgotten after its last read, so its place can be taken by a later one: most fields keep a few rows, or a
single site. What is read in the step that writes it shares its memory with others.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pygen.autoregressive.incremental.fields import Array, Field, Input, Pointwise
from pygen.autoregressive.incremental.schedule import NEVER, Schedule, is_given
from pygen.ops.incremental_program import LANES


@dataclasses.dataclass(eq=False)
class Place:
    """Where a field lies in its space.

    position: (channels,) of each channel among the `stride` numbers of a site. rows, columns: how many are kept.
    """

    position: Array
    stride: int
    rows: int
    columns: int
    start: int = 0

    @property
    def size(self) -> int:
        return self.rows * self.columns * self.stride

    def row_offset(self, rows: Array) -> Array:
        return self.start + rows % self.rows * (self.columns * self.stride)

    def column_offset(self, columns: Array) -> Array:
        return columns % self.columns * self.stride


def padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


def places(schedule: Schedule) -> dict[Field, Place]:
    """Places of all fields but their `start`, which is for `allocate` to find."""
    found: dict[Field, Place] = {}
    for field in reversed(schedule.fields):
        position, stride = _positions(schedule, field, found)
        rows, columns = field.height, field.width
        if not is_given(field):
            rows, columns = _rings(schedule.written[field], schedule.read[field])
        found[field] = Place(position, stride, rows, columns)
    return found


def _positions(schedule: Schedule, field: Field, found: dict[Field, Place]) -> tuple[Array, int]:
    """Groups lie apart, in whole vectors; inside, channels lie in the order of the first pointwise reader, so that it
    reads them side by side."""
    groups = [group.channels for group in schedule.groups[field]] or [np.arange(field.channels)]
    if field.natural or isinstance(field.node, Input):
        rank = np.arange(field.channels)
    else:
        rank = _wished_order(schedule, field, found)
    position, start = np.empty(field.channels, np.int64), 0
    for channels in groups:
        position[channels[np.argsort(rank[channels], kind="stable")]] = start + np.arange(len(channels))
        start += padded(len(channels))
    return position, start


def _wished_order(schedule: Schedule, field: Field, found: dict[Field, Place]) -> Array:
    rank = np.full(field.channels, field.channels, np.int64)
    next_rank = 0

    def wish(channels: Array) -> None:
        nonlocal next_rank
        for channel in channels[rank[channels] == field.channels]:
            if rank[channel] == field.channels:
                rank[channel] = next_rank
                next_rank += 1

    for draw in schedule.draws:
        if draw.source.field is field:
            wish(draw.source.channels)
    for reader in schedule.fields:
        if isinstance(reader.node, Pointwise):
            for source in reader.node.reads:
                if source.field is field:
                    wish(source.channels[np.argsort(found[reader].position)])
    return rank


def _rings(written: Array, read: Array) -> tuple[int, int]:
    """How many rows, and columns of a row, have to be kept."""
    rows = _ring(written.min(1), read.max(1))
    if rows > 1:
        return rows, written.shape[1]
    return 1, max(_ring(*line) for line in zip(written, read, strict=True))


def _ring(written: Array, read: Array) -> int:
    """The fewest places such that none is written again before its last read; place i % count is written at step
    written[i] and last read at read[i]."""
    count = len(written)
    # A later place must not be written before that either: the earliest write from each place on.
    from_here = np.minimum.accumulate(written[::-1])[::-1]
    gone = np.searchsorted(from_here, read, side="right")
    return int(min(count, max(1, (gone - np.arange(count)).max())))


def allocate(schedule: Schedule, found: dict[Field, Place]) -> int:
    """Give every field of the state its start, and return the size of all."""
    at = 0
    own = [field for field in schedule.fields if not is_given(field)]
    passing = [field for field in own if _passing(schedule, field)]
    for field in own:
        if field not in passing:
            found[field].start = at
            at += found[field].size
    # What does not outlive its step is free again after its last reader, in the order of the operations.
    order = {field: i for i, field in enumerate(schedule.fields)}
    last = {field: order[field] for field in passing}
    for reader in own:
        for source in reader.node.sources():
            if source.field in last:
                last[source.field] = max(last[source.field], order[reader])
    for draw in schedule.draws:
        if draw.source.field in last:
            last[draw.source.field] = len(schedule.fields)
    taken: list[tuple[int, int, int]] = []  # start, end, last reader
    end = at
    for field in passing:
        taken = sorted(each for each in taken if each[2] >= order[field])
        start, size = at, found[field].size
        for low, high, _ in taken:
            if low >= start + size:
                break
            start = max(start, high)
        found[field].start = start
        taken.append((start, start + size, last[field]))
        end = max(end, start + size)
    return end


def _passing(schedule: Schedule, field: Field) -> bool:
    """Whether every element is read in the step that writes it, and never after."""
    if isinstance(field.node, Input):
        return False
    read = schedule.read[field]
    for group in schedule.groups[field]:
        live = group.step < NEVER
        if (read[live] != group.step[live]).any():
            return False
    return True
