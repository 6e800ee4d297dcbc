"""The dtypes, layouts and tolerances that every operator is tested with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from pygen import ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Half an ulp of the output dtype, doubled for the reference's own rounding.
RELATIVE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def opcheck(operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None, **options: Any) -> None:
    """PyTorch's own checks of a raw operator. What they need of Python's side is loaded with the operator's family."""
    for name in ops.__all__:
        getattr(ops, name)
    library.opcheck(operator, arguments, keywords, **options)


def close(actual: Tensor, expected: Tensor, *, scale: float = 1.0) -> None:
    """assert_close at the rounding of the dtype, relative to the largest value; `scale` for sums of many terms."""
    tolerance = RELATIVE[actual.dtype] * scale
    finite = expected.detach()[expected.isfinite()].double().abs()
    size = max(1.0, float(finite.max())) if finite.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def interleaved(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every other channel (dimension 1) of a tensor of twice as many."""
    return torch.randn(shape[0], 2 * shape[1], *shape[2:], dtype=torch.float32, device=device).to(dtype)[:, 0::2]


def half(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The second half of the channels of a tensor of twice as many: a conditioner's output."""
    return torch.randn(shape[0], 2 * shape[1], *shape[2:], dtype=torch.float32, device=device).to(dtype)[:, shape[1] :]


def transposed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stored with its last and first dimensions exchanged."""
    return torch.randn(*reversed(shape), device=device).to(dtype).permute(*reversed(range(len(shape))))


def dense(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def unaligned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous, but starting one element past an aligned address."""
    count = 1
    for size in shape:
        count *= size
    return torch.randn(count + 1, device=device).to(dtype)[1:].view(shape)


LAYOUTS: dict[str, Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]] = {
    "dense": dense, "half": half, "interleaved": interleaved, "transposed": transposed, "unaligned": unaligned,
}  # fmt: skip
