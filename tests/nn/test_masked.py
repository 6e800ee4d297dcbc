"""Masked convolutions read what they say they read, and the cropped kernels are the published masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pygen.nn.masked import HorizontalConv2d, VerticalConv2d, colour_mask, shift_down


@given(kernel_size=st.sampled_from([1, 3, 5]), height=st.integers(1, 5), width=st.integers(1, 5))
def test_vertical_is_the_full_convolution_without_the_rows_below(kernel_size: int, height: int, width: int) -> None:
    conv = VerticalConv2d(2, 4, kernel_size)
    x = torch.randn(2, 2, height, width)
    full = torch.zeros(4, 2, kernel_size, kernel_size)
    full[:, :, : kernel_size // 2 + 1] = conv.weight.detach()
    expected = torch.nn.functional.conv2d(x, full, conv.bias, padding=kernel_size // 2)
    torch.testing.assert_close(conv(x), expected)


@given(
    kernel_size=st.sampled_from([1, 3, 5]), width=st.integers(1, 5), colours=st.integers(1, 3), strict=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_horizontal_reads_the_left_and_the_colours_before(
    kernel_size: int, width: int, colours: int, strict: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    conv = HorizontalConv2d(2 * colours, 4 * colours, kernel_size, strict=strict, colours=colours).double()
    x = torch.randn(1, 2 * colours, 2, width, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(conv, x)[0, :, :, :, 0]  # (out, row, column, in, row, column)
    for out in range(4 * colours):
        for column in range(width):
            reads = torch.zeros(2 * colours, 2, width, dtype=torch.bool)
            reads[:, 1, max(0, column - kernel_size // 2) : column] = True
            group = out // 4
            reads[: 2 * (group if strict else group + 1), 1, column] = True
            assert torch.equal(jacobian[out, 1, column] != 0, reads)


def test_colour_mask_is_that_of_the_paper() -> None:
    assert colour_mask(3, 3, 3, strict=True).int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert colour_mask(3, 6, 3, strict=False).int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]


def test_shift_down() -> None:
    assert shift_down(torch.tensor([[[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]])).tolist() == [[[[0, 0], [1, 2], [3, 4]]]]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kernel_size is 4, but expected an odd positive number"):
        VerticalConv2d(1, 1, 4)
    with pytest.raises(ValueError, match="in_channels is 4, but expected a multiple of the 3 colours"):
        HorizontalConv2d(4, 3, 3, colours=3)
