"""Rotary position embedding: pairs of a row's elements turned by angles that grow with the row's position.

Su et al. 2021 (arXiv:2104.09864, section 3.4.2); for pictures, with half of the pairs for each axis, Heo et al. 2024
(arXiv:2403.13298, section 3.2). `ops.attend_cached` and `ops.append_cached` turn queries and keys as they read them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """A rotary embedding by tables of cosines and sines.

    cos, sin: (rows, pairs), any floating dtype; the first 2 `pairs` elements of a query or a key are turned, the rest
        pass through. Row p belongs to position p, unless `positions` says otherwise.
    positions: int32 or int64 (batch or 1, block), the table row of each new token; by default its position in the
        sequence. Tables of the new tokens alone, as transformers computes them, have positions 0, 1, ...
    interleaved: whether pairs are neighbours (2 i, 2 i + 1), as in Su et al., or halves (i, i + pairs), as in Llama.
    axes: 1; or 2 for pictures, where the turned elements are two equal parts, each paired within itself: the first
        turned by the first half of a table row (rows of the picture), the second by the second (columns).
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | None = None
    interleaved: bool = False
    axes: int = 1


def rotary_tables(
    positions: int, width: int, *, base: float = 10_000.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The cosines and sines, each float32 (positions, width / 2), of position times base^(-2 i / width), i = 0, 1, ...

    ValueError: an odd width.
    """
    if width % 2:
        raise ValueError(f"width is {width}, but expected an even number")
    angle = torch.arange(positions, dtype=torch.float64, device=device).unsqueeze(1) * _frequencies(width, base, device)
    return angle.cos().float(), angle.sin().float()


def rotary_tables_2d(
    rows: int,
    columns: int,
    width: int,
    *,
    base: float = 10_000.0,
    prefix: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The cosines and sines, each float32 (prefix + rows * columns, width / 2), for `Rotary(..., axes=2)`.

    A table row belongs to a pixel in raster order: the first half holds its row's angles, the second its column's, as
    `rotary_tables` has them for half the width. The first `prefix` tokens, such as a class, are not turned.

    ValueError: a width that is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width is {width}, but expected a multiple of 4: a pair at least for each axis")
    frequency = _frequencies(width // 2, base, device)
    row, column = (
        torch.arange(n, dtype=torch.float64, device=device).unsqueeze(1) * frequency for n in (rows, columns)
    )
    angle = torch.cat((row.repeat_interleave(columns, 0), column.repeat(rows, 1)), 1)
    angle = torch.cat((angle.new_zeros(prefix, width // 2), angle))
    return angle.cos().float(), angle.sin().float()


def turn(x: Tensor, rotary: Rotary, rows: Tensor) -> Tensor:
    """x (batch, heads, block, width) turned by the table rows (batch, block), in plain PyTorch."""
    cos, sin = (table.to(x.dtype)[rows].unsqueeze(1) for table in (rotary.cos, rotary.sin))  # (batch, 1, block, pairs)
    pairs = cos.shape[-1]
    turned = x[..., : 2 * pairs].unflatten(-1, (rotary.axes, -1))
    cos, sin = (table.unflatten(-1, (rotary.axes, -1)) for table in (cos, sin))
    if rotary.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    first, second = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack((first, second), -1).flatten(-2) if rotary.interleaved else torch.cat((first, second), -1)
    return torch.cat((turned.flatten(-2), x[..., 2 * pairs :]), -1)


def _frequencies(width: int, base: float, device: torch.device | None) -> Tensor:
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    frequency: Tensor = base**-exponent
    return frequency
