"""The 16-bit dtypes inside a CPU kernel, over all their values and the roundings between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pygen import ops

# x' = x, and x' = z, through a kernel that converts both ways.
IDENTITY = torch.tensor([[0.0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]])


def same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bits, except that any NaN is as good as another."""
    assert actual.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_comes_back(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    zero = torch.zeros_like(x)
    finite = x[x.isfinite()]
    same_bits(
        ops.diffusion_step(finite, zero[: len(finite)], IDENTITY, step=0), finite + 0.0
    )  # the kernel's sum makes 0 of -0
    wide = ops.diffusion_step(x.float() * 0, zero, IDENTITY, step=1, noise=x)
    nan = x.isnan()
    assert torch.equal(wide.isnan(), nan | ~x.isfinite())  # inf * 0 is in the sum
    assert torch.equal(wide[x.isfinite()], finite.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even(dtype):
    exact = torch.arange(2**15, dtype=torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()]
    ties = (exact[1:].double() + exact[:-1].double()).div(2).float()
    largest = torch.finfo(dtype).max
    edges = torch.tensor([0.0, largest, 65519.0, 65519.99, 65520.0, 65536.0, 3.3e38, 3.4028235e38, float("inf")])
    random = torch.randint(0, 2**31 - 1, (200_000,), dtype=torch.int32).view(torch.float32)
    z = torch.cat([exact, ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(0.0)), edges, random])
    z = torch.cat([z, -z])
    zero = torch.zeros_like(z, dtype=dtype)
    same_bits(ops.diffusion_step(zero, zero, IDENTITY, step=1, noise=z), (z + 0.0).to(dtype))
