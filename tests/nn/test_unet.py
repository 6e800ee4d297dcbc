"""The U-Net: any shape in and out, zero at the start, and every input and every parameter matters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pygen.nn.unet import SelfAttention, TimeEmbedding, UNet, depth_for


def awakened(network: torch.nn.Module) -> torch.nn.Module:
    """The network with its zero layers drawn anew: as it starts, most of it has no effect."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 3),
    channels=st.sampled_from([(1, 1), (2, 3), (6, 3)]),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    multipliers=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    attention=st.booleans(),
)
def test_any_shape_goes_through(n, channels, height, width, multipliers, blocks, attention):
    network = awakened(
        UNet(*channels, width=4, multipliers=multipliers, blocks=blocks, attention=attention, classes=None)
    )
    out = network(torch.randn(n, channels[0], height, width), torch.linspace(-10, 10, n))
    assert out.shape == (n, channels[1], height, width)
    assert out.isfinite().all()
    assert out.abs().max() > 0


@pytest.mark.parametrize(
    ("height", "width", "depth"), [(1, 1, 1), (4, 4, 1), (7, 30, 1), (8, 8, 2), (9, 64, 2), (16, 17, 3), (32, 32, 4)]
)
def test_depth_leaves_the_smaller_side_at_least_four(height, width, depth):
    assert depth_for(height, width) == depth


def test_it_starts_at_zero():
    network = UNet(2, 1, width=8)
    assert not network(torch.randn(2, 2, 8, 8), torch.zeros(2)).any()


def test_time_class_and_every_picture_matter_to_their_own_row_alone():
    network = awakened(UNet(1, 1, width=8, classes=3))
    x, time, label = torch.randn(3, 1, 5, 6), torch.tensor([-4.0, 0.0, 4.0]), torch.tensor([0, 1, 2])
    before = network(x, time, label)
    changes = {
        "x": (x + torch.tensor([0.0, 1.0, 0.0])[:, None, None, None], time, label),
        "time": (x, time + torch.tensor([0.0, 0.1, 0.0]), label),
        "label": (x, time, torch.tensor([0, 2, 2])),
    }
    for name, inputs in changes.items():
        moved = (network(*inputs) - before).abs().amax((1, 2, 3))
        assert moved[1] > 1e-3, name
        assert moved[[0, 2]].max() < 1e-5, name


def test_every_parameter_gets_a_gradient():
    network = awakened(UNet(1, 2, width=8, multipliers=(1, 2, 2), blocks=2, classes=3))
    network(torch.randn(3, 1, 8, 8), torch.randn(3), torch.tensor([0, 1, 2])).square().mean().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.any()] == []


def test_attention_sees_all_positions_and_keeps_their_order():
    layer = awakened(SelfAttention(32))
    x = torch.randn(1, 32, 3, 4, requires_grad=True)
    layer(x)[0, :, 0, 0].sum().backward()
    assert (x.grad.abs().amax(1) > 0).all()
    permuted = layer(x.flip(2, 3))
    assert torch.allclose(permuted.flip(2, 3), layer(x), atol=1e-5)


def test_times_have_distinct_embeddings():
    angles = TimeEmbedding(8)
    embedded = angles(torch.linspace(-12, 12, 200))
    distance = torch.cdist(embedded, embedded) + torch.eye(200)
    assert distance.min() > 1e-4


def test_a_condition_is_needed_with_classes_and_refused_without():
    with pytest.raises(ValueError, match="condition is None, but the network was built with classes=3"):
        UNet(1, 1, width=4, classes=3)(torch.zeros(1, 1, 4, 4), torch.zeros(1))
    with pytest.raises(ValueError, match="condition is given, but the network was built with classes=None"):
        UNet(1, 1, width=4)(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_sizes_that_are_not_positive_are_refused():
    with pytest.raises(ValueError, match="expected positive numbers"):
        UNet(1, 1, width=0)
    with pytest.raises(ValueError, match="expected positive numbers"):
        UNet(1, 1, multipliers=())
