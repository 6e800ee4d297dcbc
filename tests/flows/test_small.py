"""The small transforms: normalization, linear maps, permutations, reshapes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen.flows import Inverse, Stack, Transform
from pygen.flows.linear import InvertibleLinear
from pygen.flows.normalization import ActNorm
from pygen.flows.permutation import Permutation
from pygen.flows.reshape import Flatten, Haar, Squeeze


def started(channels: int) -> ActNorm:
    layer = ActNorm(channels)
    with torch.no_grad():
        layer.log_scale.normal_(std=0.5)
        layer.shift.normal_()
    return layer.eval()


def shaken(channels: int, **options: object) -> InvertibleLinear:
    layer = InvertibleLinear(channels, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


ON_CHANNELS = {
    "actnorm": started,
    "linear": shaken,
    "linear with bias": lambda channels: shaken(channels, start="identity", bias=True),
    "permutation": lambda channels: Permutation.random(channels, seed=3),
    "reverse": Permutation.reverse,
}
ON_BLOCKS = {
    "squeeze": Squeeze,
    "haar": Haar,
    "unsqueeze": lambda: Inverse(Squeeze()),
    "unhaar": lambda: Inverse(Haar()),
}


def is_a_transform(layer: Transform, x: Tensor) -> None:
    """Round trip, and ladj against the Jacobian by autograd."""
    y, ladj = layer(x)
    back, minus = layer.inverse(y)
    assert y.numel() == x.numel()
    assert ladj.shape == (len(x),)
    assert ladj.dtype == torch.float64
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(minus, -ladj)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0].flatten(), x[i])
        determinant = torch.linalg.slogdet(jacobian.reshape(x[i].numel(), -1)).logabsdet
        torch.testing.assert_close(determinant, ladj[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ON_CHANNELS)
@given(n=st.integers(0, 2), channels=st.integers(1, 5), rest=st.lists(st.integers(1, 3), max_size=2))
def test_transforms_of_channels(kind, n, channels, rest):
    is_a_transform(ON_CHANNELS[kind](channels).double(), torch.randn(n, channels, *rest, dtype=torch.float64))


@pytest.mark.parametrize("kind", ON_BLOCKS)
@given(n=st.integers(0, 2), channels=st.integers(1, 2), height=st.integers(1, 2), width=st.integers(1, 2))
def test_transforms_of_blocks(kind, n, channels, height, width):
    shape = (4 * channels, height, width) if kind.startswith("un") else (channels, 2 * height, 2 * width)
    is_a_transform(ON_BLOCKS[kind](), torch.randn(n, *shape, dtype=torch.float64))


@pytest.mark.parametrize("layer", [Squeeze(), Permutation.random(4, seed=1), Flatten((4, 2, 6)), Haar()])
def test_what_is_arranged_is_laid_out_again(layer):
    x = torch.randn(3, 4, 2, 6)
    torch.testing.assert_close(layer.lay_out(layer.arrange(x)), x)
    torch.testing.assert_close(layer.arrange(x), layer(x)[0])


def test_a_split_of_squeezed_channels_is_the_checkerboard():
    board = (torch.arange(4)[:, None] + torch.arange(6)) % 2
    squeezed, _ = Squeeze()(board.float()[None, None])
    assert torch.equal(squeezed[:, :2], torch.zeros(1, 2, 2, 3))
    assert torch.equal(squeezed[:, 2:], torch.ones(1, 2, 2, 3))


def test_haar_is_orthonormal_and_its_first_channels_are_twice_the_means():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    y, _ = Haar()(x)
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    torch.testing.assert_close(y[:, :3], 2 * torch.nn.functional.avg_pool2d(x, 2))


@pytest.mark.parametrize("shape", [(64, 5), (16, 5, 3, 4)])
def test_the_first_batch_is_normalized(shape):
    layer = ActNorm(5)
    x = 3 * torch.randn(shape) + torch.arange(5.0).view(5, *(1 for _ in shape[2:]))
    y, _ = layer(x)
    values = y.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(1, correction=0), torch.ones(5), atol=1e-5, rtol=0)
    before = copy.deepcopy(layer.state_dict())
    layer(x + 5)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_normalization_starts_neither_in_evaluation_nor_after_loading():
    x = torch.randn(8, 3) + 2
    fresh = ActNorm(3).eval()
    assert torch.equal(fresh(x)[0], x)
    learned = ActNorm(3)
    learned(x)
    loaded = ActNorm(3)
    loaded.load_state_dict(learned.state_dict())
    loaded.train()
    other = 10 * torch.randn(8, 3)
    torch.testing.assert_close(loaded(other)[0], learned(other)[0])


def test_normalization_set_back_to_its_start_starts_anew():
    layer = ActNorm(3)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.randn(8, 3))
    layer.load_state_dict(start)
    y, _ = layer(5 * torch.randn(64, 3) + 2)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3))


def test_a_constant_channel_stays_finite():
    y, ladj = ActNorm(2)(torch.ones(4, 2))
    assert y.isfinite().all()
    assert ladj.isfinite().all()


def test_normalization_starts_in_a_compiled_model_and_in_a_frugal_stack():
    x = 3 * torch.randn(32, 4) + 1
    plain, traced, frugal = ActNorm(4), ActNorm(4), ActNorm(4)
    expected, _ = plain(x)
    torch.testing.assert_close(torch.compile(traced, fullgraph=True)(x)[0], expected)
    stack = Stack([frugal, InvertibleLinear(4)], memory="recompute")
    y, ladj = stack(x)
    (y.square().sum() - ladj.sum()).backward()
    torch.testing.assert_close(frugal(x)[0], expected)
    assert frugal.log_scale.grad.isfinite().all()


def test_a_rotation_keeps_volume_and_length():
    layer = InvertibleLinear(6)
    x = torch.randn(3, 6, 2)
    y, ladj = layer(x)
    torch.testing.assert_close(ladj, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.norm(), x.norm())
    torch.testing.assert_close(layer.weight() @ layer.inverse_weight(), torch.eye(6), atol=1e-5, rtol=0)


def change_in_place(layer: InvertibleLinear) -> InvertibleLinear:
    with torch.no_grad():
        layer.upper.add_(0.3)
    return layer


def change_through_data(layer: InvertibleLinear) -> InvertibleLinear:
    layer.log_diagonal.data.add_(0.5)
    return layer


def load_another(layer: InvertibleLinear) -> InvertibleLinear:
    layer.load_state_dict(shaken(5).state_dict())
    return layer


def take_a_step(layer: InvertibleLinear) -> InvertibleLinear:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.enable_grad():
        layer(torch.randn(3, 5))[0].square().sum().backward()
    optimizer.step()
    return layer


@pytest.mark.parametrize(
    "change", [change_in_place, change_through_data, load_another, take_a_step, lambda layer: layer.double().float()]
)
def test_kept_matrices_are_never_stale(change):
    layer = shaken(5).eval()
    x = torch.randn(4, 5)
    with torch.no_grad():
        for _ in range(2):
            layer.inverse(layer(x)[0])
        layer = change(layer)
        torch.testing.assert_close(layer(x)[0], x @ layer.weight().T)
        torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, rtol=1e-4, atol=1e-4)


def test_matrices_are_kept_in_evaluation(monkeypatch):
    layer = shaken(5).eval()
    made = []
    original = InvertibleLinear.inverse_weight
    monkeypatch.setattr(InvertibleLinear, "inverse_weight", lambda self: made.append(0) or original(self))
    with torch.no_grad():
        for _ in range(3):
            layer.inverse(torch.randn(2, 5))
    assert len(made) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ON_CHANNELS)
def test_half_precision(kind, dtype):
    x = torch.randn(3, 4, 2, 2).to(dtype)
    for layer in (ON_CHANNELS[kind](4), ON_CHANNELS[kind](4).to(dtype)):
        y, ladj = layer(x)
        back, _ = layer.inverse(y)
        assert y.dtype == back.dtype == dtype
        assert ladj.dtype == torch.float32
        torch.testing.assert_close(back, x, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ON_CHANNELS)
def test_travels_and_compiles(kind):
    layer = ON_CHANNELS[kind](4).eval()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 4)
    expected = layer(x)
    for actual in (twin(x), torch.compile(layer, fullgraph=True)(x)):
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: ActNorm(0), "channels is 0, but expected a positive number"),
        (lambda: ActNorm(3)(torch.zeros(2, 4)), r"x has shape \(2, 4\), but expected \(n, 3, ...\)"),
        (lambda: InvertibleLinear(3)(torch.zeros(2, 4)), r"x has shape \(2, 4\), but expected \(n, 3, ...\)"),
        (lambda: InvertibleLinear(3, start="zeros"), "start is 'zeros', but expected one of 'rotation', 'identity'"),
        (lambda: Permutation(torch.tensor([0, 0])), r"order is \[0, 0\], but expected a permutation of 0 .. 1"),
        (lambda: Permutation.reverse(3)(torch.zeros(2, 4)), r"x has shape \(2, 4\), but expected \(n, 3, ...\)"),
        (lambda: Squeeze()(torch.zeros(1, 1, 3, 2)), "expected .* of even height and width"),
        (lambda: Haar().inverse(torch.zeros(1, 3, 2, 2)), r"x has shape \(1, 3, 2, 2\), but expected \(n, 4 c"),
        (lambda: Flatten((2, 3))(torch.zeros(1, 3, 2)), r"x has shape \(1, 3, 2\), but expected \(n, 2, 3\)"),
    ],
)
def test_bad_arguments(act, message):
    with pytest.raises(ValueError, match=message):
        act()
