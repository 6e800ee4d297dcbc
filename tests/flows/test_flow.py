"""Flow and its bases: densities that integrate to one, samples by number, conditioning."""

from __future__ import annotations

import math

import pytest
import torch
from flow_cases import Conditioner, couplings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pygen.flows import (
    AdditiveCoupling,
    AffineCoupling,
    Base,
    ConditionalNormal,
    DiagonalNormal,
    Flow,
    Stack,
    StandardLogistic,
    StandardNormal,
    Uniform,
)

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def bases(shape: tuple[int, ...]) -> list[Base]:
    learned = DiagonalNormal(shape)
    with torch.no_grad():
        learned.mean.normal_()
        learned.log_std.normal_(std=0.3)
    return [StandardNormal(shape), learned, StandardLogistic(shape), Uniform(shape, -1.0, 2.0)]


@given(shape=SHAPES, n=st.integers(0, 5))
def test_bases_have_one_number_per_sample(shape, n):
    for base in bases(shape):
        z = base.sample(n, seed=3)
        assert z.shape == (n, *shape)
        assert base.log_prob(z).shape == (n,)
        assert base.log_prob(z).isfinite().all()


def test_bases_agree_with_the_textbook():
    normal, learned, logistic, uniform = bases((3,))
    z = torch.randn(7, 3)
    torch.testing.assert_close(normal.log_prob(z), torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1))
    scaled = torch.distributions.Normal(learned.mean, learned.log_std.exp())
    torch.testing.assert_close(learned.log_prob(z), scaled.log_prob(z).sum(1))
    expected = (-z - 2 * nn.functional.softplus(-z)).sum(1)
    torch.testing.assert_close(logistic.log_prob(z), expected)
    torch.testing.assert_close(uniform.log_prob(torch.zeros(2, 3)), torch.full((2,), -3 * math.log(3)))
    assert uniform.log_prob(torch.full((1, 3), 2.1)) == -math.inf


@pytest.mark.parametrize("base", bases((2, 3)), ids=lambda base: type(base).__name__)
def test_samples_are_known_by_their_numbers(base):
    everything = base.sample(6, seed=1)
    some = base.sample(3, ids=torch.tensor([4, 0, 5]), seed=1)
    assert torch.equal(some, everything[[4, 0, 5]])
    assert not torch.equal(base.sample(6, seed=2), everything)


@pytest.mark.parametrize("base", bases((1,)), ids=lambda base: type(base).__name__)
def test_samples_follow_the_density(base):
    z = base.sample(20_000).flatten().sort().values
    # The distribution function by integrating the density; Kolmogorov's distance at 1 in 10,000.
    grid = torch.linspace(-15, 15, 60_001)
    density = base.log_prob(grid[:, None]).detach().exp()
    distribution = torch.cumulative_trapezoid(density, grid)
    assert abs(float(distribution[-1]) - 1) < 1e-3
    reached = distribution[torch.searchsorted(grid, z).clamp(1, len(distribution)) - 1]
    steps = torch.arange(1, len(z) + 1) / len(z)
    assert (reached - steps).abs().max() < 2.23 / math.sqrt(len(z)) + 1e-3


def test_the_density_of_a_flow_integrates_to_one():
    flow = Flow(couplings(3, 2), StandardNormal(2)).double()
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    total = flow.log_prob(points).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(float(total.detach()) - 1) < 1e-3


def test_log_prob_is_that_of_the_jacobian():
    flow = Flow(couplings(4, 3), StandardNormal(3)).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.encode(v)[0], x)[:, 0]
    expected = flow.base.log_prob(flow.encode(x)) + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(flow.log_prob(x), expected)


@given(n=st.integers(0, 6), conditional=st.booleans())
def test_sample_and_log_prob_agree_with_log_prob(n, conditional):
    flow = Flow(couplings(3, 4), StandardNormal(4)).double()
    context = torch.randn(n, 2, dtype=torch.float64) if conditional else None
    x, log_prob = flow.sample_and_log_prob(n, context=context, seed=5)
    torch.testing.assert_close(log_prob, flow.log_prob(x, context))
    torch.testing.assert_close(x, flow.sample(n, context=context, seed=5))
    torch.testing.assert_close(flow.decode(flow.encode(x, context), context), x)


