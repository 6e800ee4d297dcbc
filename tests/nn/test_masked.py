"""Masked convolutions read what they say they read, and the cropped kernels are the published masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pygen.nn.masked import (
    CausalConv2d,
    CausalConvTranspose2d,
    HorizontalConv2d,
    MaskedConv2d,
    VerticalConv2d,
    colour_mask,
    shift_down,
    shift_right,
)


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


@pytest.mark.parametrize(("rows", "columns", "centred"), [(2, 3, True), (1, 5, True), (2, 2, False), (3, 1, False)])
@pytest.mark.parametrize("stride", [1, 2])
def test_causal_convolutions_read_what_comes_before(rows: int, columns: int, centred: bool, stride: int) -> None:
    layer = CausalConv2d(1, 1, (rows, columns), centred=centred, stride=stride).double()
    x = torch.randn(1, 1, 6, 8, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == (1, 1, 6 // stride, 8 // stride)
    row, column = 4, 4
    (gradient,) = torch.autograd.grad(out[0, 0, row // stride, column // stride], x)
    reach = columns // 2 if centred else 0
    expected = {(r, c) for r in range(row - rows + 1, row + 1) for c in range(column + reach - columns + 1, 8)
                if c <= column + reach}  # fmt: skip
    assert {(int(r), int(c)) for r, c in gradient[0, 0].nonzero()} == expected


@pytest.mark.parametrize(("columns", "centred"), [(3, True), (2, False)])
def test_a_transposed_convolution_reads_the_pixel_that_its_square_came_from(columns: int, centred: bool) -> None:
    layer = CausalConvTranspose2d(1, 1, (2, columns), centred=centred, stride=2).double()
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == (1, 1, 6, 8)
    for row, column in ((2, 4), (3, 5)):
        (gradient,) = torch.autograd.grad(out[0, 0, row, column], x, retain_graph=True)
        read = {(int(r), int(c)) for r, c in gradient[0, 0].nonzero()}
        assert (1, 2) in read
        assert all(r <= 1 and (centred or c <= 2) for r, c in read)


def test_an_even_kernel_has_no_centre() -> None:
    with pytest.raises(ValueError, match=r"kernel_size is \(2, 2\), but expected an odd number of columns"):
        CausalConv2d(1, 1, (2, 2), centred=True)


@pytest.mark.parametrize("strict", [True, False])
def test_a_masked_square_reads_what_comes_before(strict: bool) -> None:
    layer = MaskedConv2d(1, 1, 3, strict=strict).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, 0, 2, 2], x)
    expected = {(1, 1), (1, 2), (1, 3), (2, 1)} | (set() if strict else {(2, 2)})
    assert {(int(r), int(c)) for r, c in gradient[0, 0].nonzero()} == expected


def test_shifts_drop_the_last_row_or_column() -> None:
    x = torch.arange(1.0, 7.0).reshape(1, 1, 2, 3)
    assert shift_right(x).tolist() == [[[[0, 1, 2], [0, 4, 5]]]]
    assert shift_down(x).tolist() == [[[[0, 0, 0], [1, 2, 3]]]]
