"""The residual networks: shapes over odd sizes, the identity at the start, and independence of the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pygen.nn.residual import ResidualBlock, ResidualDecoder, ResidualEncoder, downsample, pyramid, upsample, widen


def test_pyramid_halves_until_it_fits_into_four():
    assert pyramid(8, 8) == [(8, 8), (4, 4)]
    assert pyramid(28, 28) == [(28, 28), (14, 14), (7, 7), (4, 4)]
    assert pyramid(1, 9) == [(1, 9), (1, 5), (1, 3)]
    assert pyramid(3, 4) == [(3, 4)]


@given(st.integers(1, 3), st.integers(1, 21), st.integers(1, 21), st.integers(1, 2), st.sampled_from([0, 3]))
def test_networks_take_any_size(channels, height, width, blocks, condition):
    shape = (channels, height, width)
    encoder = ResidualEncoder(shape, 5, width=2, condition=condition, blocks=blocks)
    decoder = ResidualDecoder(6, shape, width=2, condition=condition, blocks=blocks)
    known = torch.ones(2, condition) if condition else None
    assert encoder(torch.ones(2, *shape), known).shape == (2, 5)
    assert decoder(torch.ones(2, 6), known).shape == (2, *shape)
    assert len(encoder.blocks) == len(decoder.blocks) == blocks * len(pyramid(height, width))


@given(st.integers(1, 9), st.integers(1, 9))
def test_upsample_undoes_downsample_of_a_constant_and_means_are_of_what_is_there(height, width):
    ones = torch.ones(1, 1, height, width)
    down = downsample(ones)
    assert down.shape[-2:] == ((height + 1) // 2, (width + 1) // 2)
    assert torch.equal(upsample(down, (height, width)), ones)


def test_downsample_is_the_mean_of_each_cell():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert torch.equal(downsample(x), torch.tensor([[[[2.0, 3.5], [6.5, 8.0]]]]))


@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_a_fresh_block_is_its_skip_and_ignores_the_condition(resample):
    block = ResidualBlock(3, 3, condition=4, resample=resample)
    x = torch.randn(2, 3, 6, 6)
    expected = {None: x, "down": downsample(x), "up": upsample(x, (12, 12))}[resample]
    assert torch.equal(block(x, torch.randn(2, 4)), expected)


def test_condition_reaches_every_block_once_trained():
    block = ResidualBlock(3, 3, condition=4)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 3, 6, 6)
    assert not torch.allclose(block(x, torch.zeros(1, 4)), block(x, torch.ones(1, 4)))


def test_skip_commutes_with_resampling():
    # The block applies its 1x1 skip at the smaller size; at the larger size it is the same map.
    block = ResidualBlock(3, 5, resample="down")
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(block(x), downsample(block.skip(x)))
    block = ResidualBlock(3, 5, resample="up")
    torch.testing.assert_close(block(x, size=(13, 13)), block.skip(upsample(x, (13, 13))))


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_widen(dtype, wide):
    assert widen(torch.ones(2, dtype=dtype)).dtype == wide
