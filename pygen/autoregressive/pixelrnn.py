"""PixelRNN: p(x) = prod_i p(x_i | x_1 .. x_{i-1}), in raster order, by convolutional LSTMs over the rows above and the
pixels to the left (van den Oord et al. 2016, arXiv:1601.06759, sections 3.1-3.4).

[o, f, i] = s(K_ss * h' + K_is * x), g = tanh(of the same), c = f c' + i g, h = o tanh(c) (eq. 3), where h' and c' are
those of the row above (Row LSTM), or of the pixels to the left and above (diagonal BiLSTM).
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.autoregressive.config import AutoregressiveConfig
from pygen.autoregressive.model import AutoregressiveModel
from pygen.autoregressive.state import State
from pygen.nn.masked import HorizontalConv2d, MaskedConv2d, shift_down


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelRNNConfig(AutoregressiveConfig):
    """What a PixelRNN is made of; the defaults are of the size of the paper's model of CIFAR-10.

    layers: LSTM layers. width: units of an LSTM, a multiple of the picture's channels; there are twice as many channels
        between the layers. head: channels between the layers and the logits, a multiple of the picture's channels.
    first_kernel_size: odd, of the convolution of the picture. kernel_size: odd, of the Row LSTM's convolutions.
    dropout: of whole channels, in the head.
    """

    layers: int = 12
    width: int = 126
    head: int = 1023
    first_kernel_size: int = 7
    kernel_size: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("layers")
        self.require_colours("width", "head")
        self.require_odd("first_kernel_size", "kernel_size")
        self.require_probability("dropout")


class Cell(NamedTuple):
    """What an LSTM hands on: its output and its memory, (n, width, ...) each."""

    hidden: Tensor
    memory: Tensor


def lstm(gates: Tensor, memory: Tensor) -> Cell:
    """One step of an LSTM: gates (n, 4 width, ...), the four of a unit side by side, and memory (n, width, ...)."""
    # Side by side, so that all four are of the unit's colour group.
    out, forget, write, value = gates.unflatten(1, (-1, 4)).unbind(2)
    memory = forget.sigmoid() * memory + write.sigmoid() * value.tanh()
    return Cell(out.sigmoid() * memory.tanh(), memory)


class RecurrentLayer(nn.Module):
    """A layer on (n, 2 width, height, width') that adds to what it reads; either of whole pictures, or pixel by pixel.

    margin: how many columns beside a pixel it reads. ways: in which it goes through a row, 1 or 2.
    """

    margin: int
    ways: int

    def __init__(self, config: PixelRNNConfig) -> None:
        super().__init__()
        self.width = config.width
        self.merge = HorizontalConv2d(config.width, 2 * config.width, 1, colours=config.shape[0])
        self.label = None if config.classes is None else nn.Embedding(config.classes, 4 * config.width)
        if self.label is not None:
            nn.init.zeros_(self.label.weight)

    def labelled(self, gates: Tensor, condition: Tensor | None) -> Tensor:
        """The gates (n, 4 width, height, width') with what the label adds."""
        return gates if self.label is None else gates + self.label(condition)[:, :, None, None]

    @abstractmethod
    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """The whole picture."""

    @abstractmethod
    def pixel(self, kept: Kept, row: int, column: int, condition: Tensor | None) -> Tensor:
        """The result (n, 2 width, 1, 1) at a pixel, from what was kept of those before and of its own input."""

    def end_row(self, kept: Kept, row: int, condition: Tensor | None) -> None:
        """What can be computed once a row is complete."""


class Kept(NamedTuple):
    """What is kept of one layer: its input (n, 2 width, height, m + width' + m), and for each of its ways the cells
    (n, width, 1 + height, m + width' + m), with a margin of m columns of zeros and a row of zeros above."""

    x: Tensor
    cells: tuple[Cell, ...]

    def select(self, index: Tensor) -> Kept:
        """The rows at `index`, int64 (m,), in memory of their own."""
        return Kept(self.x[index], tuple(Cell(each.hidden[index], each.memory[index]) for each in self.cells))


class RowLSTMLayer(RecurrentLayer):
    """Row LSTM: the previous cell is the row above, through a convolution (section 3.1)."""

    ways = 1

    def __init__(self, config: PixelRNNConfig) -> None:
        super().__init__(config)
        width, kernel_size = config.width, config.kernel_size
        self.margin = kernel_size // 2
        self.input_to_state = HorizontalConv2d(2 * width, 4 * width, kernel_size, colours=config.shape[0])
        self.state_to_state = nn.Conv1d(width, 4 * width, kernel_size, padding=self.margin, bias=False)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        gates = self.labelled(self.input_to_state(x), condition)
        cell = Cell(*x.new_zeros(2, len(x), self.width, x.shape[3]).unbind())
        rows = []
        for row in gates.unbind(2):
            cell = lstm(row + self.state_to_state(cell.hidden), cell.memory)
            rows.append(cell.hidden)
        return x + self.merge(torch.stack(rows, dim=2))  # type: ignore[no-any-return]

    def pixel(self, kept: Kept, row: int, column: int, condition: Tensor | None) -> Tensor:
        here, margin = column + self.margin, self.margin
        window = kept.x[:, :, row : row + 1, column : here + 1]
        mapped = F.conv2d(window, masked_weight(self.input_to_state), self.input_to_state.bias)
        gates = self.labelled(mapped, condition)[:, :, 0]
        (cells,) = kept.cells
        above = cells.hidden[:, :, row, column : here + margin + 1]
        gates = gates + F.conv1d(above, self.state_to_state.weight)
        cell = lstm(gates, cells.memory[:, :, row, here : here + 1])
        store(cells, cell, row, here)
        return kept.x[:, :, row : row + 1, here : here + 1] + self.merge(cell.hidden[..., None])  # type: ignore[no-any-return]


class DiagonalLayer(RecurrentLayer):
    """Diagonal BiLSTM: the previous cells are those to the left and above, and on a second way those to the right and
    above, whose result goes to the row below, so that no pixel reads a later one (section 3.2)."""

    margin, ways = 1, 2

    def __init__(self, config: PixelRNNConfig) -> None:
        super().__init__(config)
        width, colours = config.width, config.shape[0]
        self.of_way = nn.ModuleList(
            nn.ModuleDict(
                {
                    "input_to_state": HorizontalConv2d(2 * width, 4 * width, 1, colours=colours),
                    # The output of the pixel above, then of the one beside.
                    "state_to_state": nn.Conv2d(2 * width, 4 * width, 1, bias=False),
                }
            )
            for _ in range(self.ways)
        )

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        left, right = (self._gates(way, x, condition) for way in range(2))
        hidden = self._diagonals(0, left) + shift_down(self._diagonals(1, right.flip(3)).flip(3))
        return x + self.merge(hidden)  # type: ignore[no-any-return]

    def pixel(self, kept: Kept, row: int, column: int, condition: Tensor | None) -> Tensor:
        here = column + 1
        x = kept.x[:, :, row : row + 1, here : here + 1]
        left, right = kept.cells
        self._visit(0, left, self._gates(0, x, condition), row, here, here - 1)
        hidden = left.hidden[:, :, row + 1, here] + right.hidden[:, :, row, here]
        return x + self.merge(hidden[:, :, None, None])  # type: ignore[no-any-return]

    def end_row(self, kept: Kept, row: int, condition: Tensor | None) -> None:
        gates = self._gates(1, kept.x[:, :, row : row + 1, 1:-1], condition)
        for column in reversed(range(gates.shape[3])):
            self._visit(1, kept.cells[1], gates[..., column : column + 1], row, column + 1, column + 2)

    def _gates(self, way: int, x: Tensor, condition: Tensor | None) -> Tensor:
        return self.labelled(cast("nn.ModuleDict", self.of_way[way])["input_to_state"](x), condition)

    def _previous(self, way: int, above: Tensor, beside: Tensor) -> Tensor:
        """What the outputs (n, width, m) above and beside add to the gates, (n, 4 width, m)."""
        previous = torch.cat((above, beside), dim=1)[..., None]
        return cast("nn.ModuleDict", self.of_way[way])["state_to_state"](previous)[..., 0]  # type: ignore[no-any-return]

    def _visit(self, way: int, cells: Cell, gates: Tensor, row: int, here: int, beside: int) -> None:
        """One pixel, whose cell is at [row + 1, here] in `cells`; gates (n, 4 width, 1, 1)."""
        previous = self._previous(way, cells.hidden[:, :, row, here, None], cells.hidden[:, :, row + 1, beside, None])
        cell = lstm(gates[..., 0] + previous, cells.memory[:, :, row + 1, beside, None])
        store(cells, cell, row, here)

    def _diagonals(self, way: int, gates: Tensor) -> Tensor:
        """All pixels from left to right, one diagonal after another; gates (n, 4 width, height, width')."""
        n, _, height, width = gates.shape
        # Row r moves r columns to the right, and a diagonal becomes a column.
        skewed = F.pad(gates, (0, height)).flatten(2)[:, :, : height * (width + height - 1)]
        skewed = skewed.unflatten(2, (height, width + height - 1))
        row = torch.arange(height, device=gates.device)
        cell = Cell(*gates.new_zeros(2, n, self.width, height).unbind())
        columns = []
        for diagonal, column in enumerate(skewed.unbind(3)):
            above = F.pad(cell.hidden, (1, -1))
            cell = lstm(column + self._previous(way, above, cell.hidden), cell.memory)
            # Outside the picture there is nothing to hand on.
            inside = (row <= diagonal) & (diagonal < row + width)
            cell = Cell(cell.hidden * inside, cell.memory * inside)
            columns.append(cell.hidden)
        back = torch.unflatten(F.pad(torch.stack(columns, dim=3).flatten(2), (0, height)), 2, (height, width + height))
        return back[..., :width]


class PixelRNN(AutoregressiveModel):
    """An exact probability of discrete pictures, and samples element by element; see `AutoregressiveModel`.

    A recipe says of which layers: `RowLSTM` or `DiagonalBiLSTM`.
    """

    config: PixelRNNConfig
    layer: type[RecurrentLayer]

    def __init__(self, config: PixelRNNConfig | None = None) -> None:
        config = config or PixelRNNConfig()
        super().__init__(config)
        colours = config.shape[0]
        self.first = MaskedConv2d(colours, 2 * config.width, config.first_kernel_size, strict=True, colours=colours)
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.layers))
        self.hidden = HorizontalConv2d(2 * config.width, config.head, 1, colours=colours)
        self.head = HorizontalConv2d(config.head, colours * config.levels, 1, colours=colours)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        state = self.first(x)
        for layer in self.layers:
            state = layer(state, condition)
        return self.to_logits(state)

    def to_logits(self, state: Tensor) -> Tensor:
        """(n, 2 width, height, width') to (n, channels * levels, height, width')."""
        hidden = F.dropout2d(F.relu(self.hidden(F.relu(state))), self.config.dropout, self.training)
        return cast("Tensor", self.head(hidden))

    @torch.no_grad()
    def start(
        self, n: int, *, condition: Tensor | None = None, guidance: float | None = None, length: int | None = None
    ) -> State:
        self.check_start(n, guidance, length)
        return PixelRNNState(self, n, self.check_condition(condition, n))


