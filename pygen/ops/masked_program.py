"""The steps of a masked network's inverse, and of its gradient, as programs for the kernels of csrc/masked.*.

Steps are put into blocks, as in a blocked triangular solve. What the units of a block need of earlier blocks is a few
large matrix products at its start, independent of each other ("wide"); what is left inside of the block is small, and
goes in sequence. The reverse sweep takes the same blocks from last to first, with the matrices transposed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pygen.ops.kept import KeptResult
from pygen.ops.masked_network import MaskedNetwork, Tensors, affine_of
from pygen.ops.masked_order import Integers, Placement
from pygen.ops.masked_units import ACTIVATIONS

# In the order of `enum class Kind` in csrc/masked.h.
LINEAR, ACTIVATION, ADD, MULTIPLY, SCALE, TRANSFORM, ACCUMULATE, SOLVE, STORE = range(9)
# What a product adds to, if not to constants: kContinue and kZero of csrc/masked.h.
CONTINUE, ZERO = -1, -2
# Rows whose weights lie together, for each source in turn: kPanel of csrc/masked.h.
PANEL = 6

Span = tuple[int, int]
Instruction = list[int]


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the packed weights of a linear node lie in its layer's weight, and which of them the mask forbids."""

    node: int
    index: Tensor
    forbidden: Tensor


@dataclasses.dataclass(frozen=True)
class Program:
    """What the kernels read, as int64: [stages, instructions, operands, rows, outputs]; for each stage its first
    instruction, its first sequential one and its end; the instructions of 8 numbers each; the operands."""

    code: Tensor
    outputs: int
    packings: Sequence[Packing]


