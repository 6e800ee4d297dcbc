"""When each element of a network is computed: once, after the last element of the sample that it depends on.

Elements of the sample are numbered in the order in which they are drawn, and step t draws element t. A group of
channels of a field depends, at each of its sites, on the elements up to `latest`; that is found by following sources
forward, and which weights are not zero decides what a channel reads. Followed backward, the steps that read an element
say when it is needed, and that is when it is computed, or with the rest of its row where all of that can be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from pygen.autoregressive.incremental.fields import (
    Array,
    Attention,
    Constant,
    ConversionError,
    Field,
    Fixed,
    Input,
    Linear,
    Pointwise,
    Source,
    increases,
)

NEVER = np.iinfo(np.int32).max  # the step of what nothing reads


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sample: `channels` elements at each site of the raster, the channels of a site in turn."""

    channels: int
    height: int
    width: int

    @property
    def length(self) -> int:
        return self.channels * self.height * self.width

    @property
    def row(self) -> int:
        """Steps of a row."""
        return self.channels * self.width

    def places(self) -> Array:
        """The number of each element, (channels, height, width)."""
        numbers = np.arange(self.length, dtype=np.int32).reshape(self.height, self.width, self.channels)
        return np.ascontiguousarray(numbers.transpose(2, 0, 1))


@dataclasses.dataclass(eq=False)
class Read:
    """What a group reads at each of its sites: one group of a source's field."""

    source: Source
    group: Group


@dataclasses.dataclass(eq=False)
class Group:
    """Channels of a field that are computed at the same steps; arrays are (height, width).

    latest: the last element of the sample that is looked at, -1 for none. step: when it is computed, NEVER for what
    nothing reads.
    """

    field: Field
    channels: Array
    latest: Array
    reads: list[Read]
    need: Array = dataclasses.field(init=False)
    step: Array = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.need = np.full(self.latest.shape, NEVER, np.int32)


@dataclasses.dataclass(eq=False)
class Draw:
    """What the elements of one channel of the sample are drawn from: its source's channels at the element's site."""

    source: Source
    channel: int


class Schedule:
    """Groups of each field with their steps, and when each element is first written and last read."""

    def __init__(self, fields: list[Field], draws: list[Draw], geometry: Geometry) -> None:
        self.fields, self.draws, self.geometry = fields, draws, geometry
        self.groups: dict[Field, list[Group]] = {}
        for field in fields:
            self.groups[field] = list(self._grouped(field))
        self._ask_for_draws()
        for field in reversed(fields):
            for group in self.groups[field]:
                self._place(group)
        self.written = {
            field: np.stack([group.step for group in self.groups[field]]).min(0)
            for field in fields
            if not is_given(field)
        }
        self.read = self._last_reads()

    def of_channels(self, source: Source) -> Iterator[tuple[Group, Array]]:
        """The groups that a source reads from, and which of its channels are theirs."""
        for group in self.groups[source.field]:
            mine = np.isin(source.channels, group.channels)
            if mine.any():
                yield group, np.flatnonzero(mine)

    def _grouped(self, field: Field) -> Iterator[Group]:
        node = field.node
        if isinstance(node, Input):
            for channel, latest in enumerate(self.geometry.places()):
                yield Group(field, np.array([channel]), latest, [])
            return
        if is_given(field):
            return
        reads, used = self._reads(field)
        signatures, member = np.unique(used, axis=0, return_inverse=True)
        member = member.reshape(-1)
        if field.natural:
            signatures, member = np.atleast_2d(used.any(0)), np.zeros_like(member)
        found: dict[bytes, tuple[list[Array], Array, Array]] = {}
        for i, signature in enumerate(signatures):
            latest = np.full((field.height, field.width), -1, np.int32)
            for read, reading in zip(reads, signature, strict=True):
                if reading:
                    np.maximum(latest, self._latest(field, read), out=latest)
            channels = np.flatnonzero(member == i)
            known, _, reading = found.get(latest.tobytes(), ([], latest, np.zeros_like(signature)))
            found[latest.tobytes()] = ([*known, channels], latest, reading | signature)
        for channels_of, latest, signature in found.values():
            mine = [read for read, reading in zip(reads, signature, strict=True) if reading]
            yield Group(field, np.sort(np.concatenate(channels_of)), latest, mine)

    def _reads(self, field: Field) -> tuple[list[Read], Array]:
        """All that a field reads, and (channels, reads) which channel reads what."""
        node, reads, used = field.node, [], []
        sources = node.sources()
        for number, source in enumerate(sources):
            if is_given(source.field):
                continue
            for group, mine in self.of_channels(source):
                reads.append(Read(source, group))
                if isinstance(node, Linear):
                    used.append((node.taps[number].weight[:, mine] != 0).any(1))
                elif isinstance(node, Pointwise):
                    used.append(np.isin(np.arange(field.channels), mine))
                else:
                    used.append(np.ones(field.channels, bool))
        return reads, np.stack(used, 1) if used else np.zeros((field.channels, 0), bool)

    def _latest(self, field: Field, read: Read) -> Array:
        """The last element that a field sees through a read, at each of its sites."""
        node, latest = field.node, read.group.latest
        if isinstance(node, Attention) and read.source is not node.query:
            return _latest_of_keys(node, _at(latest, read.source)).reshape(field.height, field.width)
        return _at(latest, read.source)

    def _ask_for_draws(self) -> None:
        places = self.geometry.places()
        for draw in self.draws:
            for group, _ in self.of_channels(draw.source):
                seen, own = _at(group.latest, draw.source), places[draw.channel]
                if (seen >= own).any():
                    y, x = np.unravel_index(np.argmax(seen >= own), seen.shape)
                    raise ConversionError(
                        f"the network is not causal: the output for {self._name(int(own[y, x]))} depends on "
                        f"{self._name(int(seen[y, x]))}, which is drawn "
                        f"{'at that step' if seen[y, x] == own[y, x] else 'later'}"
                    )
                _lower(group.need, draw.source, own)

    def _name(self, element: int) -> str:
        site, channel = divmod(element, self.geometry.channels)
        row, column = divmod(site, self.geometry.width)
        return f"element {element} of the sample (channel {channel}, row {row}, column {column})"

    def _place(self, group: Group) -> None:
        """Decide when a group is computed, and tell what it reads."""
        if isinstance(group.field.node, Input):
            group.step = group.latest + 1
            return
        # As late as can be, which keeps little; but a row as a whole, when its first element is needed, where all of it
        # is due by then.
        live = group.need < NEVER
        last_due = np.where(live, group.latest + 1, 0).max(1)
        first_need = group.need.min(1)
        whole = (last_due <= first_need)[:, None] & live
        step = np.where(whole, first_need[:, None], group.need)
        group.step = step
        node = group.field.node
        for read in group.reads:
            asked = step
            if isinstance(node, Attention) and read.source is not node.query:
                asked = _first_of_keys(node, step.reshape(-1), read.source)
            _lower(read.group.need, read.source, asked)

    def _last_reads(self) -> dict[Field, Array]:
        """The last step at which each site of a field is read, -1 for never."""
        last = {field: np.full(written.shape, -1, np.int32) for field, written in self.written.items()}
        for field in self.written:
            node = field.node
            for group in self.groups[field]:
                live = np.where(group.step < NEVER, group.step, -1)
                for source in {id(read.source): read.source for read in group.reads}.values():
                    if isinstance(node, Attention) and source is not node.query:
                        last[source.field][:] = NEVER
                    else:
                        _fold(np.maximum, last[source.field], source, live)
        places = self.geometry.places()
        for draw in self.draws:
            if draw.source.field in last:
                _fold(np.maximum, last[draw.source.field], draw.source, places[draw.channel])
        return last