class RowLSTM(PixelRNN):
    """A PixelRNN of Row LSTM layers."""

    layer = RowLSTMLayer


class DiagonalBiLSTM(PixelRNN):
    """A PixelRNN of diagonal BiLSTM layers."""

    layer = DiagonalLayer


class PixelRNNState(State):
    """The picture so far and what every layer read and handed on, so that nothing is computed twice.

    x: (rows, channels, reach + height, reach + width + reach), zeros around the picture. kept: of each layer.
    """

    def __init__(self, model: PixelRNN, rows: int, condition: Tensor | None) -> None:
        super().__init__(rows, model.length)
        self.model = model
        self.condition = condition
        channels, height, width = self.shape = model.config.shape
        self.reach = model.config.first_kernel_size // 2
        weight = model.first.weight
        self.x = weight.new_zeros(rows, channels, self.reach + height, width + 2 * self.reach)
        self.kept = []
        for each in model.layers:
            layer = cast("RecurrentLayer", each)
            columns, units = width + 2 * layer.margin, model.config.width
            cells = (Cell(*weight.new_zeros(2, rows, units, height + 1, columns).unbind()) for _ in range(layer.ways))
            self.kept.append(Kept(weight.new_zeros(rows, 2 * units, height, columns), tuple(cells)))

    def first(self) -> Tensor:
        return self._logits(0)

    def feed(self, tokens: Tensor) -> Tensor:
        if self.position == 0:
            self._logits(0)
        found = []
        for number, token in enumerate(tokens.unbind(1), self.position):
            channel, row, column = self._place(number)
            self.x[:, channel, self.reach + row, self.reach + column] = self.model.dequantize(token).to(self.x.dtype)
            found.append(self._logits(number + 1))
        return torch.stack(found, dim=1)

    def select(self, index: Tensor) -> None:
        index = index.to(self.x.device)
        self.x = self.x[index]
        self.kept = [kept.select(index) for kept in self.kept]
        if self.condition is not None:
            self.condition = self.condition[index]

    def _place(self, number: int) -> tuple[int, int, int]:
        """The channel, row and column of an element."""
        channels, _, width = self.shape
        pixel, channel = divmod(number, channels)
        return channel, pixel // width, pixel % width

    def _logits(self, number: int) -> Tensor:
        """The logits (rows, vocabulary) of an element. All of its pixel is computed again for each colour: what the
        masks let a colour read is there."""
        channel, row, column = self._place(number)
        if row and column == 0 and channel == 0:
            for layer, kept in zip(self.model.layers, self.kept, strict=True):
                cast("RecurrentLayer", layer).end_row(kept, row - 1, self.condition)
        window = self.x[:, :, row : row + self.reach + 1, column : column + 2 * self.reach + 1]
        state = F.conv2d(window, masked_weight(self.model.first), self.model.first.bias)
        for each, kept in zip(self.model.layers, self.kept, strict=True):
            layer = cast("RecurrentLayer", each)
            kept.x[:, :, row, column + layer.margin] = state[:, :, 0, 0]
            state = layer.pixel(kept, row, column, self.condition)
        return self.model.to_logits(state)[:, :, 0, 0].chunk(self.shape[0], dim=1)[channel]


def masked_weight(layer: HorizontalConv2d | MaskedConv2d) -> Tensor:
    """The weight of a masked convolution without what its mask leaves out."""
    return layer.weight if layer.mask is None else layer.weight * layer.mask


def store(cells: Cell, cell: Cell, row: int, column: int) -> None:
    """Put the cell (n, width, 1) of a pixel where `cells`, with a row of zeros above, have its place."""
    cells.hidden[:, :, row + 1, column] = cell.hidden[..., 0]
    cells.memory[:, :, row + 1, column] = cell.memory[..., 0]
