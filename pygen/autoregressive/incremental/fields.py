"""A network as fields: values with channels at every site of a grid, each computed from others by one node.

A tensor of the traced network is a view of fields: every element is a number, the identity of the field element that it
shows, or -1 for zero. Whatever only moves elements (slices, pads, permutations, concatenations) then needs no code of
its own: the same operation applied to the numbers gives the new view. A node that computes reads the numbers back as
sources: which channels of which field, at which row and column for each row and column of its own grid.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

ZERO = -1  # an element that is no field's: it is zero


class ConversionError(ValueError):
    """A network that `incremental` cannot convert; the sentence names the module and the operation."""


class NotSeparable(ConversionError):
    """A row of the grid reads different rows of its source in different columns."""


@dataclasses.dataclass(eq=False)
class Field:
    """(channels, height, width) values of a sample. `start` is the identity of the first one, in that order.

    natural: channels are stored in their order, as the operations of attention expect them.
    """

    node: Node
    channels: int
    height: int
    width: int
    start: int
    natural: bool = False

    @property
    def size(self) -> int:
        return self.channels * self.height * self.width

    @property
    def moves(self) -> bool:
        """Whether it has more than one site."""
        return self.height * self.width > 1

    def ids(self) -> Tensor:
        return torch.arange(self.start, self.start + self.size).view(self.channels, self.height, self.width)


@dataclasses.dataclass(eq=False)
class Source:
    """Channels of a field, for each row and column of a reading grid the row and column of the field, -1 for zero."""

    field: Field
    channels: Array
    rows: Array
    columns: Array

    @property
    def in_place(self) -> bool:
        """Whether every site reads the same site."""
        return self.at_own_rows and len(self.columns) == self.field.width and is_range(self.columns)

    @property
    def at_own_rows(self) -> bool:
        return len(self.rows) == self.field.height and is_range(self.rows)

    def only(self, channels: Array) -> Source:
        return Source(self.field, self.channels[channels], self.rows, self.columns)

    def with_maps(self, rows: Array, columns: Array) -> Source:
        """For a grid whose rows and columns are these rows and columns of this one, -1 for none."""
        return Source(self.field, self.channels, through(rows, self.rows), through(columns, self.columns))


def increases(numbers: Array) -> bool:
    """Whether every number is larger than the one before, so that none comes twice."""
    return bool((numbers[1:] > numbers[:-1]).all())


def is_range(numbers: Array) -> bool:
    return bool((numbers == np.arange(len(numbers))).all())


def through(outer: Array, inner: Array) -> Array:
    """inner[outer], and -1 where outer is."""
    return np.where(outer >= 0, inner[np.maximum(outer, 0)], -1)


class Node:
    """What computes a field. `sources` are all that it reads."""

    def sources(self) -> list[Source]:
        return []


@dataclasses.dataclass(eq=False)
class Input(Node):
    """The sample itself."""


@dataclasses.dataclass(eq=False)
class Constant(Node):
    """Numbers of the network: (channels, height, width)."""

    values: Array


@dataclasses.dataclass(eq=False)
class Fixed(Node):
    """What depends on the condition alone: computed once a sample, by PyTorch.

    value: its number on the tape. arrangement: how it becomes (channels, height, width).
    """

    value: int
    arrangement: Arrangement


@dataclasses.dataclass(eq=False)
class Tap:
    """weight (out channels, channels of the source) times what the source reads."""

    source: Source
    weight: Array


@dataclasses.dataclass(eq=False)
class Linear(Node):
    """bias + the sum of its taps: convolutions, matrices, sums over channels."""

    taps: list[Tap]
    bias: Array

    def sources(self) -> list[Source]:
        return [tap.source for tap in self.taps]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A step of a pointwise expression: `kind` of registers a and b, with numbers of its own.

    Registers are the sources, then the results of the instructions before.
    """

    kind: str
    a: int
    b: int = 0
    numbers: tuple[float, ...] = ()


@dataclasses.dataclass(eq=False)
class Pointwise(Node):
    """The last of its instructions, element by element; all sources have the channels of the field."""

    instructions: list[Instruction]
    reads: list[Source]

    def sources(self) -> list[Source]:
        return self.reads


@dataclasses.dataclass(eq=False)
class Norm(Node):
    """(x - mean) / sqrt(variance + epsilon) over the channels of a site, times weight plus bias."""

    reads: list[Source]
    weight: Array
    bias: Array
    epsilon: float

    def sources(self) -> list[Source]:
        return self.reads


@dataclasses.dataclass(eq=False)
class Lookup(Node):
    """table[token] of a source that holds whole numbers: table (tokens, channels)."""

    token: Source
    table: Array

    def sources(self) -> list[Source]:
        return [self.token]