class _Writer:
    """Collects the instructions of one program."""

    def __init__(self, network: MaskedNetwork, placement: Placement) -> None:
        self.network = network
        self.placement = placement
        self.wide: list[Instruction] = []
        self.narrow: list[Instruction] = []
        self._instructions: list[Instruction] = []
        self._stages: list[tuple[int, int, int]] = []
        self._operands: list[Integers] = []
        self._operand_count = 0
        self._products: dict[int, list[Instruction]] = {}  # of each linear node
        self._indices: dict[int, list[Integers]] = {}  # of the weights that they read

    def refer(self, operands: Integers) -> int:
        """Put operands into the table; where they begin."""
        self._operands.append(operands.reshape(-1))
        self._operand_count += operands.size
        return self._operand_count - operands.size

    def product(
        self, target: list[Instruction], node: int, rows: Span, sources: Span, start: int, *, transposed: bool = False
    ) -> None:
        """Rows of a linear node from rows of its source, or with `transposed` rows of the source from rows of the node.

        start: the first constant that the rows start from, CONTINUE or ZERO.
        """
        (begin, end), (low, high) = rows, sources
        if begin == end:
            return
        to, of = self.network.nodes[node].sources[0], node
        if not transposed:
            to, of = of, to
        units, inputs = self.placement.order[to][begin:end], self.placement.order[of][low:high]
        mask = self.placement.masks[node]
        if not (mask[np.ix_(inputs, units)] if transposed else mask[np.ix_(units, inputs)]).any():
            if start == CONTINUE:
                return
            inputs = inputs[:0]
        instruction = [LINEAR, self._row(to, begin), len(units), self._row(of, low), len(inputs), 0, start, 0]
        target.append(instruction)
        self._products.setdefault(node, []).append(instruction)
        width, first = self.network.nodes[node].layer.weight.shape[1], self.network.nodes[node].columns[0]
        if transposed:
            index = inputs * width + (first + units[:, None])
        else:
            index = units[:, None] * width + (first + inputs)
        whole = len(units) // PANEL
        panels = index[: whole * PANEL].reshape(whole, PANEL, len(inputs)).transpose(0, 2, 1)
        self._indices.setdefault(node, []).extend((panels.reshape(-1), index[whole * PANEL :].T.reshape(-1)))

    def clear(self, target: list[Instruction], index: int, rows: Span) -> None:
        """Set rows of a node to zero."""
        if rows[0] < rows[1]:
            target.append([LINEAR, self._row(index, rows[0]), rows[1] - rows[0], 0, 0, 0, ZERO, 0])

    def elementwise(self, kind: int, index: int, rows: Span, operands: Integers, *fields: int) -> None:
        """An instruction for rows of a node, with operands for each."""
        head = [kind, self._row(index, rows[0]), rows[1] - rows[0], self.refer(operands), *fields]
        self.narrow.append(head + [0] * (8 - len(head)))

    def _row(self, index: int, row: int) -> int:
        return self.placement.base[index] + row

    def store(self, nodes: Sequence[int]) -> int:
        """Write nodes out side by side, each in its own order of units; the number of columns."""
        rows = np.concatenate([self.placement.row_of[index] for index in nodes])
        operands = np.stack((rows, np.arange(len(rows))), 1)
        self.narrow.append([STORE, 0, len(rows), self.refer(operands), 0, 0, 0, 0])
        return len(rows)

    def end_stage(self) -> None:
        begin = len(self._instructions)
        self._instructions += self.wide + self.narrow
        self._stages.append((begin, begin + len(self.wide), len(self._instructions)))
        self.wide, self.narrow = [], []

    def finish(self, outputs: int) -> Program:
        """Packed weights lie node by node, and within a node in the order of the program."""
        packings, total = [], 0
        for node, products in sorted(self._products.items()):
            for instruction in products:
                instruction[5] = total
                total += instruction[2] * instruction[4]
            index = np.concatenate(self._indices[node])
            units, columns = np.divmod(index, self.network.nodes[node].layer.weight.shape[1])
            allowed = self.placement.masks[node][units, columns - self.network.nodes[node].columns[0]]
            small = index.astype(np.int32) if index.max(initial=0) < 2**31 else index
            packings.append(Packing(node, torch.from_numpy(small), torch.from_numpy(np.flatnonzero(~allowed))))
        header = [len(self._stages), len(self._instructions), self._operand_count, self.placement.rows, outputs]
        parts = [np.asarray(part, np.int64).reshape(-1) for part in (header, self._stages, self._instructions)]
        return Program(torch.from_numpy(np.concatenate([*parts, *self._operands])), outputs, packings)


