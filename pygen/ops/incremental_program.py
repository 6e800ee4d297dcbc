"""The program of an incremental network: int32 numbers that both backends and the reference read.

A header, then these sections, each with the fields of its records:

    grids         height, width
    operations    see OPERATION: what computes one group of channels of a field, at one site of a grid
    sources       see SOURCE: where channels lie, for each row and column of the operation's grid
    instructions  kind, registers a and b, numbers: of a pointwise operation; registers are its sources, then results
    templates     the first task of each, and one more
    tasks         operation, row and column relative to the step's site, sites in a row
    steps         the template of each
    draws         for each channel of the sample the source of its logits, then the source that it is written to
    tables        offsets of rows and columns (NOWHERE for zero), channels to gather, keys of attention

The site of step t is that of element t of the sample; on a grid of another size its row is row * height // sample
height, its column likewise. A step runs the tasks of its template in order, then element t is drawn.

Numbers lie in three spaces: the state of a sample, the weights, and the condition's fields. An address is the row's
offset + the column's offset + the channel's.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

HEADER = (
    "steps", "channels", "height", "width", "vocabulary", "state", "conditions", "weights", "grids", "operations",
    "sources", "instructions", "templates", "tasks", "tables", "widest", "checksum",
)  # fmt: skip
OPERATION = (
    "kind", "grid", "out", "first_source", "sources", "channels", "weights", "first_instruction", "instructions",
    "heads", "first_key", "last_key",
)  # fmt: skip
SOURCE = ("space", "rows", "columns", "offset", "count", "gather", "height", "width")
INSTRUCTION = ("kind", "a", "b", "numbers")
TASK = ("operation", "row", "column", "count")

# In the order of the enums in csrc/incremental.h.
KINDS = ("linear", "pointwise", "norm", "lookup", "attention")
SPACES = ("state", "weights", "conditions")
UNARY = (
    "neg", "exp", "log", "tanh", "sigmoid", "relu", "abs", "sqrt", "rsqrt", "silu", "gelu", "gelu_tanh", "elu",
    "leaky_relu", "softplus", "clamp", "scale",
)  # fmt: skip
BINARY = ("add", "sub", "mul", "div", "maximum", "minimum", "fill")

NOWHERE = -(2**31)  # a row or column that is zero
NO_TABLE = -1
LANES = 16  # channels are stored in whole vectors, so that loops have no tails
PANEL = 64  # output channels whose weights lie together, for each input in turn


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A program (length,) int32 and what it says of its sizes."""

    code: Tensor
    header: dict[str, int] = dataclasses.field(default_factory=dict, init=False)
    _copies: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def on(self, device: torch.device) -> Tensor:
        """The code where a device reads it."""
        if device.type == "cpu":
            return self.code
        if device not in self._copies:
            self._copies[device] = self.code.to(device)
        return self._copies[device]

    def __post_init__(self) -> None:
        self.header.update(zip(HEADER, self.code[: len(HEADER)].tolist(), strict=True))

    @property
    def channels(self) -> int:
        return self.header["channels"]

    @property
    def height(self) -> int:
        return self.header["height"]

    @property
    def width(self) -> int:
        return self.header["width"]

    @property
    def steps(self) -> int:
        """Elements of a sample."""
        return self.header["steps"]

    @property
    def vocabulary(self) -> int:
        """Numbers that an element is drawn from."""
        return self.header["vocabulary"]

    @property
    def state(self) -> int:
        """Numbers that a sample keeps."""
        return self.header["state"]

    @property
    def conditions(self) -> int:
        """Numbers that a sample's condition gives."""
        return self.header["conditions"]

    @property
    def weights(self) -> int:
        return self.header["weights"]

    def sections(self) -> dict[str, Array]:
        """Every section as (records, fields), or (numbers,)."""
        code, header = self.code.numpy(), self.header
        shapes: dict[str, tuple[int, ...]] = {
            "grids": (header["grids"], 2),
            "operations": (header["operations"], len(OPERATION)),
            "sources": (header["sources"], len(SOURCE)),
            "instructions": (header["instructions"], len(INSTRUCTION)),
            "templates": (header["templates"] + 1,),
            "tasks": (header["tasks"], len(TASK)),
            "steps": (header["steps"],),
            "draws": (2, header["channels"]),
            "tables": (header["tables"],),
        }
        found, at = {}, len(HEADER)
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            found[name] = code[at : at + size].reshape(shape)
            at += size
        if at != len(code):
            raise ValueError(f"program has {len(code)} numbers, but its header says {at}")
        return found


def assemble(header: dict[str, int], sections: dict[str, Array]) -> Program:
    """The program of these sections, in the order above."""
    body = np.concatenate([section.reshape(-1) for section in sections.values()])
    # Backends remember by it that they have checked a program.
    header = header | {"checksum": zlib.crc32(body.tobytes()) & 0x7FFFFFFF}
    numbers = np.concatenate([np.array([header[name] for name in HEADER]), body])
    if len(numbers) and (numbers.max() >= 2**31 or numbers.min() < -(2**31)):
        raise ValueError("the network is too large for a program of 32-bit numbers")
    return Program(torch.from_numpy(numbers.astype(np.int32)))
