"""The discretized mixture of logistics: against its reference, PixelCNN++'s own formula, and the sum over all levels;
its gradients; and its sampler against the probabilities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, RELATIVE, opcheck
from goodness import fit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen import _native, ops


def grid(levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of all levels."""
    return torch.arange(levels, dtype=dtype) * (2 / (levels - 1)) - 1


def pictures(n: int, colours: int, *spatial: int, levels: int = 256, device: torch.device | None = None) -> Tensor:
    return grid(levels)[torch.randint(levels, (n, colours, *spatial))].to(device)


def proposed(n: int, colours: int, mixtures: int, *spatial: int, spread: float = 1.0) -> Tensor:
    """Parameters as an untrained network proposes them, scales of a few levels."""
    parameters = spread * torch.randn(n, mixtures * (10 if colours == 3 else 3), *spatial)
    each = parameters[:, mixtures:].unflatten(1, (colours, -1, mixtures))
    each[:, :, 1] -= 2
    return parameters


def pixelcnnpp(x: Tensor, parameters: Tensor) -> Tensor:
    """Salimans et al.'s loss, from the paper's formula, of pixels whose probabilities are no smaller than 1e-5."""
    mixtures = parameters.shape[1] // 10
    logits, rest = parameters[:, :mixtures], parameters[:, mixtures:].unflatten(1, (3, 3, mixtures))
    mu, log_scale, c = rest[:, :, 0].clone(), rest[:, :, 1].clamp(min=-7), rest[:, :, 2].tanh()
    mu[:, 1] += c[:, 0] * x[:, :1]
    mu[:, 2] += c[:, 1] * x[:, :1] + c[:, 2] * x[:, 1:2]
    centre = x[:, :, None] - mu
    upper = ((centre + 1 / 255) * (-log_scale).exp()).sigmoid()
    lower = ((centre - 1 / 255) * (-log_scale).exp()).sigmoid()
    upper = torch.where(x[:, :, None] > 0.999, 1.0, upper)
    lower = torch.where(x[:, :, None] < -0.999, 0.0, lower)
    return ((upper - lower).clamp(min=1e-300).log().sum(1) + logits.log_softmax(1)).logsumexp(1)


