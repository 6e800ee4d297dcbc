"""Writes a schedule as a program and its weights (see pygen/ops/incremental_program.py)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pygen.autoregressive.incremental.fields import (
    Array,
    Attention,
    Constant,
    Field,
    Fixed,
    Input,
    Linear,
    Lookup,
    Norm,
    Pointwise,
    Source,
    increases,
)
from pygen.autoregressive.incremental.layout import Place, allocate, padded, places
from pygen.autoregressive.incremental.schedule import NEVER, Group, Schedule
from pygen.ops.incremental_program import (
    BINARY,
    KINDS,
    LANES,
    NO_TABLE,
    NOWHERE,
    OPERATION,
    PANEL,
    SPACES,
    UNARY,
    Program,
    assemble,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A program, its weights (length,), and the fields that the condition gives, with where each lies among them."""

    program: Program
    weights: Tensor
    fixed: list[tuple[Fixed, Place]]


class Encoder:
    """Writes one schedule."""

    def __init__(self, schedule: Schedule, vocabulary: int, dtype: torch.dtype) -> None:
        self.schedule, self.vocabulary, self.dtype = schedule, vocabulary, dtype
        self.places = places(schedule)
        self.state = allocate(schedule, self.places)
        self.weights: list[Array] = []
        self.weight_count = 0
        self.tables: list[Array] = []
        self.table_count = 0
        self.known_tables: dict[bytes, int] = {}
        self.sources: list[tuple[int, ...]] = []
        self.operations: list[dict[str, int]] = []
        self.instructions: list[tuple[int, int, int, int]] = []
        self.grids: list[tuple[int, int]] = []
        self.groups: list[Group] = []  # of the operations
        self.fixed: list[tuple[Fixed, Place]] = []
        self.conditions = 0

    def encode(self) -> Encoded:
        for field in self.schedule.fields:
            if isinstance(field.node, Constant):
                self._constant(field, field.node)
            elif isinstance(field.node, Fixed):
                self.places[field].start = self.conditions
                self.conditions += self.places[field].size
                self.fixed.append((field.node, self.places[field]))
        for field in self.schedule.fields:
            for group in self.schedule.groups[field]:
                if not isinstance(field.node, Input) and (group.step < NEVER).any():
                    self._operation(field, group)
        draws = [self._source(draw.source, draw.source.channels) for draw in self.schedule.draws]
        sample = next((field for field in self.schedule.fields if isinstance(field.node, Input)), None)
        writes = [self._out(sample, np.array([c])) for c in range(self.schedule.geometry.channels)] if sample else []
        starts, tasks, steps = self._tasks()
        geometry = self.schedule.geometry
        # A whole vector may be read from the last number of a space on.
        self._weigh(np.zeros(LANES))
        header = {
            "steps": geometry.length, "channels": geometry.channels, "height": geometry.height,
            "width": geometry.width, "vocabulary": self.vocabulary, "state": padded(self.state) + LANES,
            "conditions": self.conditions and padded(self.conditions) + LANES, "weights": self.weight_count,
            "grids": len(self.grids), "operations": len(self.operations), "sources": len(self.sources),
            "instructions": len(self.instructions), "templates": len(starts) - 1, "tasks": len(tasks),
            "tables": self.table_count, "widest": max([padded(self.vocabulary)] + [padded(o["channels"]) for o in
                                                                                   self.operations]),
        }  # fmt: skip
        if not writes:
            writes = [-1] * geometry.channels
        sections = {
            "grids": np.array(self.grids, np.int64),
            "operations": np.array([[o[name] for name in OPERATION] for o in self.operations], np.int64),
            "sources": np.array(self.sources, np.int64),
            "instructions": np.array(self.instructions, np.int64),
            "templates": np.array(starts, np.int64),
            "tasks": tasks,
            "steps": np.array(steps, np.int64),
            "draws": np.array([draws, writes], np.int64),
            "tables": np.concatenate([*self.tables, np.zeros(0, np.int64)]),
        }
        weights = torch.from_numpy(np.concatenate(self.weights)).to(self.dtype)
        return Encoded(assemble(header, sections), weights, self.fixed)

    # What records refer to.

    def _weigh(self, numbers: Array) -> int:
        """Add weights, from a whole vector on; where they are."""
        at = self.weight_count
        size = padded(numbers.size)
        self.weights.append(np.pad(numbers.reshape(-1).astype(np.float64), (0, size - numbers.size)))
        self.weight_count += size
        return at

    def _table(self, numbers: Array) -> int:
        numbers = np.ascontiguousarray(numbers, np.int64)
        key = numbers.tobytes()
        if key not in self.known_tables:
            self.known_tables[key] = self.table_count
            self.tables.append(numbers)
            self.table_count += len(numbers)
        return self.known_tables[key]

    def _record(
        self, place: Place, space: str, rows: Array, columns: Array, positions: Array, keys: tuple[int, int] = (0, 0)
    ) -> int:
        """A source that reads these positions of a field's sites."""
        first = int(positions.min())
        gathers = not np.array_equal(positions, first + np.arange(len(positions)))
        row_offsets = np.where(rows >= 0, place.row_offset(rows), NOWHERE)
        column_offsets = np.where(columns >= 0, place.column_offset(columns), NOWHERE)
        self.sources.append((
            SPACES.index(space), self._table(row_offsets), self._table(column_offsets), 0 if gathers else first,
            len(positions), self._table(positions) if gathers else NO_TABLE, *keys,
        ))  # fmt: skip
        return len(self.sources) - 1

    def _space(self, field: Field) -> str:
        if isinstance(field.node, Constant):
            return "weights"
        return "conditions" if isinstance(field.node, Fixed) else "state"

    def _source(self, source: Source, channels: Array, keys: tuple[int, int] = (0, 0)) -> int:
        """channels: of the field, in the order of the reader."""
        place = self.places[source.field]
        return self._record(
            place, self._space(source.field), source.rows, source.columns, place.position[channels], keys
        )  # fmt: skip

    def _out(self, field: Field, channels: Array) -> int:
        place = self.places[field]
        return self._record(
            place, "state", np.arange(field.height), np.arange(field.width), np.sort(place.position[channels])
        )

    def _grid(self, field: Field) -> int:
        grid = (field.height, field.width)
        if grid not in self.grids:
            self.grids.append(grid)
        return self.grids.index(grid)

    def _constant(self, field: Field, node: Constant) -> None:
        place = self.places[field]
        stored = np.zeros((field.height, field.width, place.stride))
        stored[..., place.position] = node.values.transpose(1, 2, 0)
        place.start = self._weigh(stored)

    # Operations.

    def _operation(self, field: Field, group: Group) -> None:
        place, node = self.places[field], field.node
        channels = group.channels[np.argsort(place.position[group.channels])]  # as they are stored
        record = dict.fromkeys(OPERATION, 0) | {
            "grid": self._grid(field),
            "out": self._out(field, channels),
            "channels": len(channels),
        }
        first_source = len(self.sources)
        if isinstance(node, Linear):
            record |= {"kind": KINDS.index("linear"), "weights": self._linear(node, channels)}
        elif isinstance(node, Pointwise):
            first = len(self.instructions)
            self._pointwise(node, channels)
            record |= {
                "kind": KINDS.index("pointwise"), "first_instruction": first,
                "instructions": len(self.instructions) - first,
            }  # fmt: skip
        elif isinstance(node, Norm):
            record |= {"kind": KINDS.index("norm"), "weights": self._norm(node, channels)}
        elif isinstance(node, Lookup):
            self._source(node.token, node.token.channels)
            table = np.zeros((len(node.table), padded(len(channels))))
            table[:, : len(channels)] = node.table[:, channels]
            # One more number says how many tokens there are.
            record |= {"kind": KINDS.index("lookup"), "weights": self._weigh(table), "heads": len(table)}
        elif isinstance(node, Attention):
            record |= {"kind": KINDS.index("attention"), "heads": node.heads} | self._attention(node)
        record |= {"first_source": first_source, "sources": len(self.sources) - first_source}
        self.operations.append(record)
        self.groups.append(group)

    def _linear(self, node: Linear, channels: Array) -> int:
        parts = []
        for tap in node.taps:
            weight = tap.weight[channels]
            for positions, columns in self._runs(tap.source, (weight != 0).any(0)):
                self._record(
                    self.places[tap.source.field], self._space(tap.source.field), tap.source.rows, tap.source.columns,
                    positions,
                )  # fmt: skip
                block = np.zeros((len(positions), len(channels)))
                rows = self.places[tap.source.field].position[tap.source.channels[columns]] - positions[0]
                if increases(np.sort(rows)):
                    block[rows] = weight[:, columns].T
                else:  # a channel that is read twice
                    np.add.at(block, rows, weight[:, columns].T)
                parts.append(block)
        width = padded(len(channels))
        inputs = np.concatenate([*parts, np.zeros((0, len(channels)))])
        inputs = np.pad(inputs, ((0, 0), (0, width - len(channels))))
        bias = np.pad(node.bias[channels].astype(np.float64), (0, width - len(channels)))
        panels = [inputs[:, at : at + PANEL].reshape(-1) for at in range(0, width, PANEL)]
        return self._weigh(np.concatenate([bias, *panels]))

    def _runs(self, source: Source, used: Array) -> Iterator[tuple[Array, Array]]:
        """The channels that are used as positions side by side, with the columns of the source that they serve; a run
        may span unused channels, but only of its own group, which are there at the same time."""
        place = self.places[source.field]
        groups = [group.channels for group in self.schedule.groups[source.field]]
        for channels in groups or [np.arange(source.field.channels)]:
            columns = np.flatnonzero(used & np.isin(source.channels, channels))
            if len(columns):
                mine = place.position[source.channels[columns]]
                yield np.arange(mine.min(), mine.max() + 1), columns

    def _pointwise(self, node: Pointwise, channels: Array) -> None:
        for source in node.reads:
            self._source(source, source.channels[channels])
        for each in node.instructions:
            kinds = UNARY + BINARY
            numbers = self._weigh(np.array(each.numbers)) if each.numbers else 0
            self.instructions.append((kinds.index(each.kind), each.a, each.b, numbers))

    def _norm(self, node: Norm, channels: Array) -> int:
        """Reads its channels in the order in which they are stored."""
        owner = np.concatenate([np.full(len(source.channels), i) for i, source in enumerate(node.reads)])
        local = np.concatenate([np.arange(len(source.channels)) for source in node.reads])
        cuts = np.flatnonzero(np.diff(owner[channels])) + 1
        for part in np.split(channels, cuts):
            source = node.reads[owner[part[0]]]
            self._source(source, source.channels[local[part]])
        return self._weigh(np.concatenate([
            _vector(node.weight[channels]), _vector(node.bias[channels]), np.array([node.epsilon])
        ]))  # fmt: skip

    def _attention(self, node: Attention) -> dict[str, int]:
        for source, keys in ((node.query, False), (node.key, True), (node.value, True)):
            size = (len(source.rows), len(source.columns)) if keys else (0, 0)
            self._source(source, source.channels, size)
        return {
            "first_key": self._table(node.first), "last_key": self._table(node.last),
            "weights": self._weigh(np.array([node.scale])),
        }  # fmt: skip

    # Tasks.

    def _tasks(self) -> tuple[list[int], Array, list[int]]:
        """First tasks of the templates, tasks, and the template of each step."""
        geometry = self.schedule.geometry
        runs = [_runs_of(group.step, number) for number, group in enumerate(self.groups)]
        # step, operation, row, column, count
        tasks = np.concatenate([*runs, np.zeros((0, 5), np.int64)])
        tasks = tasks[np.lexsort((tasks[:, 3], tasks[:, 2], tasks[:, 1], tasks[:, 0]))]
        tasks = tasks[tasks[:, 0] < geometry.length]
        site = tasks[:, 0] // geometry.channels
        grids = np.array([self.grids[o["grid"]] for o in self.operations] or [(1, 1)])[tasks[:, 1]]
        tasks[:, 2] -= site // geometry.width * grids[:, 0] // geometry.height
        tasks[:, 3] -= site % geometry.width * grids[:, 1] // geometry.width
        bounds = np.searchsorted(tasks[:, 0], np.arange(geometry.length + 1))
        known: dict[bytes, int] = {}
        starts, kept, steps = [0], [], []
        relative = np.ascontiguousarray(tasks[:, 1:])
        for low, high in itertools.pairwise(bounds.tolist()):
            key = relative[low:high].tobytes()
            if key not in known:
                known[key] = len(known)
                kept.append(relative[low:high])
                starts.append(starts[-1] + high - low)
            steps.append(known[key])
        return starts, np.concatenate([*kept, np.zeros((0, 4), np.int64)]), steps


def _vector(numbers: Array) -> Array:
    return np.pad(numbers, (0, padded(len(numbers)) - len(numbers)))


def _runs_of(step: Array, operation: int) -> Array:
    """Sites of one row that follow one another and belong to the same step: (step, operation, row, column, count)."""
    width = step.shape[1]
    live = step < NEVER
    new = np.ones(step.shape, bool)
    new[:, 1:] = step[:, 1:] != step[:, :-1]
    starts = np.flatnonzero(new.reshape(-1))
    counts = np.diff(np.append(starts, step.size))
    starts, counts = starts[live.reshape(-1)[starts]], counts[live.reshape(-1)[starts]]
    rows, columns = starts // width, starts % width
    return np.stack([step.reshape(-1)[starts], np.full(len(starts), operation), rows, columns, counts], 1).astype(
        np.int64
    )
