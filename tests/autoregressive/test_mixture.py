"""Levels from a mixture of logistics: against the definition in float64, and normalized however far out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen.ops.logistics import level_log_prob


def definition(x: Tensor, parameters: Tensor, levels: int, mixtures: int) -> Tensor:
    """log P of the levels of one pixel x (colours,) in turn, (colours,), element by element in float64."""
    colours = len(x)
    logits, rest = parameters[:mixtures], parameters[mixtures:].reshape(colours, -1, mixtures)
    half = 1 / (levels - 1)
    joint = logits.softmax(0)
    found = []
    for c in range(colours):
        mean, scale = rest[c, 0], rest[c, 1].clamp_min(-7).exp()
        for b in range(c):
            mean = mean + rest[{(1, 0): 0, (2, 0): 1, (2, 1): 2}[c, b], 2].tanh() * x[b]
        upper = (x[c] + half - mean) / scale if x[c] < 1 - half else torch.full_like(mean, torch.inf)
        lower = (x[c] - half - mean) / scale if x[c] > -1 + half else torch.full_like(mean, -torch.inf)
        # The difference of both sigmoids as a product, which has all its digits far out, too.
        after = joint * (torch.sigmoid(upper) * torch.sigmoid(-lower) * -torch.expm1(lower - upper))
        found.append((after.sum() / joint.sum()).log())
        joint = after
    return torch.stack(found)


@given(
    colours=st.sampled_from([1, 3]),
    levels=st.sampled_from([2, 17, 256]),
    mixtures=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_levels_have_the_probability_of_the_definition(colours: int, levels: int, mixtures: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = (3 if colours == 1 else 10) * mixtures
    parameters = torch.randn(2, count, 1, 3, generator=generator, dtype=torch.float64)
    k = torch.randint(levels, (2, colours, 1, 3), generator=generator)
    x = 2 * k.double() / (levels - 1) - 1
    by_level = level_log_prob(x, parameters, levels=levels)
    torch.testing.assert_close(by_level.exp().sum(2), torch.ones_like(x), atol=1e-12, rtol=0)
    chosen = by_level.gather(2, k[:, :, None]).squeeze(2)
    for row in range(2):
        for column in range(3):
            expected = definition(x[row, :, 0, column], parameters[row, :, 0, column], levels, mixtures)
            torch.testing.assert_close(chosen[row, :, 0, column], expected, atol=1e-10, rtol=1e-10)


# Far out, a float32 cannot tell the ends of a level apart, and its probability is that much off.
@pytest.mark.parametrize(("size", "error"), [(1.0, 1e-5), (30.0, 1e-3), (1000.0, 0.1)])
def test_no_parameter_is_too_extreme(size: float, error: float) -> None:
    parameters = torch.randn(64, 100, 1, 1) * size
    x = (2 * torch.randint(256, (64, 3, 1, 1)) / 255 - 1).float()
    by_level = level_log_prob(x, parameters, levels=256)
    assert not by_level.isnan().any()
    torch.testing.assert_close(by_level.exp().sum(2), torch.ones_like(x), atol=error, rtol=0)
