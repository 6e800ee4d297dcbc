"""What the arguments of operators have in common: the dtype of the arithmetic, and tensors that broadcast to x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def expand(name: str, value: Tensor, x: Tensor, columns: Sequence[int] = ()) -> Tensor:
    """`value` broadcast to (*x.shape, *columns); `columns` are the sizes of an element's own parameters.

    Raises:
        ValueError: for a shape that does not broadcast, or another device than x's.
        TypeError: for a dtype that is not floating.
    """
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}, but expected float32, float64, bfloat16 or float16")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, but expected x's {x.device}")
    shape = (*x.shape, *columns)
    if value.shape == shape:
        return value
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but expected one that broadcasts to x's {tuple(x.shape)}"
            + " and the parameters of an element" * bool(columns)
        ) from None