def is_given(field: Field) -> bool:
    """Whether a field is there before the first step."""
    return isinstance(field.node, (Constant, Fixed))


def _at(values: Array, source: Source) -> Array:
    """What a source reads of (height, width) values, -1 where it reads nothing."""
    taken = values[np.maximum(source.rows, 0)][:, np.maximum(source.columns, 0)]
    return np.where((source.rows >= 0)[:, None] & (source.columns >= 0), taken, -1)


def _lower(values: Array, source: Source, asked: Array) -> None:
    """values = min(values, asked), where `source` reads them."""
    _fold(np.minimum, values, source, asked)


def _fold(keep: np.ufunc, values: Array, source: Source, asked: Array) -> None:
    rows, columns = np.flatnonzero(source.rows >= 0), np.flatnonzero(source.columns >= 0)
    if not len(rows) or not len(columns):
        return
    part = asked[np.ix_(rows, columns)]
    to_rows, to_columns = source.rows[rows], source.columns[columns]
    if increases(to_rows) and increases(to_columns):
        place = np.ix_(to_rows, to_columns)
        values[place] = keep(values[place], part)
    else:
        keep.at(values, (to_rows[:, None], to_columns[None, :]), part)


def _latest_of_keys(node: Attention, latest: Array) -> Array:
    """For each query the last element that its keys depend on; latest (height, width) of the keys."""
    running = np.maximum.accumulate(latest.reshape(-1))
    if (node.first == 0).all():
        return np.where(node.last > 0, running[np.maximum(node.last - 1, 0)], -1)
    flat = latest.reshape(-1)
    pairs = zip(node.first, node.last, strict=True)
    return np.array([flat[low:high].max() if high > low else -1 for low, high in pairs])


def _first_of_keys(node: Attention, step: Array, source: Source) -> Array:
    """For each key the first step at which a query looks at it."""
    asked = np.full(len(source.rows) * len(source.columns), NEVER, np.int32)
    for query in np.argsort(-step, kind="stable"):
        asked[node.first[query] : node.last[query]] = step[query]
    return asked.reshape(len(source.rows), len(source.columns))
