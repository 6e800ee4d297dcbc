"""AffineCoupling: the round trip, the Jacobian, what is kept, and a density on the plane that integrates to one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pygen.flows import (
    AdditiveCoupling,
    AffineCoupling,
    AffineInjector,
    Coupling,
    MixtureCoupling,
    SplineCoupling,
    Transform,
)


def dense(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


@given(channels=st.integers(2, 7), n=st.integers(0, 3), flip=st.booleans(), seed=st.integers(0, 99))
def test_round_trip_and_jacobian(channels: int, n: int, flip: bool, seed: int) -> None:
    torch.manual_seed(seed)
    first = (channels + 1) // 2
    kept, moved = (channels - first, first) if flip else (first, channels - first)
    layer = AffineCoupling(dense(kept, 2 * moved), flip=flip, activation="tanh", limit=2.0)
    x = torch.randn(n, channels, dtype=torch.float64)
    y, ladj = layer(x)
    back, minus = layer.inverse(y)
    assert y.shape == x.shape
    assert ladj.shape == (n,)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -ladj)
    same = slice(first, None) if flip else slice(0, first)
    assert torch.equal(y[:, same], x[:, same])
    for i in range(n):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0], x[i])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, ladj[i])


@pytest.mark.parametrize("activation", ["exp", "tanh", "atan", "sigmoid_symmetric", "sigmoid", "softplus", "softclip"])
def test_every_activation_is_inverted(activation: str) -> None:
    torch.manual_seed(0)
    limit = 1.5 if activation in ("tanh", "atan", "sigmoid_symmetric", "softclip") else None
    layer = AffineCoupling(dense(2, 4), activation=activation, limit=limit)
    x = torch.randn(5, 4, dtype=torch.float64)
    y, ladj = layer(x)
    assert not torch.allclose(y, x)
    torch.testing.assert_close(layer.inverse(y)[0], x)
    torch.testing.assert_close(layer.inverse(y)[1], -ladj)


@pytest.mark.parametrize("flip", [False, True])
def test_mask_keeps_exactly_and_depends_on_nothing_that_moves(flip: bool) -> None:
    torch.manual_seed(0)
    board = (torch.arange(3)[:, None] + torch.arange(5)) % 2 == 0
    conditioner = nn.Conv2d(2, 4, 3, padding=1).double()
    layer = AffineCoupling(conditioner, mask=board, flip=flip, activation="tanh", limit=2.0)
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    y, ladj = layer(x)
    kept = (board != flip).expand_as(x)
    assert torch.equal(y[kept], x[kept])
    assert not torch.isclose(y[~kept], x[~kept]).any()
    torch.testing.assert_close(layer.inverse(y)[0], x)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0].flatten(), x[0]).reshape(30, 30)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, ladj[0])


def test_density_on_the_plane_integrates_to_one() -> None:
    torch.manual_seed(1)
    layers = [AffineCoupling(dense(1, 2), flip=flip, activation="tanh", limit=0.7) for flip in (False, True, False)]
    axis = torch.linspace(-14, 14, 701, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    total = torch.zeros(len(z), dtype=torch.float64)
    with torch.no_grad():
        for layer in layers:
            z, ladj = layer(z)
            total += ladj
    density = (total - 0.5 * z.square().sum(1) - math.log(2 * math.pi)).exp()
    assert density.sum().item() * (28 / 700) ** 2 == pytest.approx(1, abs=1e-3)


def test_context_reaches_the_conditioner() -> None:
    class Shift(nn.Module):
        def forward(self, kept: Tensor, context: Tensor) -> Tensor:
            return torch.cat((torch.zeros_like(kept), context.expand_as(kept)), dim=1)

    y, ladj = AffineCoupling(Shift())(torch.zeros(2, 4), torch.tensor([[3.0], [5.0]]))
    assert y.tolist() == [[0, 0, 3, 3], [0, 0, 5, 5]]
    assert ladj.tolist() == [0, 0]


def test_bad_input_is_named() -> None:
    layer = AffineCoupling(nn.Linear(1, 3))
    with pytest.raises(ValueError, match=r"x has shape \(4,\)"):
        layer(torch.zeros(4))
    with pytest.raises(ValueError, match=r"x has shape \(4, 1\)"):
        layer(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"conditioner returned shape \(4, 3\), but expected \(4, 2\)"):
        layer(torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"mask has dtype torch.float32"):
        AffineCoupling(nn.Identity(), mask=torch.ones(2))
    with pytest.raises(ValueError, match="scale that is 1 at raw scale 0"):
        AffineCoupling(nn.Identity(), mask=torch.ones(2, dtype=torch.bool), activation="sigmoid")
    with pytest.raises(ValueError, match="activation is 'cube'"):
        AffineCoupling(nn.Linear(1, 2), activation="cube")(torch.zeros(4, 2))


BUILD = {
    "additive": lambda net, flip: AdditiveCoupling(net(1), flip=flip),
    "affine": lambda net, flip: AffineCoupling(net(2), flip=flip),
    "spline": lambda net, flip: SplineCoupling(net(3 * 5 - 1), bins=5, bound=2.0, flip=flip),
    "spline on a circle": lambda net, flip: SplineCoupling(net(3 * 5), bins=5, tails="circular", flip=flip),
    "spline without tails": lambda net, flip: SplineCoupling(net(3 * 5 + 1), bins=5, tails=None, flip=flip),
    "mixture": lambda net, flip: MixtureCoupling(net(2 + 3 * 4), components=4, flip=flip),
}


def picture_coupling(kind: str, channels: int, flip: bool) -> Coupling:
    first = (channels + 1) // 2
    kept, moved = (channels - first, first) if flip else (first, channels - first)
    return BUILD[kind](lambda per_value: nn.Conv2d(kept, per_value * moved, 3, padding=1), flip).double()


@pytest.mark.parametrize("kind", BUILD)
@given(channels=st.integers(2, 4), n=st.integers(0, 2), height=st.integers(1, 3), flip=st.booleans())
def test_every_kind_moves_pictures_back_and_forth(kind, channels, n, height, flip):
    layer = picture_coupling(kind, channels, flip)
    x = torch.randn(n, channels, height, 2, dtype=torch.float64)
    y, ladj = layer(x)
    back, minus = layer.inverse(y)
    assert y.shape == x.shape
    assert ladj.shape == (n,)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(minus, -ladj, rtol=1e-6, atol=1e-6)
    first = (channels + 1) // 2
    same = slice(first, None) if flip else slice(0, first)
    assert torch.equal(y[:, same], x[:, same])
    for i in range(n):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0].flatten(), x[i])
        determinant = torch.linalg.slogdet(jacobian.reshape(x[i].numel(), -1)).logabsdet
        torch.testing.assert_close(determinant, ladj[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["spline", "mixture"])
def test_a_channel_is_transformed_by_its_own_parameters(kind):
    # The conditioner's output holds a channel's parameters together: those of channel 1 must not reach channel 0.
    torch.manual_seed(0)
    layer = picture_coupling(kind, 4, flip=False)
    moved = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    proposed = torch.randn(2, 2 * layer.per_value, 3, 2, dtype=torch.float64)
    before, _ = layer.couple(moved, proposed, inverse=False)
    proposed[:, layer.per_value :] += torch.randn_like(proposed[:, layer.per_value :])
    after, _ = layer.couple(moved, proposed, inverse=False)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.isclose(before[:, 1], after[:, 1]).all()


def test_a_spline_coupling_with_a_silent_conditioner_is_the_identity():
    layer = picture_coupling("spline", 4, flip=False)
    nn.init.zeros_(layer.conditioner.weight)
    nn.init.zeros_(layer.conditioner.bias)
    x = 2 * torch.randn(3, 4, 2, 2, dtype=torch.float64)
    y, ladj = layer(x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(ladj, torch.zeros(3, dtype=torch.float64))


def test_an_injector_is_affine_in_what_the_context_says():
    injector: Transform = AffineInjector(nn.Linear(2, 6)).double()
    x, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    y, ladj = injector(x, context)
    back, minus = injector.inverse(y, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -ladj)
    raw, shift = injector.network(context).chunk(2, dim=1)
    torch.testing.assert_close(y, x * (3 * raw.tanh()).exp() + shift)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: SplineCoupling(nn.Identity(), bins=1), "bins is 1, but expected at least 2"),
        (lambda: SplineCoupling(nn.Identity(), bound=0.0), "bound is 0.0, but expected a positive number"),
        (lambda: MixtureCoupling(nn.Identity(), components=0), "components is 0, but expected at least 1"),
        (lambda: AffineInjector(nn.Identity(), limit=0.0), "limit is 0.0, but expected a positive number"),
        (lambda: AffineInjector(nn.Identity())(torch.zeros(2, 3)), "context is None, but expected what the layer"),
        (
            lambda: AffineInjector(nn.Identity())(torch.zeros(2, 3), torch.zeros(2, 3)),
            r"network returned shape \(2, 3\), but expected \(2, 6\)",
        ),
        (
            lambda: SplineCoupling(nn.Linear(2, 5), bins=4)(torch.zeros(3, 4)),
            r"conditioner returned shape \(3, 5\), but expected \(3, 22\)",
        ),
    ],
)
def test_bad_arguments_of_the_other_kinds(act, message):
    with pytest.raises(ValueError, match=message):
        act()
