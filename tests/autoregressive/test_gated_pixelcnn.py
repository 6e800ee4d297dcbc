"""Gated PixelCNN behind the contract: causality, total probability one, samples that are their ids, compilation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen.autoregressive import GatedPixelCNN, GatedPixelCNNConfig
from pygen.model import Density


def build(scatter: float = 0.5, **options: Any) -> GatedPixelCNN:
    """A small model in eval mode that is far from the uniform distribution that it starts as."""
    torch.manual_seed(0)
    settings = {"width": 12, "head": 12, "layers": 3, "first_kernel_size": 3, **options}
    model = GatedPixelCNN(GatedPixelCNNConfig(**settings)).eval()
    with torch.no_grad():
        for name in ("place", "label", "head"):
            for key, parameter in model.named_parameters():
                if name in key:
                    parameter.normal_(0, scatter)
    return model


def pictures(model: GatedPixelCNN, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(model.config.levels, (n, *model.config.shape), generator=generator)
    return model.dequantize(k).to(model.place.dtype)


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [((1, 4, 5), (3, 3)), ((1, 6, 7), (7, 3)), ((3, 3, 4), (3, 3)), ((3, 3, 4), (5, 5)), ((2, 5, 3), (3, 5))],
)
def test_an_element_depends_on_all_before_it_and_on_nothing_else(
    shape: tuple[int, int, int], kernels: tuple[int, int]
) -> None:
    first_kernel_size, kernel_size = kernels
    model = build(
        shape=shape,
        levels=3,
        classes=None,
        layers=6,
        width=48,
        head=48,
        first_kernel_size=first_kernel_size,
        kernel_size=kernel_size,
    ).double()
    # Wide enough that no relu group is dead at a whole pixel: dependence then shows as a gradient that is not zero.
    x = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
    channels, height, width = shape
    order = list(itertools.product(range(height), range(width), range(channels)))
    logits = model.logits(x)
    weights = torch.randn(3, dtype=torch.float64)
    for i, (row, column, channel) in enumerate(order):
        (gradient,) = torch.autograd.grad((logits[0, channel, :, row, column] * weights).sum(), x, retain_graph=True)
        by_order = gradient[0].permute(1, 2, 0).flatten()
        assert (by_order[i:] == 0).all(), f"element {i} reads a later one"
        assert (by_order[:i] != 0).all(), f"element {i} misses an earlier one: a blind spot"


@pytest.mark.parametrize(("shape", "levels"), [((1, 2, 2), 3), ((2, 1, 2), 3), ((3, 1, 1), 4), ((1, 3, 2), 2)])
def test_the_probabilities_of_all_pictures_sum_to_one(shape: tuple[int, int, int], levels: int) -> None:
    model = build(2.0, shape=shape, levels=levels, classes=3).double()
    every = torch.tensor(list(itertools.product(range(levels), repeat=model.config.dimensions)))
    x = model.dequantize(every.reshape(-1, *shape)).double()
    by_label = []
    for label in range(3):
        probability = model.log_prob(x, condition=torch.full((len(x),), label)).exp()
        assert probability.sum().item() == pytest.approx(1, abs=1e-12)
        by_label.append(probability)
    assert (by_label[0] - by_label[1]).abs().max() > 1e-3
    assert model.density is Density.EXACT


def test_samples_have_the_probabilities_that_log_prob_says() -> None:
    model = build(1.5, shape=(1, 2, 2), levels=2, classes=None)
    every = model.dequantize(torch.tensor(list(itertools.product(range(2), repeat=4))).reshape(-1, 1, 2, 2))
    expected = model.log_prob(every).exp().detach() * 4000
    code = (model.quantize(model.sample(4000, seed=11)).flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1)
    counted = torch.bincount(code, minlength=16)
    large = expected > 10
    statistic = ((counted - expected).square() / expected)[large].sum().item()
    assert large.sum() > 5
    assert statistic < 45  # chi-square with at most 15 degrees of freedom exceeds it once in 10^4


@given(
    channels=st.integers(1, 3), height=st.integers(1, 5), width=st.integers(1, 5), levels=st.sampled_from([2, 5, 256]),
    n=st.integers(0, 3), kernel_size=st.sampled_from([3, 5]), labelled=st.booleans(),
)  # fmt: skip
def test_drawing_agrees_with_the_full_forward(
    channels: int, height: int, width: int, levels: int, n: int, kernel_size: int, labelled: bool
) -> None:
    model = build(
        shape=(channels, height, width),
        levels=levels,
        kernel_size=kernel_size,
        classes=4 if labelled else None,
        layers=2,
    )
    labels = torch.arange(n) % 4 if labelled else None
    x, log_prob = model.sample_with_log_prob(n, seed=3)
    assert x.shape == (n, channels, height, width)
    assert torch.equal(model.dequantize(model.quantize(x)), x)
    torch.testing.assert_close(log_prob, model.log_prob(x, condition=labels).detach(), atol=1e-4, rtol=1e-5)


def test_a_sample_is_its_id_whatever_the_batch() -> None:
    model = build()
    whole = model.sample(12, seed=5)
    ids = torch.tensor([7, 0, 11])
    assert torch.equal(model.sample(3, ids=ids, seed=5), whole[ids])
    assert torch.equal(model.sample(3, ids=ids, condition=ids % 10, seed=5), whole[ids])
    assert not torch.equal(model.sample(12, seed=6), whole)
    assert not torch.equal(model.sample(3, ids=ids, condition=(ids + 1) % 10, seed=5), whole[ids])


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 2, 3)])
@pytest.mark.parametrize("seed", [2, -1])
def test_trajectory_turns_uniform_numbers_into_the_sample(shape: tuple[int, int, int], seed: int) -> None:
    model = build(shape=shape, levels=5)
    _, height, width = shape
    ids = torch.tensor([3, 8])
    stages = model.trajectory(2, ids=ids, seed=seed)
    z, x = stages[0].values, stages[-1].values
    assert torch.equal(x, model.sample(2, ids=ids, seed=seed))
    assert (stages[0].label, stages[-1].label) == ("Z", "X")
    assert len(stages) == 1 + height * width
    for i, stage in enumerate(stages):
        done = (torch.arange(height * width) < i).reshape(height, width).expand_as(x)
        assert torch.equal(stage.values, torch.where(done, x, z))
    # Z decides X: each level is where u falls in the cumulative distribution given what came before.
    cumulative = model.logits(x, condition=ids % 10).softmax(2).cumsum(2)
    level = (cumulative <= (z + 1)[:, :, None] / 2).sum(2)
    assert torch.equal(level, model.quantize(x))


def test_completion_keeps_what_is_known_and_draws_the_rest() -> None:
    model = build(shape=(1, 6, 6), levels=5)
    whole = model.sample(4, seed=9)
    labels = torch.arange(4)
    known = torch.zeros(6, 6, dtype=torch.bool)
    known[:3] = True
    # The same seed draws the same rest, because every element's number is its own.
    hidden = torch.where(known, whole, 0.25)
    assert torch.equal(model.complete(hidden, known, condition=labels, seed=9), whole)
    other = model.complete(hidden, known, condition=labels, seed=10)
    assert torch.equal(other[:, :, :3], whole[:, :, :3])
    assert not torch.equal(other, whole)
    with pytest.raises(TypeError, match="known has dtype"):
        model.complete(whole, known.float())
    with pytest.raises(ValueError, match=r"known has shape \(5,\)"):
        model.complete(whole, torch.ones(5, dtype=torch.bool))


def test_loss_decreases_and_is_the_mean_per_dimension() -> None:
    torch.manual_seed(0)
    model = GatedPixelCNN(GatedPixelCNNConfig(width=16, head=16, layers=2))
    x = torch.full((32, 1, 8, 8), -1.0)
    x[:, :, 2:6, 2:6] = 1.0
    labels = torch.arange(32) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.loss(x, condition=labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    expected = -model.log_prob(x, condition=labels).mean() / 64
    torch.testing.assert_close(model.loss(x, condition=labels), expected)


def test_a_new_model_is_uniform() -> None:
    model = GatedPixelCNN(GatedPixelCNNConfig(levels=4, classes=None)).eval()
    with torch.no_grad():
        model.head.bias.zero_()
    expected = torch.full((2,), -64 * torch.log(torch.tensor(4.0)).item())
    torch.testing.assert_close(model.log_prob(pictures(model, 2)).detach(), expected)


def test_players_and_passes() -> None:
    model = build(shape=(3, 2, 2))
    assert model.network_passes() == 12
    assert sum(p.numel() for p in model.players()["model"]) == sum(p.numel() for p in model.parameters())
    copy = GatedPixelCNN(GatedPixelCNNConfig(**model.config_dict())).eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.sample(2), model.sample(2))


def test_compiles_without_a_break() -> None:
    # One graph with its autograd, run by eager kernels: what the code generator makes of it is PyTorch's to test.
    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    model = build(layers=2, shape=(3, 3, 4), levels=5)
    x, labels = pictures(model, 4), torch.arange(4)
    log_prob = compiled(model.log_prob)(x, condition=labels)
    torch.testing.assert_close(log_prob, model.log_prob(x, condition=labels))
    compiled(model.loss)(x, condition=labels).backward()
    gradient = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.loss(x, condition=labels).backward()
    torch.testing.assert_close(gradient, [p.grad for p in model.parameters()])
    with torch.no_grad():
        feeds = [feed[:, :, 1:2, :3] for feed in model._vertical(x, labels)]
        step: dict[str, Any] = {"ids": labels, "seed": 1, "position": 19}
        token, log_prob = compiled(model.draw_element)(x[:, :, 1:2, :3], feeds, 1, **step)
        expected = model.draw_element(x[:, :, 1:2, :3], feeds, 1, **step)
    assert torch.equal(token, expected[0])
    torch.testing.assert_close(log_prob, expected[1])


def test_parameters_that_are_not_finite_are_said_to_be_so() -> None:
    model = build(shape=(1, 2, 2))
    with torch.no_grad():
        model.head.bias[3] = torch.nan
    with pytest.raises(RuntimeError, match="sample 6 met logits that are no distribution"):
        model.sample(2, ids=torch.tensor([6, 7]))


def test_bad_input_is_named() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"x has shape \(3,\), but expected \(n, 1, 8, 8\)"):
        model.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="condition is None"):
        model.loss(torch.zeros(3, 1, 8, 8))
    with pytest.raises(ValueError, match="steps is 7"):
        model.sample(2, steps=7)
    with pytest.raises(ValueError, match="steps is 7"):
        model.trajectory(2, steps=7)
    with pytest.raises(NotImplementedError):
        model.encode(torch.zeros(3, 1, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"shape": (4, 8, 8)}, "width is 30, but expected a positive multiple of the 4 channels"),
        ({"kernel_size": 4}, "kernel_size is 4, but expected an odd number"),
        ({"first_kernel_size": 1}, "first_kernel_size is 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_bad_configuration_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedPixelCNNConfig(**options)
