"""What is not read is dropped, and chains of pointwise operations become one."""

from __future__ import annotations

import numpy as np

from pygen.autoregressive.incremental.fields import Field, Instruction, Pointwise, Source

MOST_INSTRUCTIONS = 24
MOST_SOURCES = 8


def reachable(fields: list[Field], outputs: list[Source]) -> list[Field]:
    """The fields that the outputs depend on, in their order."""
    wanted = {source.field for source in outputs}
    for field in reversed(fields):
        if field in wanted:
            wanted.update(source.field for source in field.node.sources())
    return [field for field in fields if field in wanted]


def fuse(fields: list[Field], outputs: list[Source]) -> list[Field]:
    """Compute a pointwise field inside of its only reader, where that is pointwise too and reads it in place."""
    while True:
        before, fields = fields, _fuse_once(reachable(fields, outputs), outputs)
        if len(fields) == len(before):
            return fields


def _fuse_once(fields: list[Field], outputs: list[Source]) -> list[Field]:
    readers: dict[Field, set[Field | None]] = {field: set() for field in fields}
    for field in fields:
        for source in field.node.sources():
            readers[source.field].add(field)
    for source in outputs:
        readers[source.field].add(None)
    for field in fields:
        if isinstance(field.node, Pointwise):
            _inline(field.node, readers, field)
    return reachable(fields, outputs)


def _inline(node: Pointwise, readers: dict[Field, set[Field | None]], reader: Field) -> None:
    """Replace sources of a node by what computes them."""
    reads: list[Source] = []
    # Registers are numbered once the sources are known: ~i is instruction i until then.
    instructions: list[Instruction] = []
    registers: list[int] = []

    def number_of(source: Source) -> int:
        for i, known in enumerate(reads):
            if known.field is source.field and all(
                np.array_equal(getattr(known, name), getattr(source, name)) for name in ("channels", "rows", "columns")
            ):
                return i
        reads.append(source)
        return len(reads) - 1

    room = MOST_INSTRUCTIONS - len(node.instructions)
    spare = MOST_SOURCES - len(node.reads)
    for source in node.reads:
        inner = source.field.node
        shared = sum(len(each.channels) for each in node.reads if each.field is source.field) > source.field.channels
        if (
            not isinstance(inner, Pointwise)
            or readers[source.field] != {reader}
            or not source.in_place
            or shared
            or len(inner.instructions) > room
            or len(inner.reads) - 1 > spare
        ):
            registers.append(number_of(source))
            continue
        room -= len(inner.instructions)
        spare -= len(inner.reads) - 1
        own = [number_of(_seen_through(each, source)) for each in inner.reads]
        _append(instructions, inner.instructions, own)
        registers.append(~(len(instructions) - 1))
    _append(instructions, node.instructions, registers)
    node.reads = reads

    def register(number: int) -> int:
        return len(reads) + ~number if number < 0 else number

    node.instructions = [
        Instruction(each.kind, register(each.a), register(each.b), each.numbers) for each in instructions
    ]
    for source in reads:
        readers[source.field].add(reader)


def _seen_through(inner: Source, outer: Source) -> Source:
    """What a reader reads of a source of its source, which it reads in place."""
    return Source(inner.field, inner.channels[outer.channels], inner.rows, inner.columns)


def _append(instructions: list[Instruction], more: list[Instruction], own: list[int]) -> None:
    """Add instructions whose sources are now the registers `own`."""
    before = len(instructions)

    def register(number: int) -> int:
        return own[number] if number < len(own) else ~(before + number - len(own))

    for each in more:
        instructions.append(Instruction(each.kind, register(each.a), register(each.b), each.numbers))