def test_context_changes_the_density():
    flow = Flow(couplings(3, 4), StandardNormal(4))
    x = torch.randn(5, 4)
    assert not torch.allclose(flow.log_prob(x, torch.zeros(5, 2)), flow.log_prob(x, torch.ones(5, 2)))


def test_a_flow_can_be_the_base_of_another():
    inner = Flow(couplings(2, 4), StandardNormal(4)).double()
    outer_steps = couplings(2, 4)
    nested = Flow(outer_steps, inner).double()
    flat = Flow([*outer_steps, *inner.transform], StandardNormal(4)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(nested.log_prob(x), flat.log_prob(x))
    torch.testing.assert_close(nested.sample(3, seed=2), flat.sample(3, seed=2))


def test_a_conditional_base():
    base = ConditionalNormal((2, 3), nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (4, 3))))
    context = torch.randn(4, 2)
    mean, log_std = base.network(context).chunk(2, dim=1)
    z = base.sample(4, context=context, seed=1)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(base.log_prob(z, context), expected)


def test_sampling_is_reparametrised():
    flow = Flow(couplings(2, 4), StandardNormal(4))
    x, log_prob = flow.sample_and_log_prob(3)
    (x.sum() + log_prob.sum()).backward()
    assert all(p.grad is not None for p in flow.transform.transforms[0].conditioner.second.parameters())


def test_sixteen_bits_are_summed_in_float32():
    flow = Flow(couplings(2, 4), StandardNormal(4)).to(torch.bfloat16)
    assert flow.log_prob(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("inverse", [False, True])
def test_additive_coupling_is_affine_without_a_scale(inverse):
    class Shift(nn.Module):
        def forward(self, kept: Tensor) -> Tensor:
            return kept.sin()

    class ScaleAndShift(nn.Module):
        def forward(self, kept: Tensor) -> Tensor:
            return torch.cat((torch.zeros_like(kept), kept.sin()), dim=1)

    x = torch.randn(3, 4)
    additive, affine = AdditiveCoupling(Shift()), AffineCoupling(ScaleAndShift())
    for actual, expected in zip(
        (additive.inverse if inverse else additive)(x), (affine.inverse if inverse else affine)(x), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: StandardNormal((2, 0)), r"shape is \(2, 0\), but expected positive numbers"),
        (lambda: StandardNormal(2).log_prob(torch.zeros(3, 3)), r"z has shape \(3, 3\), but expected \(n, 2\)"),
        (lambda: StandardNormal(2).sample(-1), "n is -1, but expected a number of samples that is not negative"),
        (lambda: StandardNormal(2).sample(2, ids=torch.arange(3)), r"ids has shape \(3,\), but expected \(2,\)"),
        (lambda: Uniform(2, 1.0, 1.0), "low and high are 1.0 and 1.0, but expected low < high"),
        (
            lambda: Flow(Stack([]), StandardNormal(2)).sample(2, context=torch.zeros(3, 1)),
            "context has 3 rows, but expected one for each of the 2 samples",
        ),
        (
            lambda: AffineCoupling(Conditioner(2, 3))(torch.zeros(5, 4)),
            r"conditioner returned shape \(5, 6\), but expected \(5, 4\)",
        ),
        (lambda: ConditionalNormal(2, nn.Identity()).sample(2), "context is None, but expected what the base"),
    ],
)
def test_bad_arguments(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logistic_samples_are_finite_in_16_bits(dtype):
    samples = StandardLogistic(100).to(dtype).sample(1000)
    assert samples.dtype == dtype
    assert samples.isfinite().all()


def test_uniform_density_of_nan_is_nan():
    z = torch.tensor([[0.5, 0.5], [float("nan"), 0.5], [2.0, 0.5]])
    log_prob = Uniform(2).log_prob(z)
    assert log_prob[0] == 0
    assert log_prob[1].isnan()
    assert log_prob[2] == -float("inf")
