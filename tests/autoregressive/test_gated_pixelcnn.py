"""Gated PixelCNN: no blind spot, and the distribution that it starts as."""

from __future__ import annotations

import pytest
import torch
from autoregressive_cases import random_pictures, small

from pygen.autoregressive import GatedPixelCNN, GatedPixelCNNConfig


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [((1, 4, 5), (3, 3)), ((1, 6, 7), (7, 3)), ((3, 3, 4), (3, 3)), ((3, 3, 4), (5, 5)), ((2, 5, 3), (3, 5))],
)
def test_an_element_depends_on_all_before_it_and_on_nothing_else(
    shape: tuple[int, int, int], kernels: tuple[int, int]
) -> None:
    # Wide enough that no relu group is dead at a whole pixel: dependence then shows as a gradient that is not zero.
    model = small(
        "gated-pixelcnn",
        shape=shape,
        levels=3,
        classes=None,
        layers=6,
        width=48,
        head=48,
        first_kernel_size=kernels[0],
        kernel_size=kernels[1],
    ).double()
    x = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
    logits = model.logits(x)
    weights = torch.randn(3, dtype=torch.float64)
    for i in range(model.length):
        (gradient,) = torch.autograd.grad((logits[0, i] * weights).sum(), x, retain_graph=True)
        by_order = gradient[0].permute(1, 2, 0).flatten()
        assert (by_order[i:] == 0).all(), f"element {i} reads a later one"
        assert (by_order[:i] != 0).all(), f"element {i} misses an earlier one: a blind spot"


def test_a_new_model_is_uniform() -> None:
    model = GatedPixelCNN(GatedPixelCNNConfig(levels=4, classes=None)).eval()
    with torch.no_grad():
        model.head.bias.zero_()
    expected = torch.full((2,), -64 * torch.log(torch.tensor(4.0)).item())
    torch.testing.assert_close(model.log_prob(random_pictures(model, 2)).detach(), expected)