def check(x: Tensor, parameters: Tensor, *, levels: int = 256, scale: float = 1.0) -> None:
    """Value and gradients against the reference in float64."""
    leaves = [x.detach().requires_grad_(), parameters.detach().requires_grad_()]
    log_prob = ops.discretized_logistics_log_prob(*leaves, levels=levels)
    assert log_prob.dtype == (torch.float64 if parameters.dtype == torch.float64 else torch.float32)
    assert log_prob.shape == (x.shape[0], *x.shape[2:])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = ops.discretized_logistics_log_prob_reference(*exact, levels=levels)
    tolerance = scale * (1e-11 if parameters.dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(log_prob.double(), expected, rtol=tolerance, atol=tolerance)
    weight = torch.rand_like(expected)
    actual = torch.autograd.grad(log_prob, leaves, weight.to(log_prob.dtype))
    for leaf, gradient, wanted in zip(leaves, actual, torch.autograd.grad(expected, exact, weight), strict=True):
        assert gradient.dtype == leaf.dtype
        size = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        bound = max(tolerance, RELATIVE[leaf.dtype]) * 4
        torch.testing.assert_close(gradient.double(), wanted, rtol=bound, atol=bound * size)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(backend, device, colours, dtype):
    for mixtures in (1, 2, 10):
        for spatial in ((), (5,), (7, 6), (1, 33), (2, 3, 5)):
            x = pictures(3, colours, *spatial)
            parameters = proposed(3, colours, mixtures, *spatial)
            check(x.to(dtype).to(device), parameters.to(dtype).to(device))


def test_many_mixtures_and_levels(backend, device):
    for mixtures, levels in ((128, 256), (5, 2), (5, 3), (3, 17), (4, 65_536)):
        check(
            pictures(2, 3, 3, 4, levels=levels, device=device), proposed(2, 3, mixtures, 3, 4).to(device),
            levels=levels, scale=20 if levels == 65_536 else 1,
        )  # fmt: skip


@pytest.mark.parametrize("layout", [*LAYOUTS, "channels_last"])
def test_takes_any_strides(backend, device, layout):
    for dtype in (torch.float32, torch.bfloat16):
        if layout == "channels_last":
            parameters = torch.randn(2, 20, 5, 9, device=device).to(dtype).to(memory_format=torch.channels_last)
            x = pictures(2, 3, 5, 9, device=device).to(memory_format=torch.channels_last)
        else:
            parameters = LAYOUTS[layout]((2, 20, 5, 9), dtype, device)
            x = LAYOUTS[layout]((2, 3, 5, 9), torch.float32, device).clamp(-1, 1)
        check(x, parameters, scale=3)
        check(x[:, :, ::2, 1:].flip(3), parameters[:, :, ::2, 1:].flip(3), scale=3)


def test_is_pixelcnnpps_loss(backend, device):
    x, parameters = pictures(4, 3, 8, 8).double(), proposed(4, 3, 10, 8, 8).double()
    expected = pixelcnnpp(x, parameters)
    actual = ops.discretized_logistics_log_prob(x.float().to(device), parameters.float().to(device))
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels", [2, 3, 256])
def test_probabilities_add_to_one(backend, device, levels):
    for spread in (0.3, 1.0, 4.0):
        parameters = proposed(1, 1, 5, spread=spread).double().expand(levels, -1).to(device)
        x = grid(levels, torch.float64)[:, None].to(device)
        total = ops.discretized_logistics_log_prob(x, parameters, levels=levels).exp().sum()
        assert abs(float(total) - 1) < 1e-12
    if levels == 3:
        x = torch.tensor(list(itertools.product(grid(3).tolist(), repeat=3)), dtype=torch.float64, device=device)
        parameters = proposed(1, 3, 4).double().expand(27, -1).to(device)
        assert abs(float(ops.discretized_logistics_log_prob(x, parameters, levels=3).exp().sum()) - 1) < 1e-12


def test_tails_are_exact(backend, device):
    """Means far outside, the narrowest and the flattest scales: nothing is cut off, and gradients stay finite."""
    import mpmath

    mpmath.mp.dps = 60
    x = grid(256)[[0, 1, 100, 254, 255]][:, None]
    for mean in (-40.0, -1.0, 0.3, 7.0):
        for log_scale in (-7.0, -3.0, 0.0, 5.0, 12.0):
            parameters = torch.tensor([[0.0, mean, log_scale]]).expand(5, 3)
            check(x.to(device), parameters.to(device))
            actual = ops.discretized_logistics_log_prob(x.to(device), parameters.to(device)).cpu()
            for value, log_prob in zip(x[:, 0].tolist(), actual.tolist(), strict=True):
                s = mpmath.exp(-mpmath.mpf(log_scale))
                # mpf of the float32 values, as the kernel sees them
                upper, lower = ((mpmath.mpf(value) - mpmath.mpf(mean) + sign / mpmath.mpf(255)) * s for sign in (1, -1))
                sigmoid = [1 / (1 + mpmath.exp(-z)) for z in (upper, lower)]
                mass = 1 - sigmoid[1] if value == 1 else sigmoid[0] if value == -1 else sigmoid[0] - sigmoid[1]
                exact = float(mpmath.log(mass))
                assert abs(log_prob - exact) <= 3e-6 * max(1.0, abs(exact), abs(value - mean) * float(s)), (
                    mean, log_scale, value,
                )  # fmt: skip


@pytest.mark.parametrize("levels", [2, 3, 5, 17])
def test_levels_that_are_much_wider_than_a_logistic(backend, device, levels):
    """Almost all of the mass is in one level: what little is outside is not lost in rounding."""
    mean, log_scale = torch.meshgrid(torch.linspace(-1.2, 1.2, 25), torch.linspace(-7, -1, 13), indexing="ij")
    parameters = torch.stack([torch.zeros(mean.numel()), mean.flatten(), log_scale.flatten()], 1)
    for value in grid(levels):
        check(value.expand(len(parameters), 1).to(device), parameters.to(device), levels=levels)


def test_gradients(backend, device):
    x = (pictures(2, 3, 2, levels=7).double() + 0.02 * torch.randn(2, 3, 2)).to(device).requires_grad_()
    parameters = proposed(2, 3, 2, 2, spread=0.5).double().to(device).requires_grad_()

    def log_prob(x: Tensor, parameters: Tensor) -> Tensor:
        return ops.discretized_logistics_log_prob(x, parameters, levels=7)

    torch.autograd.gradcheck(log_prob, (x, parameters))
    torch.autograd.gradgradcheck(log_prob, (x, parameters))
    one = proposed(2, 1, 3, 2).double().to(device).requires_grad_()
    torch.autograd.gradcheck(log_prob, (x.detach()[:, :1].clone().requires_grad_(), one))


def test_log_scales_are_cut_off(backend, device):
    x = torch.zeros(1, 1, device=device)
    parameters = torch.tensor([[0.0, 0.3, -9.0]], device=device, requires_grad=True)
    log_prob = ops.discretized_logistics_log_prob(x, parameters)
    at_the_end = ops.discretized_logistics_log_prob(x, torch.tensor([[0.0, 0.3, -7.0]], device=device))
    assert torch.equal(log_prob, at_the_end)
    (gradient,) = torch.autograd.grad(log_prob, parameters)
    assert gradient[0, 2] == 0
    assert gradient[0, 1] != 0


def test_nan_stays_in_its_pixel(backend, device):
    x, parameters = pictures(2, 3, 5, 9), proposed(2, 3, 3, 5, 9)
    x[0, 1, 2, 3] = math.nan
    parameters[1, 0, 4, 8] = math.nan
    parameters[1, 7, 0, 0] = math.nan
    leaves = [x.to(device).requires_grad_(), parameters.to(device).requires_grad_()]
    log_prob = ops.discretized_logistics_log_prob(*leaves)
    bad = torch.zeros(2, 5, 9, dtype=torch.bool)
    bad[0, 2, 3] = bad[1, 4, 8] = bad[1, 0, 0] = True
    assert torch.equal(log_prob.isnan().cpu(), bad)
    for gradient in torch.autograd.grad(log_prob.sum(), leaves):
        assert torch.equal(gradient.isnan().any(1).cpu(), bad)


def test_a_pixel_does_not_depend_on_its_batch(backend, device):
    x, parameters = pictures(3, 3, 5, 7, device=device), proposed(3, 3, 4, 5, 7).to(device)
    whole = ops.discretized_logistics_log_prob(x, parameters)
    for i in range(3):
        assert torch.equal(ops.discretized_logistics_log_prob(x[i : i + 1], parameters[i : i + 1])[0], whole[i])
    part = ops.discretized_logistics_log_prob(x[:, :, 2:, 3:], parameters[:, :, 2:, 3:])
    assert torch.equal(part, whole[:, 2:, 3:])


@pytest.mark.usefixtures("four_threads")
def test_threads_do_not_change_a_bit(backend, device):
    if backend != "cpu":
        pytest.skip("one grid, however many threads")
    x, parameters = pictures(4, 3, 40, 40), proposed(4, 3, 10, 40, 40).requires_grad_()
    results = []
    for threads in (1, 2, 3):
        _native.set_num_threads(threads)
        log_prob = ops.discretized_logistics_log_prob(x, parameters)
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), parameters)))
    _native.set_num_threads(0)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@given(
    st.sampled_from([1, 3]), st.integers(1, 6), st.integers(0, 3), st.lists(st.integers(0, 9), max_size=2),
    st.sampled_from([2, 5, 256]), st.integers(0, 2**30),
)  # fmt: skip
def test_any_shape(colours, mixtures, n, spatial, levels, seed):
    torch.manual_seed(seed)
    check(pictures(n, colours, *spatial, levels=levels), proposed(n, colours, mixtures, *spatial), levels=levels)