@dataclasses.dataclass(eq=False)
class Attention(Node):
    """softmax(scale q k^T) v per head; a site looks at the sites first .. last (not included) in raster order."""

    query: Source
    key: Source
    value: Source
    heads: int
    scale: float
    first: Array
    last: Array

    def sources(self) -> list[Source]:
        return [self.query, self.key, self.value]


class Network:
    """The fields found so far."""

    def __init__(self) -> None:
        self.fields: list[Field] = []
        self._starts: list[int] = []
        self._next = 0

    def add(self, node: Node, channels: int, height: int, width: int) -> Field:
        field = Field(node, channels, height, width, self._next)
        self._next += field.size
        self.fields.append(field)
        self._starts.append(field.start)
        return field

    def add_constant(self, values: Tensor) -> Field:
        """values (channels, height, width); rows or columns that are all alike become one."""
        array = values.detach().numpy()
        for axis in (1, 2):
            if array.shape[axis] > 1 and (array == array.take([0], axis)).all():
                array = array.take([0], axis)
        return self.add(Constant(np.ascontiguousarray(array)), *array.shape)

    def owners(self, ids: Array) -> Array:
        """For each identity the number of its field, in `fields`; -1 for ZERO."""
        return np.where(ids >= 0, np.searchsorted(self._starts, ids, side="right") - 1, -1)

    def sites(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of each identity in its field; -1 for ZERO, and for fields with one site only."""
        owner = self.owners(ids.numpy())
        used = np.flatnonzero(np.bincount(owner.ravel() + 1)) - 1
        row, column = np.full(ids.shape, -1), np.full(ids.shape, -1)
        for number in used[used >= 0]:
            field = self.fields[number]
            if field.moves:
                mine = owner == number
                place = (ids.numpy()[mine] - field.start) % (field.height * field.width)
                row[mine], column[mine] = place // field.width, place % field.width
        return torch.from_numpy(row), torch.from_numpy(column)

    def decode(self, grid: Tensor) -> list[tuple[Array, Source | None]]:
        """What a grid of identities (channels, height, width) reads: for sets of its channels the source, None for
        zeros.

        NotSeparable: the row that is read depends on the column, or the channel on the place.
        """
        ids = grid.numpy()
        channels = len(ids)
        left = np.arange(channels)
        found: list[tuple[Array, Source | None]] = []
        flat = ids.reshape(channels, -1)
        empty = flat.max(1) < 0
        if empty.any():
            found.append((left[empty], None))
            left = left[~empty]
        while len(left):
            source, matches = self._source_like(ids, left)
            if not len(matches):
                raise NotSeparable("elements of one row are read from several rows")
            found.append((matches, source))
            left = np.setdiff1d(left, matches, assume_unique=True)
        return found

    def _source_like(self, ids: Array, left: Array) -> tuple[Source, Array]:
        """The source of the first channel of `left`, and which channels of `left` it serves."""
        width = ids.shape[2]
        first = ids[left[0]]
        place = int(np.argmax(first.reshape(-1) >= 0))
        y, x = divmod(place, width)
        field = self.fields[bisect.bisect_right(self._starts, int(first[y, x])) - 1]
        sites = field.height * field.width

        def maps(line: Array, divide: bool) -> Array:
            inside = (line >= field.start) & (line < field.start + field.size)
            at = (line - field.start) % sites
            return np.where(inside, at // field.width if divide else at % field.width, -1)

        rows, columns = maps(first[:, x], True), maps(first[y, :], False)
        shape = np.where((rows[:, None] >= 0) & (columns >= 0), rows[:, None] * field.width + columns, -1)
        of_channel = (ids[left, y, x] - field.start) // sites
        mine = (of_channel >= 0) & (of_channel < field.channels) & (ids[left, y, x] >= 0)
        candidates, of_channel = left[mine], of_channel[mine]
        same = np.empty(len(candidates), bool)
        for start in range(0, len(candidates), 64):
            part = slice(start, start + 64)
            base = field.start + of_channel[part, None, None] * sites
            same[part] = (ids[candidates[part]] == np.where(shape >= 0, base + shape, ZERO)).all((1, 2))
        return Source(field, of_channel[same], rows, columns), candidates[same]


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which dimensions of a tensor are rows and columns; the others are channels.

    flat: rows and columns are one dimension, and this is the raster place of each of its entries.
    """

    rows: int | None
    columns: int | None
    flat: Tensor | None = dataclasses.field(default=None, compare=False)
    grid: tuple[int, int] | None = None  # of a flat one

    def places(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Row and column of each element of a tensor of a shape."""
        if self.flat is not None and self.grid is not None:
            along = [(self.rows, self.flat // self.grid[1]), (self.columns, self.flat % self.grid[1])]
        else:
            along = [(d, torch.arange(1 if d is None else shape[d])) for d in (self.rows, self.columns)]
        rows, columns = (
            line.view([-1 if i == d else 1 for i in range(len(shape))]).expand(shape) for d, line in along
        )  # fmt: skip
        return rows, columns


@dataclasses.dataclass(eq=False)
class Arrangement:
    """How a tensor of a shape is (channels, height, width), and back."""

    shape: tuple[int, ...]
    roles: Roles

    def __post_init__(self) -> None:
        roles, dimensions = self.roles, range(len(self.shape))
        spatial = [d for d in (roles.rows, roles.columns) if d is not None]
        if roles.flat is not None:
            spatial = spatial[:1]
        self.channel_dimensions = [d for d in dimensions if d not in spatial]
        self.order = (*self.channel_dimensions, *spatial)
        channels = math.prod(self.shape[d] for d in self.channel_dimensions)
        height, width = (1 if d is None else self.shape[d] for d in (roles.rows, roles.columns))
        self.grid = (channels, *(roles.grid or (height, width)))

    def to_grid(self, tensor: Tensor) -> Tensor:
        grid = tensor.expand(self.shape).permute(self.order).reshape(self.grid[0], -1)
        if self.roles.flat is not None:
            grid = torch.empty_like(grid).index_copy_(1, self.roles.flat, grid)
        return grid.reshape(self.grid)

    def from_grid(self, grid: Tensor) -> Tensor:
        flat = grid.reshape(grid.shape[0], -1)
        if self.roles.flat is not None:
            flat = flat[:, self.roles.flat]
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return flat.reshape([self.shape[d] for d in self.order]).permute(back)


def find_roles(network: Network, ids: Tensor) -> Roles:
    """Which dimensions of a view are rows and columns, by where its elements lie.

    NotSeparable: no dimension can be told to be the rows, or the columns.
    """
    row, column = network.sites(ids)
    rows, columns = (
        [d for d, moves in enumerate(_varying(where, row >= 0)) if moves] for where in (row, column)
    )  # fmt: skip
    if len(rows) > 1 or len(columns) > 1:
        raise NotSeparable("rows and columns lie along several dimensions")
    if not rows or rows != columns:
        return Roles(rows[0] if rows else None, columns[0] if columns else None)
    # Rows and columns are one dimension: each of its entries has to be a site of the grid that is read.
    others = [d for d in range(ids.dim()) if d != rows[0]]
    row, column = (where.permute(*others, rows[0]).reshape(-1, ids.shape[rows[0]]).amax(0) for where in (row, column))
    height, width = int(row.max()) + 1, int(column.max()) + 1
    places = row * width + column
    if not torch.equal(places.sort().values, torch.arange(height * width)):
        raise NotSeparable("a flattened picture is cut or padded")
    return Roles(rows[0], rows[0], places, (height, width))


def roles_of_places(row: Tensor, column: Tensor) -> Roles | None:
    """Roles of a tensor whose elements lie in these rows and columns; None where it has no rows, or columns, of its
    own."""
    found = []
    for where in (row, column):
        for d, stride in enumerate(where.stride()):
            if stride == 0:
                where = where.narrow(d, 0, min(where.shape[d], 1))
        moves = _varying(where, torch.ones((), dtype=torch.bool)) if where.numel() else [False] * where.dim()
        found.append([d for d, moved in enumerate(moves) if moved])
    rows, columns = found
    if len(rows) > 1 or len(columns) > 1:
        return None
    if not rows or rows != columns:
        return Roles(rows[0] if rows else None, columns[0] if columns else None)
    others = [d for d in range(row.dim()) if d != rows[0]]
    row, column = (where.permute(rows[0], *others).reshape(row.shape[rows[0]], -1)[:, 0] for where in (row, column))
    height, width = int(row.max()) + 1, int(column.max()) + 1
    places = row * width + column
    if not torch.equal(places.sort().values, torch.arange(height * width)):
        return None
    return Roles(rows[0], rows[0], places, (height, width))


def _varying(where: Tensor, valid: Tensor) -> list[bool]:
    """For each dimension whether `where` changes along it."""
    low = torch.where(valid, where, torch.iinfo(where.dtype).max)
    high = torch.where(valid, where, -1)
    return [where.shape[d] > 1 and bool((high.amax(d) > low.amin(d)).any()) for d in range(where.dim())]
