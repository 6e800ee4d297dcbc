"""One matrix over the channels: every path against the sum it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pygen.nn.mixing import mix_channels


@given(
    n=st.integers(1, 3), channels=st.one_of(st.integers(1, 6), st.integers(31, 34)),
    positions=st.lists(st.integers(1, 4), max_size=3), bias=st.booleans(), turned=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_mixes_the_channels_of_each_position(n, channels, positions, bias, turned, seed):
    torch.manual_seed(seed)
    x = torch.randn(n, *positions, channels, dtype=torch.float64).movedim(-1, 1)
    x = x if turned else x.contiguous()
    weight = torch.randn(channels, channels, dtype=torch.float64)
    shift = torch.randn(channels, dtype=torch.float64) if bias else None
    expected = torch.einsum("oc,nc...->no...", weight, x)
    if shift is not None:
        expected = expected + shift.view(-1, *(1 for _ in positions))
    torch.testing.assert_close(mix_channels(x, weight, shift), expected)


@pytest.mark.parametrize("channels", [4, 40])
def test_gradients(channels):
    x = torch.randn(2, channels, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, channels, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, channels, 3, 2, dtype=torch.float64)
    found = torch.autograd.grad((mix_channels(x, weight, bias) * cotangent).sum(), (x, weight, bias))
    torch.testing.assert_close(found[0], torch.einsum("oc,nohw->nchw", weight, cotangent))
    torch.testing.assert_close(found[1], torch.einsum("nohw,nchw->oc", cotangent, x))
    torch.testing.assert_close(found[2], cotangent.sum((0, 2, 3)))
