"""Each adversarial objective against its formula written out, and the gradient penalties against direct computation."""

import math

import pytest
import torch
from torch import nn

from pygen.gan import OBJECTIVES, losses

REAL = [0.3, -1.7, 2.5]
FAKE = [-0.4, 0.9, 1.1]


def log_sigmoid(score: float) -> float:
    return -math.log(1 + math.exp(-score))


# The objectives as their papers print them, for one pair of scores: what D and G minimise.
PRINTED = {
    "relativistic": (lambda r, f: -log_sigmoid(r - f), lambda r, f: -log_sigmoid(f - r)),
    "minimax": (lambda r, f: -(log_sigmoid(r) + log_sigmoid(-f)), lambda r, f: log_sigmoid(-f)),
    "non_saturating": (lambda r, f: -(log_sigmoid(r) + log_sigmoid(-f)), lambda r, f: -log_sigmoid(f)),
    "hinge": (lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda r, f: -f),
    "least_squares": (lambda r, f: (r - 1) ** 2 / 2 + f**2 / 2, lambda r, f: (f - 1) ** 2 / 2),
    "wgan_gp": (lambda r, f: f - r, lambda r, f: -f),
}


def test_every_objective_is_written_out():
    assert set(PRINTED) == set(OBJECTIVES)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objective_is_the_printed_formula(objective):
    discriminator, generator = PRINTED[objective]
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    mean = sum(discriminator(r, f) for r, f in zip(REAL, FAKE, strict=True)) / 3
    assert losses.discriminator_loss(objective, real, fake).item() == pytest.approx(mean, rel=1e-5)
    mean = sum(generator(r, f) for r, f in zip(REAL, FAKE, strict=True)) / 3
    assert losses.generator_loss(objective, fake, real).item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_are_finite_at_extreme_scores(objective):
    real = torch.tensor([-1e4, 1e4], requires_grad=True)
    fake = torch.tensor([1e4, -1e4], requires_grad=True)
    total = losses.discriminator_loss(objective, real, fake) + losses.generator_loss(objective, fake, real)
    total.backward()
    assert math.isfinite(total.item())
    assert real.grad.isfinite().all()
    assert fake.grad.isfinite().all()


def test_relativistic_generator_needs_real_scores():
    with pytest.raises(ValueError, match="real is None"):
        losses.generator_loss("relativistic", torch.zeros(2))


@pytest.fixture
def score():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 1)).double()
    return body, lambda x: body(x).squeeze(1)


def test_score_and_gradient_match_autograd_one_picture_at_a_time(score):
    _, function = score
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    scores, gradient = losses.score_and_gradient(function, x)
    for i in range(5):
        leaf = x[i : i + 1].clone().requires_grad_(True)
        value = function(leaf)
        torch.testing.assert_close(scores[i : i + 1], value)
        torch.testing.assert_close(gradient[i : i + 1], torch.autograd.grad(value, leaf)[0])


@pytest.mark.parametrize("penalty", [losses.zero_centred, losses.one_centred])
def test_penalty_has_the_parameter_gradient_of_finite_differences(score, penalty):
    body, function = score
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    penalty(losses.score_and_gradient(function, x)[1]).backward()
    weight = body[0].weight
    expected = weight.grad[1, 0, 2, 1].item()
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight[1, 0, 2, 1] += step
        values.append(penalty(losses.score_and_gradient(function, x)[1]).item())
        with torch.no_grad():
            weight[1, 0, 2, 1] -= step
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-6)


def test_penalties_of_a_linear_score_are_known():
    # D(x) = <a, x> has gradient a everywhere: R1 is ||a||^2 / 2 and the one-centred penalty (||a|| - 1)^2.
    a = torch.tensor([1.0, -2.0, 2.0]).reshape(3, 1, 1)
    _, gradient = losses.score_and_gradient(lambda x: (x * a).sum((1, 2, 3)), torch.randn(4, 3, 1, 1))
    assert losses.zero_centred(gradient).item() == pytest.approx(4.5)
    assert losses.one_centred(gradient).item() == pytest.approx(4.0)


def test_one_centred_penalty_is_differentiable_where_the_gradient_vanishes():
    gradient = torch.zeros(2, 1, 2, 2, requires_grad=True)
    losses.one_centred(gradient).backward()
    assert gradient.grad.isfinite().all()
