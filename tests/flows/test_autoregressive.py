"""The masked autoregressive transform: both directions, its density, its use as IAF."""

from __future__ import annotations

import math

import pytest
import torch
from cases import close
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pygen.flows import Flow, Inverse, Stack, StandardNormal
from pygen.flows.autoregressive import MaskedAutoregressive
from pygen.nn.made import DEGREES, MADE
from pygen.ops import MaskedAffine, MaskedSpline

AFFINE = MaskedAffine("tanh", 1.5)
SPLINE = MaskedSpline(4, tails="linear", domain=(-3.0, 3.0), identity_init=True)


def stirred(made: MADE) -> MADE:
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def transform(features: int, spline: bool = False, **options: object) -> MaskedAutoregressive:
    elementwise = SPLINE if spline else AFFINE
    per_input = SPLINE.per_input if spline else 2
    return MaskedAutoregressive(stirred(MADE(features, per_input=per_input, **options)), elementwise)


@given(
    features=st.integers(1, 9), width=st.integers(1, 20), blocks=st.integers(0, 2), residual=st.booleans(),
    degrees=st.sampled_from(DEGREES), spline=st.booleans(), context=st.sampled_from([0, 2]), rows=st.integers(0, 20),
    flip=st.booleans(),
)  # fmt: skip
def test_round_trip(features, width, blocks, residual, degrees, spline, context, rows, flip):
    order = range(features)[::-1] if flip else None
    layer = transform(features, spline, width=width, blocks=blocks, residual=residual, degrees=degrees, order=order,
                      context=context).double()  # fmt: skip
    x = torch.randn(rows, features).double()
    given = torch.randn(rows, context).double() if context else None
    y, ladj = layer(x, given)
    back, back_ladj = layer.inverse(y, given)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back_ladj, -ladj, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("spline", [False, True])
def test_ladj_is_the_jacobian_of_autograd(backend, device, spline):
    layer = transform(5, spline, order=[2, 0, 4, 1, 3]).double().to(device)
    x = torch.randn(1, 5).double().to(device)
    for direction in (layer, layer.inverse):
        matrix = torch.autograd.functional.jacobian(lambda v, f=direction: f(v)[0], x).reshape(5, 5)
        torch.testing.assert_close(torch.linalg.slogdet(matrix)[1], direction(x)[1][0])


def test_starts_as_the_identity(backend, device):
    x = torch.randn(6, 7, device=device)
    for layer in (MaskedAutoregressive(MADE(7)), MaskedAutoregressive(MADE(7, per_input=SPLINE.per_input), SPLINE)):
        y, ladj = layer.to(device)(x)
        close(y, x, scale=10)
        close(ladj, torch.zeros(6, device=device), scale=10)


@pytest.mark.parametrize("classes", [None, 3])
def test_context_conditions_both_directions(backend, device, classes):
    layer = transform(4, context=0 if classes else 2, classes=classes).to(device)
    x = torch.randn(3, 4, device=device)
    context = torch.arange(3, device=device) if classes else torch.randn(3, 2, device=device)
    y, _ = layer(x, context)
    assert not torch.equal(layer(x, context.flip(0))[0][0], y[0])
    close(layer.inverse(y, context)[0], x, scale=100)


def test_pictures_are_rows(backend, device):
    layer = transform(12).to(device)
    x = torch.randn(2, 3, 2, 2, device=device)
    y, ladj = layer(x)
    assert y.shape == x.shape
    assert ladj.shape == (2,)
    assert torch.equal(y.flatten(1), layer(x.flatten(1))[0])
    close(layer.inverse(y)[0], x, scale=100)


def test_a_stack_with_either_memory_has_the_same_gradients(backend, device):
    steps = [transform(4, order=order).double().to(device) for order in (None, [3, 2, 1, 0])]
    x = torch.randn(5, 4, device=device).double()
    found = []
    for memory in ("store", "recompute", "checkpoint"):
        leaf = x.clone().requires_grad_()
        y, ladj = Stack(steps, memory=memory)(leaf)
        parameters = [parameter for step in steps for parameter in step.parameters()]
        found.append(torch.autograd.grad(y.square().sum() + ladj.sum(), [leaf, *parameters]))
    for other in found[1:]:
        for gradient, expected in zip(other, found[0], strict=True):
            close(gradient, expected, scale=1e3)


def test_a_maf_learns_a_density():
    torch.manual_seed(1)
    flow = Flow([MaskedAutoregressive(MADE(2, width=32, order=order)) for order in ([0, 1], [1, 0])], StandardNormal(2))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)

    def draw(n: int) -> torch.Tensor:
        z = torch.randn(n, 2)
        return torch.stack((z[:, 0], 0.5 * z[:, 0] ** 2 + 0.3 * z[:, 1]), 1)

    for _ in range(200):
        loss = -flow.log_prob(draw(256)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = math.log(2 * math.pi * math.e) + math.log(0.3)
    assert -flow.log_prob(draw(4096)).mean() < entropy + 0.1
    samples = flow.sample(4096)
    assert (samples[:, 1] - 0.5 * samples[:, 0] ** 2).std() < 0.45


def test_an_iaf_trains_through_the_sweep(backend, device):
    # The reverse divergence to a correlated normal: samples in one pass, their density from the same.
    torch.manual_seed(1)
    layer = Inverse(MaskedAutoregressive(MADE(2, width=16), MaskedAffine("tanh", 2.0))).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), 2e-2)
    x = torch.randn(128, 2, device=device) * torch.tensor([1.0, 0.5], device=device)
    x[:, 1] += 0.8 * x[:, 0]
    for _ in range(120):
        z, ladj = layer(x)  # a sweep, and its gradient another
        loss = (0.5 * z.square().sum(1) - ladj).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * 2 + math.log(0.5) + 0.1
    close(layer.inverse(layer(x)[0])[0], x, scale=1e3)


def test_evaluation_after_training_sees_the_new_weights(backend, device):
    layer = transform(5).to(device)
    x = torch.randn(3, 5, device=device)
    for _ in range(2):
        with torch.no_grad():
            y, _ = layer.eval()(x)
            close(layer.inverse(y)[0], x, scale=100)
        layer.train()
        layer(x)[1].sum().backward()
        torch.optim.SGD(layer.parameters(), 0.1).step()


def test_compiles_in_one_graph():
    layer = transform(4, context=2)
    x, context = torch.randn(3, 4), torch.randn(3, 2)
    for direction in (layer, layer.inverse):
        compiled = torch.compile(lambda v, c, f=direction: f(v, c), fullgraph=True, backend="aot_eager")
        for value, expected in zip(compiled(x, context), direction(x, context), strict=True):
            close(value, expected, scale=10)


def test_bad_arguments_get_one_sentence():
    layer = transform(4)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\), but expected \(n, ...\) with 4 values a row"):
        layer(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"y has shape \(4,\)"):
        layer.inverse(torch.zeros(4))
    with pytest.raises(ValueError, match="network has 8 outputs for 4 features, but expected 11 for each"):
        MaskedAutoregressive(MADE(4), SPLINE)
    broken = MADE(4)
    broken.last.mask.fill_(True)
    with pytest.raises(ValueError, match="network is not autoregressive: output 0 depends on input 0, its own"):
        MaskedAutoregressive(broken)
    assert isinstance(layer.made, nn.Module)
