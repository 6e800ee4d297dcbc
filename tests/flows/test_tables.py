"""Flows of rows: densities that learn, contexts and labels, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pygen.flows import Flow, inverse_autoregressive_flow, masked_autoregressive_flow, neural_spline_flow

Builder = Callable[..., Flow]


def coupling_splines(features: int, **options: object) -> Flow:
    return neural_spline_flow(features, **{"layers": 2, "hidden": 16, "blocks": 1, **options})


def masked_splines(features: int, **options: object) -> Flow:
    return coupling_splines(features, autoregressive=True, **options)


def maf(features: int, **options: object) -> Flow:
    return masked_autoregressive_flow(features, **{"layers": 2, "hidden": 16, **options})


def iaf(features: int, **options: object) -> Flow:
    return inverse_autoregressive_flow(features, **{"layers": 2, "hidden": 16, **options})


BUILDERS = [coupling_splines, masked_splines, maf, iaf]


@pytest.fixture(params=BUILDERS, ids=lambda builder: builder.__name__)
def builder(request: pytest.FixtureRequest) -> Builder:
    return request.param


def shaken(flow: Flow) -> Flow:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow.double().eval()


@pytest.mark.parametrize("features", [2, 5])
@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({}, None),
        ({"context": 3}, torch.randn(4, 3, dtype=torch.float64)),
        ({"classes": 3}, torch.tensor([0, 1, 2, 1])),
    ],
    ids=["plain", "features", "labels"],
)
def test_log_prob_is_that_of_the_jacobian(builder: Builder, features: int, options: dict, context: Tensor | None):
    flow = shaken(builder(features, **options))
    x = 2 * torch.randn(4, features, dtype=torch.float64)
    log_prob = flow.log_prob(x, context)
    z = flow.encode(x, context)
    for row in range(4):
        given = None if context is None else context[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, given=given: flow.encode(v[None], given)[0], x[row])
        expected = flow.base.log_prob(z[row : row + 1]) + torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_prob[row : row + 1], expected)
    torch.testing.assert_close(flow.decode(z, context), x)
    drawn, own = flow.sample_and_log_prob(4, context=context, seed=3)
    torch.testing.assert_close(own, flow.log_prob(drawn, context))
    if context is not None:
        assert not torch.isclose(log_prob, flow.log_prob(x, context.roll(1, 0))).all()
        with pytest.raises(ValueError, match="context is None"):
            flow.log_prob(x)
    else:
        with pytest.raises(ValueError, match="context"):
            flow.log_prob(x, torch.zeros(4, 1, dtype=torch.float64))


def test_the_density_integrates_to_one(builder: Builder):
    flow = shaken(builder(2))
    axis = torch.linspace(-14, 14, 561, dtype=torch.float64)
    with torch.no_grad():
        total = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("memory", ["recompute", "checkpoint"])
def test_gradients_are_those_of_store(builder: Builder, memory: str):
    flow, frugal = builder(4).double(), builder(4, memory=memory).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    for each in (flow, frugal):
        each.log_prob(x)  # starts the normalizations
    frugal.load_state_dict(flow.state_dict())
    for each in (flow, frugal):
        each.log_prob(x).mean().backward()
    for ours, theirs in zip(frugal.parameters(), flow.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9)


def test_learns_two_moons(builder: Builder):
    torch.manual_seed(0)
    angle = math.pi * torch.rand(512)
    side = torch.randint(2, (512,)) * 2 - 1
    moons = torch.stack((angle.cos() + 0.5 * side, side * (angle.sin() - 0.25)), 1) + 0.1 * torch.randn(512, 2)
    flow = builder(2, layers=4, hidden=32)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow.log_prob(moons).mean()
        loss.backward()
        optimizer.step()
    gaussian = torch.distributions.MultivariateNormal(moons.mean(0), moons.T.cov())
    assert loss < -gaussian.log_prob(moons).mean() - 0.3
    assert flow.eval().sample(512).abs().mean() < 2


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: neural_spline_flow(1), "features is 1, but expected at least 2"),
        (lambda: masked_splines(3, dropout=0.1), "dropout is 0.1, but expected 0: masked networks have none"),
        (lambda: maf(3, depth=0), "depth is 0, but expected at least 1"),
        (lambda: maf(3, context=2, classes=3), "context is 2 and classes is 3, but expected one of them at most"),
        (lambda: coupling_splines(3, context=2, classes=3), "features is 2 and classes is 3, but expected one of them"),
        (lambda: coupling_splines(3, bins=1), "bins is 1, but expected at least 2"),
    ],
)
def test_bad_arguments(act: Callable[[], Flow], message: str):
    with pytest.raises(ValueError, match=message):
        act()