def test_no_memory_for_the_components():
    """Forward and backward allocate what they return, and nothing as large as one channel of each component."""
    x, parameters = pictures(4, 3, 16, 16), proposed(4, 3, 10, 16, 16).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        ops.discretized_logistics_log_prob(x, parameters).sum().backward()
    allocated = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    returned = 4 * (parameters.numel() + x.numel() + 2 * x.numel() // 3)
    assert sum(size for size in allocated if size > 0) < 1.1 * returned


# The sampler.


def test_draws_the_distribution(backend, device):
    draws, levels = (2000, 3) if backend == "simt" else (40_000, 4)
    parameters = proposed(1, 3, 3, spread=0.7).to(device)
    ids = torch.arange(draws, device=device)
    x, log_prob = ops.sample_discretized_logistics(
        parameters.expand(draws, -1), seed=3, sample_ids=ids, position=12, levels=levels
    )
    outcomes = torch.tensor(list(itertools.product(grid(levels).tolist(), repeat=3)), device=device)
    probability = ops.discretized_logistics_log_prob(
        outcomes.double(), parameters.double().expand(len(outcomes), -1), levels=levels
    ).exp()
    k = ((x + 1) * (levels - 1) / 2).round().long().cpu()
    assert fit((k * torch.tensor([levels**2, levels, 1])).sum(1), probability.cpu()) > 1e-4
    again = ops.discretized_logistics_log_prob(x, parameters.expand(draws, -1), levels=levels)
    torch.testing.assert_close(log_prob.sum(1), again, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("colours", [1, 3])
def test_sampler_equals_its_reference(backend, device, colours, dtype):
    n = 50 if backend == "simt" else 500
    ids = torch.arange(n, device=device) - 7
    for mixtures, levels in ((1, 256), (10, 256), (128, 5), (3, 65_536)):
        parameters = proposed(n, colours, mixtures).to(dtype).to(device)
        known = torch.rand(n, colours, device=device) < 0.3
        given_x = pictures(n, colours, levels=levels, device=device)
        for extra in ({}, {"x": given_x, "known": known}):
            address = {"seed": 2**63 + 5, "sample_ids": ids, "position": ids + 100}
            options = {"colours": colours, "levels": levels, **address, **extra}
            x, log_prob = ops.sample_discretized_logistics(parameters, **options)
            expected = ops.sample_discretized_logistics_reference(parameters, **options)
            assert x.dtype == log_prob.dtype == expected[0].dtype
            # Rounding may take a value that falls between two levels either way.
            same = (x == expected[0]).all(1)
            assert same.float().mean() > (0.8 if levels == 65_536 and dtype != torch.float64 else 0.99)
            torch.testing.assert_close(x, expected[0], rtol=0, atol=4.0 / (levels - 1))
            torch.testing.assert_close(log_prob[same], expected[1][same], rtol=1e-4, atol=1e-4)
            if extra:
                assert torch.equal(x[known], given_x.to(x.dtype)[known])


def test_samples_lie_on_the_levels(backend, device):
    ids = torch.arange(100, device=device)
    for levels in (2, 17, 256):
        parameters = proposed(100, 3, 2, spread=3).to(device)
        x, _ = ops.sample_discretized_logistics(parameters, seed=0, sample_ids=ids, position=0, levels=levels)
        k = ((x.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
        assert torch.equal(k.float() * (2 / (levels - 1)) - 1, x)  # as GenerativeModel.dequantize has them
        assert x.min() == -1
        assert x.max() == 1


def test_a_pixel_is_its_colours_in_turn(backend, device):
    n = 40
    ids, parameters = torch.arange(n, device=device), proposed(n, 3, 5).to(device)
    address = {"seed": 4, "sample_ids": ids, "position": 9}
    whole, log_prob = ops.sample_discretized_logistics(parameters, **address)
    x, known = torch.zeros(n, 3, device=device), torch.zeros(n, 3, dtype=torch.bool, device=device)
    for c in range(3):
        drawn, each = ops.sample_discretized_logistics(parameters, **address, x=x, known=known)
        x[:, c], known[:, c] = drawn[:, c], True
        assert torch.equal(each[:, : c + 1], log_prob[:, : c + 1])
    assert torch.equal(x, whole)
    # Another position, and one further on, whose numbers are those of the colour after.
    assert not torch.equal(ops.sample_discretized_logistics(parameters, **{**address, "position": 8})[0], whole)


def test_a_row_does_not_depend_on_its_batch(backend, device):
    parameters, ids = proposed(5, 3, 4).to(device), torch.tensor([7, 2**40, -3, 0, 99], device=device)
    options = {"seed": 4, "position": 2**30 - 3}
    together = ops.sample_discretized_logistics(parameters, sample_ids=ids, **options)
    for row in range(5):
        alone = ops.sample_discretized_logistics(parameters[row : row + 1], sample_ids=ids[row : row + 1], **options)
        assert torch.equal(alone[0][0], together[0][row])
        assert torch.equal(alone[1][0], together[1][row])


def test_backends_agree_in_every_bit(backend, device):
    if backend != "simt":
        pytest.skip("compares the CPU kernels with the CUDA sources")
    parameters, ids = proposed(200, 3, 10), torch.arange(200)
    fibers = ops.sample_discretized_logistics(parameters, seed=1, sample_ids=ids, position=2)
    cpu = torch.ops.pygen.discretized_logistics_sample(parameters, ids, 1, None, 2, None, 3, 256, None, None)
    assert torch.equal(fibers[0], cpu[0])
    assert torch.equal(fibers[1], cpu[1])


def test_rows_of_nan_are_marked(backend, device):
    parameters, ids = proposed(4, 3, 2), torch.arange(4, device=device)
    parameters[1, 0] = math.nan
    parameters[2, :2] = -math.inf
    x, log_prob = ops.sample_discretized_logistics(parameters.to(device), seed=0, sample_ids=ids, position=0)
    assert x.isnan().all(1).tolist() == [False, True, True, False]
    assert torch.equal(log_prob.isnan().all(1), x.isnan().all(1))


def test_raw_operators_pass_opcheck(backend, device, namespace):
    operators = getattr(torch.ops, namespace)
    x, parameters, ids = (
        pictures(2, 3, 4, device=device),
        proposed(2, 3, 2, 4).to(device),
        torch.arange(2, device=device),
    )
    opcheck(operators.discretized_logistics_forward.default, (x, parameters, 256))
    grad = torch.randn(2, 4, device=device)
    opcheck(operators.discretized_logistics_backward.default, (x, parameters, grad, 256))
    pixel = (parameters[..., 0].contiguous(), ids, 1, None, 2, ids, 3, 256)
    opcheck(operators.discretized_logistics_sample.default, (*pixel, None, None))
    opcheck(operators.discretized_logistics_sample.default, (*pixel, x[..., 0], x[..., 0] > 0))


def test_compiles_in_one_graph(backend, device):
    x, parameters = pictures(2, 3, 4, 4, device=device), proposed(2, 3, 2, 4, 4).to(device).requires_grad_()

    def loss(x: Tensor, parameters: Tensor) -> Tensor:
        return -ops.discretized_logistics_log_prob(x, F.relu(parameters)).mean()

    expected = torch.autograd.grad(loss(x, parameters), parameters)[0]
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, parameters), parameters)[0]
    torch.testing.assert_close(actual, expected)
    ids = torch.arange(2, device=device)

    def draw(parameters: Tensor) -> tuple[Tensor, Tensor]:
        return ops.sample_discretized_logistics(parameters, seed=1, sample_ids=ids, position=0)

    pixel = parameters.detach()[..., 0, 0].contiguous()
    for one, other in zip(torch.compile(draw, fullgraph=True)(pixel), draw(pixel), strict=True):
        assert torch.equal(one, other)


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for shape in ((), (1,), (3, 5), (32,), (33,), (7, 300)):
            x, parameters = pictures(2, 3, *shape, device=device), proposed(2, 3, 2, *shape).to(device).requires_grad_()
            log_prob = ops.discretized_logistics_log_prob(x, parameters)
            assert not log_prob.isnan().any()
            assert not torch.autograd.grad(log_prob.sum(), parameters)[0].isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    x, parameters = pictures(4, 3, 30, device=device), proposed(4, 3, 10, 30).to(device)
    position = torch.zeros((), dtype=torch.int64, device=device)
    options = {"seed": 1, "sample_ids": torch.arange(4, device=device), "position": position}

    def all_of(**changes: int) -> tuple[Tensor, ...]:
        leaf = parameters.detach().requires_grad_()
        log_prob = ops.discretized_logistics_log_prob(x, leaf)
        (grad,) = torch.autograd.grad(log_prob.sum(), leaf)
        pixel = parameters[:, :, 7].contiguous()
        return log_prob.detach(), grad, *ops.sample_discretized_logistics(pixel, **{**options, **changes})

    side = torch.cuda.Stream()  # where autograd is warmed up, as PyTorch asks for
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_of()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = all_of()
        position += 1
    for step in range(3):
        parameters.copy_(proposed(4, 3, 10, 30))
        x.copy_(pictures(4, 3, 30))
        graph.replay()
        for one, other in zip(actual, all_of(position=step), strict=True):
            assert torch.equal(one, other)


REFUSALS = {
    "x has 2 colours, but expected 1 or 3": {"x": torch.zeros(2, 2, 4), "parameters": torch.zeros(2, 10, 4)},
    "parameters has 12 values for a pixel, but expected 10 for each": {"parameters": torch.zeros(2, 12, 4)},
    "parameters has 0 values": {"parameters": torch.zeros(2, 0, 4)},
    "parameters has 1290 values": {"parameters": torch.zeros(2, 1290, 4)},
    "parameters has shape (2, 10, 5), but expected that of x, (2, 3, 4)": {"parameters": torch.zeros(2, 10, 5)},
    "parameters has shape (3, 10, 4)": {"parameters": torch.zeros(3, 10, 4)},
    "levels is 1, but expected 2 to 65536": {"levels": 1},
    "x has dtype torch.int64": {"x": torch.zeros(2, 3, 4, dtype=torch.int64)},
    "parameters is on meta": {"parameters": torch.zeros(2, 10, 4, device="meta")},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refuses_in_one_sentence(message):
    arguments = {"x": torch.zeros(2, 3, 4), "parameters": torch.zeros(2, 10, 4), "levels": 256}
    ops.discretized_logistics_log_prob(**arguments)
    with pytest.raises((ValueError, TypeError)) as error:
        ops.discretized_logistics_log_prob(**{**arguments, **REFUSALS[message]})
    assert message in str(error.value)


SAMPLER_REFUSALS = {
    "parameters has shape (2, 10, 1), but expected (n, parameters)": {"parameters": torch.zeros(2, 10, 1)},
    "x has 2 colours": {"colours": 2},
    "parameters has 10 values for a pixel, but expected 3 for each": {"colours": 1},
    "sample_ids has shape (3,)": {"sample_ids": torch.arange(3)},
    "x and known come together": {"x": torch.zeros(2, 3)},
    "known has shape (2, 1), but expected (2, 3)": {"x": torch.zeros(2, 3), "known": torch.zeros(2, 1) > 0},
    "known has dtype torch.float32": {"x": torch.zeros(2, 3), "known": torch.zeros(2, 3)},
    "position is -1": {"position": -1},
}


@pytest.mark.parametrize("message", SAMPLER_REFUSALS)
def test_sampler_refuses_in_one_sentence(message):
    arguments = {"parameters": torch.zeros(2, 10), "seed": 0, "sample_ids": torch.arange(2), "position": 0}
    ops.sample_discretized_logistics(**arguments)
    with pytest.raises((ValueError, TypeError)) as error:
        ops.sample_discretized_logistics(**{**arguments, **SAMPLER_REFUSALS[message]})
    assert message in str(error.value)
