"""The convolutional conditioners: shapes, their start, and what they read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pygen.nn.conditioner import ConvConditioner, PictureConditioner

sides = st.integers(1, 9)


def scattered(net: nn.Module) -> nn.Module:
    """In float64, with weights where construction leaves zeros."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2)
    return net.double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@given(
    n=st.integers(1, 3), channels=st.integers(1, 4), out=st.integers(1, 5), of_context=st.integers(1, 3), height=sides,
    width=sides, context_height=sides, context_width=sides, blocks=st.integers(0, 2),
)  # fmt: skip
def test_a_context_picture_of_any_size_stands_beside(
    n, channels, out, of_context, height, width, context_height, context_width, blocks
):
    net = PictureConditioner(channels, out, context_channels=of_context, width=6, blocks=blocks)
    x, context = randn(n, channels, height, width), randn(n, of_context, context_height, context_width)
    start = net(x.float(), context.float())
    assert start.shape == (n, out, height, width) and not start.any()
    scattered(net)
    y = net(x, context)
    beside = F.interpolate(context, size=(height, width), mode="bilinear", align_corners=False)
    torch.testing.assert_close(y, net.net(torch.cat((x, beside), 1)))
    # The same picture, twice as large, is the same context where there is nothing to interpolate.
    flat = context.mean((2, 3), keepdim=True)
    torch.testing.assert_close(net(x, flat), net(x, flat.expand(-1, -1, 2 * context_height, 3)))
    # Each sample reads its own picture.
    torch.testing.assert_close(net(x.flip(0), context.flip(0)), y.flip(0))


def test_both_pictures_are_read_where_they_are():
    """Within the reach of four convolutions of 3 x 3, and from every channel of the context."""
    net = scattered(PictureConditioner(2, 3, context_channels=2, width=8, blocks=1))
    x, context = randn(1, 2, 16, 16).requires_grad_(), randn(1, 2, 16, 16).requires_grad_()
    of_x, of_context = torch.autograd.grad(net(x, context)[0, :, 8, 8].sum(), (x, context))
    reach = torch.zeros(16, 16, dtype=torch.bool)
    reach[4:13, 4:13] = True
    for gradient in (of_x[0], of_context[0]):
        assert not gradient[:, ~reach].any()
        assert gradient[:, reach].abs().amax(1).min() > 0


def test_a_context_of_other_channels_is_refused():
    net = PictureConditioner(2, 3, context_channels=3, width=4)
    with pytest.raises(RuntimeError, match="channels"):
        net(torch.randn(1, 2, 4, 4), torch.randn(1, 1, 4, 4))


def test_labels_are_read_and_dropout_drops_in_training_alone():
    net = scattered(ConvConditioner(2, 3, width=8, blocks=2, classes=4, dropout=0.5))
    x, labels = randn(3, 2, 5, 5), torch.tensor([0, 1, 3])
    assert not torch.equal(net(x, labels), net(x, labels))
    net.eval()
    y = net(x, labels)
    assert torch.equal(net(x, labels), y)
    other = net(x, torch.tensor([0, 2, 3]))
    assert torch.equal(other[::2], y[::2]) and not torch.equal(other[1], y[1])