class MaskedPlan:
    """The programs of one network, their weights packed, and the columns of the samples that they read.

    unit_of: (features, per input), the output unit that is the k-th parameter of input i.
    """

    def __init__(self, network: MaskedNetwork, unit_of: Integers) -> None:
        self.network = network
        self.per_input = unit_of.shape[1]
        self.placement = Placement(network, unit_of)
        moving = self.placement.nodes
        # What the context alone decides, and a node reads: columns of the samples after y.
        self.fixed: dict[int, int] = {}
        # (node, position of a source) -> the column of the node's derivative by it, where that is not 1.
        self.slopes: dict[tuple[int, int], int] = {}
        width, slopes_width = network.features, network.features * (1 + 2 * self.per_input)
        for index in moving:
            node = network.nodes[index]
            for position, source in enumerate(node.sources):
                if source not in moving and source not in self.fixed:
                    self.fixed[source] = width
                    width += network.nodes[source].units
                if source in moving and node.kind in ("activation", "multiply", "normalize"):
                    self.slopes[index, position] = slopes_width
                    slopes_width += node.units
        # Nodes in which parameters or the context act: their cotangents are what the reverse sweep is for.
        self.reported = [
            index for index in moving
            if network.nodes[index].kind in ("linear", "normalize")
            or any(source not in moving for source in network.nodes[index].sources)
        ]  # fmt: skip
        self._constants: dict[int, int] = {}  # the first constant of a node
        self._orders = {index: torch.from_numpy(order) for index, order in self.placement.order.items()}
        self.programs = {"inverse": self._write_inverse(), "backward": self._write_backward()}
        self.forget()
        self._placed: dict[tuple[str, torch.device], Tensor] = {}

    def forget(self) -> None:
        """Drop the packed weights."""
        self._weights: dict[str, KeptResult[Tensor]] = {name: KeptResult() for name in self.programs}
        self._constant_values: KeptResult[Tensor] = KeptResult()

    def code(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """A program on the host, where it is checked, and on the device, where it runs."""
        code = self.programs[name].code
        return code, self._on(device, f"{name} code", code)

    def _on(self, device: torch.device, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the plan on a device, copied there once: a copy at each call would wait for the device."""
        if tensor.device == device:
            return tensor
        key = (name, device)
        if key not in self._placed and not torch.compiler.is_compiling():
            self._placed[key] = tensor.to(device)
        return self._placed[key] if key in self._placed else tensor.to(device)

    def weights(self, name: str, tensors: Tensors) -> Tensor:
        """The weights in the order in which a program reads them."""
        return tensors.made_once(self._weights[name], lambda: self._pack(name, tensors))

    def _pack(self, name: str, tensors: Tensors) -> Tensor:
        parts = [tensors.own[0].new_zeros(0, dtype=tensors.dtype)]
        for packing in self.programs[name].packings:
            weight = tensors.own[self.network.nodes[packing.node].slots[0]]
            index = self._on(weight.device, f"{name} index {packing.node}", packing.index)
            forbidden = self._on(weight.device, f"{name} forbidden {packing.node}", packing.forbidden)
            part = weight.reshape(-1).index_select(0, index).to(parts[0].dtype)
            parts.append(part.index_fill_(0, forbidden, 0.0))
        return torch.cat(parts)

    def constants(self, tensors: Tensors) -> Tensor:
        """Biases in the order of their rows, scales beside shifts, parameters of activations."""
        return tensors.made_once(self._constant_values, lambda: self._gather_constants(tensors))

    def _gather_constants(self, tensors: Tensors) -> Tensor:
        parts = [tensors.own[0].new_zeros(0, dtype=tensors.dtype)]
        for index in self._constants:
            node, order = self.network.nodes[index], self._orders[index]
            order = self._on(parts[0].device, f"order {index}", order)
            if node.kind == "activation":
                parts.append(parts[0].new_full((1,), node.parameter))
            elif node.kind == "normalize":
                parts.append(torch.stack(affine_of(node, tensors), 1)[order].reshape(-1))
            else:
                bias = tensors.given(node.slots[1])
                parts.append(parts[0].new_zeros(node.units) if bias is None else bias[order])
        return torch.cat(parts)

    def _write_inverse(self) -> Program:
        """Samples are [y | what the context decides]; the result is x."""
        network, place = self.network, self.placement
        writer = _Writer(network, place)
        total = 0
        for index in place.nodes:
            node = network.nodes[index]
            size = {"linear": node.units, "normalize": 2 * node.units, "activation": 1}.get(node.kind, 0)
            if size:
                self._constants[index] = total
                total += size
        linear = [index for index in place.nodes if network.nodes[index].kind == "linear"]
        hidden = [index for index in place.nodes if index not in (0, place.output)]
        for first, last in place.blocks:
            for index in linear:
                rows = place.range(index, first, last)
                known = place.range(network.nodes[index].sources[0], 0, first - 1)
                writer.product(writer.wide, index, rows, known, self._constants[index] + rows[0])
            for step in range(first, last + 1):
                if step > 0:
                    self._compute(writer, place.output, step, first)
                    inputs = place.range(0, step, step)
                    parameters = place.base[place.output] + inputs[0] * self.per_input
                    writer.elementwise(TRANSFORM, 0, inputs, place.order[0][slice(*inputs)], parameters, self.per_input)
                for index in hidden:
                    self._compute(writer, index, step, first)
            if last == place.last:
                writer.store([0])
            writer.end_stage()
        return writer.finish(network.features)

    def _compute(self, writer: _Writer, index: int, step: int, first: int) -> None:
        """What a block that begins at step `first` adds to a node's units of one step."""
        node, place = self.network.nodes[index], self.placement
        rows = place.range(index, step, step)
        if rows[0] == rows[1]:
            return
        if node.kind == "linear":
            # Outputs come before the inputs of their step, hidden units after them.
            known = place.range(node.sources[0], first, step - (index == place.output))
            writer.product(writer.narrow, index, rows, known, CONTINUE)
            return
        units = place.order[index][slice(*rows)]
        operands = np.stack([place.locate(source, units, self.fixed) for source in node.sources], 1)
        if node.kind == "activation":
            code = list(ACTIVATIONS).index(node.name)
            writer.elementwise(ACTIVATION, index, rows, operands, code, self._constants[index])
        elif node.kind == "normalize":
            writer.elementwise(SCALE, index, rows, operands, 0, self._constants[index] + 2 * rows[0])
        else:
            writer.elementwise(ADD if node.kind == "add" else MULTIPLY, index, rows, operands)

    def _write_backward(self) -> Program:
        """Samples are [c | a | b | slopes]: the cotangent of x_i is xbar_i = c_i + what later units pass back, and that
        of its k-th parameter is a_ik xbar_i + b_ik. The result is xbar, then the cotangents of the reported nodes."""
        place = self.placement
        writer = _Writer(self.network, place)
        linear: dict[int, list[int]] = {index: [] for index in place.nodes}
        elementwise: dict[int, list[tuple[int, int]]] = {index: [] for index in place.nodes}
        for index in place.nodes:
            for position, source in enumerate(self.network.nodes[index].sources):
                if self.network.nodes[index].kind == "linear":
                    linear[source].append(index)
                elif source in elementwise:
                    elementwise[source].append((index, position))

        def collect(index: int, step: int, last: int) -> None:
            """What a block that ends at step `last` adds to the cotangents of a node's units of one step."""
            rows = place.range(index, step, step)
            for reader in linear[index]:
                known = place.range(reader, step + (reader == place.output), last)
                writer.product(writer.narrow, reader, rows, known, CONTINUE, transposed=True)
            for reader, position in elementwise[index]:
                units = place.order[index][slice(*rows)]
                slope = self.slopes.get((reader, position))
                columns = np.full(len(units), -1) if slope is None else slope + units
                if len(units):
                    operands = np.stack((place.row_of[reader][units], columns), 1)
                    writer.elementwise(ACCUMULATE, index, rows, operands)

        hidden = [index for index in place.nodes if index not in (0, place.output)]
        for index in hidden:
            alive = place.range(index, 0, place.last)[1]
            writer.clear(writer.wide, index, (alive, len(place.order[index])))
        for first, last in reversed(place.blocks):
            for index in (0, *hidden):
                rows = place.range(index, first, last)
                if not linear[index]:
                    writer.clear(writer.wide, index, rows)
                for count, reader in enumerate(linear[index]):
                    known = place.range(reader, last + 1, place.last)
                    # Wide instructions run side by side: one for each target, the rest after them.
                    target, start = (writer.narrow, CONTINUE) if count else (writer.wide, ZERO)
                    writer.product(target, reader, rows, known, start, transposed=True)
            for step in range(last, first - 1, -1):
                for index in reversed(hidden):
                    collect(index, step, last)
                if step > 0:
                    collect(0, step, last)
                    inputs = place.range(0, step, step)
                    parameters = place.base[place.output] + inputs[0] * self.per_input
                    columns = place.order[0][slice(*inputs)]
                    fields = (parameters, self.per_input, self.network.features)
                    writer.elementwise(SOLVE, 0, inputs, columns, *fields)
            if first == 0:
                outputs = writer.store([0, *self.reported])
            writer.end_stage()
        return writer.finish(outputs)
