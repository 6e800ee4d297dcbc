"""The logistic mixture against its reference, its own inverse, autograd, and float64; in the middle and far out."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, LAYOUTS, close, opcheck
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen import _native, ops
from pygen.ops.mixture import MAX_COMPONENTS, logistic_mixture_reference

SHAPES = [(3, 5), (1, 1), (7,), (), (0, 3), (3, 0), (2, 3, 4, 5), (2, 1500)]
CPU = torch.device("cpu")


def draw(shape: tuple[int, ...], components: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, device=device).to(dtype)
    return x, torch.randn(*shape, 3 * components, device=device).to(dtype)


def weights(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, max(1, y.numel()), dtype=y.dtype, device=y.device)[: y.numel()].view_as(y)


def gradients(function, x: Tensor, parts, **options) -> list[Tensor]:
    parts = (parts,) if isinstance(parts, Tensor) else parts
    leaves = [x.detach().clone().requires_grad_(), *(part.detach().clone().requires_grad_() for part in parts)]
    y, ladj = function(leaves[0], leaves[1] if len(parts) == 1 else tuple(leaves[1:]), **options)
    return list(torch.autograd.grad(((y * weights(y)).sum(), (ladj * weights(ladj)).sum()), leaves))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(backend, device, dtype, inverse):
    for shape in SHAPES:
        event_dims = min(1, len(shape))
        for components in (1, 5) if len(shape) != 2 else (1, 3, 8, 33):
            x, parameters = draw(shape, components, dtype, device)
            options = {"inverse": inverse, "event_dims": event_dims}
            y, ladj = ops.logistic_mixture(x, parameters, **options)
            expected_y, expected_ladj = logistic_mixture_reference(x, parameters, **options)
            assert y.dtype == dtype
            assert ladj.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            close(y, expected_y, scale=3)
            close(ladj, expected_ladj, scale=20)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_those_of_the_reference(backend, device, dtype, inverse):
    for shape, components in [((3, 5), 4), ((70, 2), 1), ((2, 3, 4, 5), 9), ((2, 1100), 3)]:
        x, parameters = draw(shape, components, dtype, device)
        actual = gradients(ops.logistic_mixture, x, parameters, inverse=inverse)
        # The reference of 16-bit numbers rounds its gradients before it adds them up.
        exact = gradients(logistic_mixture_reference, x.double(), parameters.double(), inverse=inverse)
        for a, b in zip(actual, exact, strict=True):
            assert a.dtype == dtype
            close(a, b.to(dtype), scale=10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("event_dims", [0, 1, 3, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_takes_any_strides(backend, device, layout, event_dims, packed):
    shape = (3, 4, 5, 8)
    x = LAYOUTS["transposed"](shape, torch.float32, device) if layout == "transposed" else torch.randn(shape).to(device)
    parameters = LAYOUTS[layout]((*shape, 9), torch.float32, device)
    given = parameters if packed else tuple(LAYOUTS[layout]((*shape, 3), torch.float32, device) for _ in range(3))
    for inverse in (False, True):
        options = {"inverse": inverse, "event_dims": event_dims}
        y, ladj = ops.logistic_mixture(x, given, **options)
        expected_y, expected_ladj = logistic_mixture_reference(x, given, **options)
        assert ladj.shape == shape[: 4 - event_dims]
        close(y, expected_y, scale=3)
        close(ladj, expected_ladj, scale=10)
        for a, b in zip(
            gradients(ops.logistic_mixture, x, given, **options),
            gradients(logistic_mixture_reference, x, given, **options), strict=True,
        ):  # fmt: skip
            close(a, b, scale=10)


def test_takes_what_a_convolution_leaves(backend, device):
    # (n, c P, h, w) seen as (n, c, h, w, P): elements side by side, their parameters apart.
    parameters = torch.randn(2, 3 * 12, 5, 7, device=device).unflatten(1, (3, 12)).permute(0, 1, 3, 4, 2)
    x = torch.randn(2, 3, 5, 7, device=device)
    for part in (parameters, parameters.to(torch.bfloat16)):
        for a, b in zip(ops.logistic_mixture(x, part), ops.logistic_mixture(x, part.contiguous()), strict=True):
            assert torch.equal(a, b)


def test_parameters_broadcast(backend, device):
    x, _ = draw((4, 6), 3, torch.float32, device)
    shared = torch.randn(6, 9, device=device)
    y, ladj = ops.logistic_mixture(x, shared)
    expected = ops.logistic_mixture(x, shared.expand(4, 6, 9).contiguous())
    assert torch.equal(y, expected[0])
    assert torch.equal(ladj, expected[1])
    close(*(gradients(f, x, shared)[1] for f in (ops.logistic_mixture, logistic_mixture_reference)), scale=10)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_mixes_dtypes_as_autocast_does(backend, device, x_dtype):
    x, _ = draw((5, 24), 3, x_dtype, device)
    parts = tuple(torch.randn(5, 24, 3, device=device).to(d) for d in (torch.float16, torch.float32, torch.bfloat16))
    for inverse in (False, True):
        y, ladj = ops.logistic_mixture(x, parts, inverse=inverse)
        expected_y, expected_ladj = logistic_mixture_reference(x, parts, inverse=inverse)
        assert (y.dtype, ladj.dtype) == (x_dtype, torch.float32)
        close(y, expected_y, scale=3)
        close(ladj, expected_ladj, scale=10)
        for leaf, twin, value in zip(
            gradients(ops.logistic_mixture, x, parts, inverse=inverse),
            gradients(logistic_mixture_reference, x, parts, inverse=inverse), (x, *parts), strict=True,
        ):  # fmt: skip
            assert leaf.dtype == value.dtype
            # The inverse keeps its output for the backward, rounded to x's dtype.
            close(leaf.to(x_dtype), twin.to(x_dtype), scale=4)


def test_is_the_logit_of_the_distribution_function(backend, device):
    x, parameters = draw((50, 4), 5, torch.float64, device)
    logits, means, log_scales = parameters.chunk(3, -1)
    z = (x.unsqueeze(-1) - means) / log_scales.exp()
    below = (logits.softmax(-1) * z.sigmoid()).sum(-1)
    density = (logits.softmax(-1) * z.sigmoid() * (-z).sigmoid() / log_scales.exp()).sum(-1)
    y, ladj = ops.logistic_mixture(x, parameters)
    torch.testing.assert_close(y, below.logit())
    torch.testing.assert_close(ladj, (density / below / (1 - below)).log().sum(-1))
    # One component is affine: y = (x - mu) e^{-s}.
    mean, log_scale = torch.randn(2, 50, 4, 1, dtype=torch.float64, device=device)
    y, ladj = ops.logistic_mixture(x, (torch.zeros_like(mean), mean, log_scale))
    torch.testing.assert_close(y, ((x.unsqueeze(-1) - mean) / log_scale.exp()).squeeze(-1))
    torch.testing.assert_close(ladj, -log_scale.sum((-2, -1)))


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    components=st.integers(1, 40),
    data=st.data(),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_round_trip(shape, components, data, seed, dtype):
    torch.manual_seed(seed)
    event_dims = data.draw(st.integers(0, len(shape)))
    x, parameters = draw(shape, components, dtype, CPU)
    y, ladj = ops.logistic_mixture(x, parameters, event_dims=event_dims)
    back, back_ladj = ops.logistic_mixture(y, parameters, inverse=True, event_dims=event_dims)
    # x comes back to the rounding of y over the slope, which between components may be far below one.
    slope = ops.logistic_mixture(x, parameters, event_dims=0)[1].clamp(max=0).exp()
    error = torch.finfo(dtype).eps
    assert ((back - x).abs() * slope <= 30 * error * (1 + y.abs() + x.abs())).all()
    torch.testing.assert_close(back_ladj, -ladj, rtol=5e4 * error, atol=5e4 * error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("components", "spreads", "log_scale"),
    [
        # Sharp, far apart, with weights of all sizes: plateaus where Newton's steps lead nowhere.
        (6, (10, 4, 2, 6), -1),
        # Scales of all sizes: Halley's steps alone would not find one of these within the bound.
        (8, (1, 2, 3.5, 3), 0),
    ],
)
def test_the_inverse_is_solved_to_rounding(backend, device, components, spreads, log_scale, dtype):
    n = 400 if backend == "simt" else 20_000
    logits, means, log_scales = (
        torch.randn(n, components, dtype=dtype, device=device) * spread for spread in spreads[:3]
    )
    y = torch.randn(n, dtype=dtype, device=device) * spreads[3]
    parts = (logits, means, log_scales + log_scale)
    x, _ = ops.logistic_mixture(y, parts, inverse=True, event_dims=0)
    again, slope = ops.logistic_mixture(x.double(), tuple(part.double() for part in parts), event_dims=0)
    # Off by the rounding of x and of the means, which the slope carries to y, and of y.
    size = x.abs() + means.abs().amax(-1)
    allowed = 2 * torch.finfo(dtype).eps * (1 + y.abs() + slope.exp().to(dtype) * size + logits.abs().amax(-1))
    assert ((again - y).abs() <= allowed).all()
    assert x.isfinite().all()


@pytest.mark.parametrize("inverse", [False, True])
def test_ladj_is_the_jacobian_of_autograd(backend, device, inverse):
    x, parameters = draw((1, 6), 4, torch.float64, device)
    jacobian = torch.autograd.functional.jacobian(
        lambda value: ops.logistic_mixture(value, parameters, inverse=inverse)[0], x
    )
    _, ladj = ops.logistic_mixture(x, parameters, inverse=inverse)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.reshape(6, 6))[1], ladj[0])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_gradients(backend, device, inverse, packed):
    x, parameters = draw((2, 2), 2, torch.float64, device)
    parts = [parameters] if packed else list(parameters.chunk(3, -1))
    leaves = [t.detach().clone().requires_grad_() for t in (x, *parts)]

    def transform(x: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        return ops.logistic_mixture(x, parts[0] if packed else parts, inverse=inverse)

    assert torch.autograd.gradcheck(transform, leaves)
    assert torch.autograd.gradgradcheck(transform, leaves)


@pytest.mark.parametrize("function", [ops.logistic_mixture, logistic_mixture_reference])
@pytest.mark.parametrize("inverse", [False, True])
def test_stays_finite_far_out(backend, device, inverse, function):
    n = 64 if backend == "simt" or function is logistic_mixture_reference else 1024
    logits = torch.randn(n, 8, device=device) * 100
    means = torch.randn(n, 8, device=device) * 3
    log_scales = torch.empty(n, 8, device=device).uniform_(-7, 7)
    x = torch.cat((torch.tensor([1e4, -1e4, 0.0, 1e-30], device=device), torch.randn(n - 4, device=device) * 1e3))
    y, ladj = function(x, (logits, means, log_scales), inverse=inverse, event_dims=0)
    assert y.isfinite().all()
    assert ladj.isfinite().all()
    for gradient in gradients(function, x, (logits, means, log_scales), inverse=inverse, event_dims=0):
        assert gradient.isfinite().all()


def test_log_scales_beyond_the_limit_count_as_the_limit(backend, device):
    x = torch.linspace(-3, 3, 7, device=device)
    zeros = torch.zeros(7, 1, device=device)
    for log_scale, limit in ((90.0, 30.0), (-300.0, -30.0)):
        parts = (zeros, zeros, zeros + log_scale)
        y, ladj = ops.logistic_mixture(x, parts)
        expected = ops.logistic_mixture(x, (zeros, zeros, zeros + limit))
        assert torch.equal(y, expected[0])
        assert ladj == expected[1] == pytest.approx(-7 * limit)
        assert (gradients(ops.logistic_mixture, x, parts)[3] == 0).all()
        close(logistic_mixture_reference(x, parts)[0], y)


def test_raw_operators_pass_opcheck(backend, device, namespace):
    library = getattr(torch.ops, namespace)
    x, parameters = draw((2, 5, 4), 3, torch.float32, device)
    apart = list(torch.randn(3, 5, 4, 2, 3, device=device).permute(0, 3, 1, 2, 4))
    mixed = [apart[0].half(), *apart[1:]]
    grad_ladj = torch.randn(2, device=device)
    for parts in ([parameters], apart, mixed):
        for operator in (library.logistic_mixture_forward, library.logistic_mixture_inverse):
            opcheck(operator.default, (x, parts, 2))
        opcheck(library.logistic_mixture_backward.default, (x, parts, x, grad_ladj, 2, True))


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_compiles_in_one_graph(backend, device, inverse, with_gradient):
    x, parameters = (t.requires_grad_(with_gradient) for t in draw((4, 8), 3, torch.float32, device))

    def transform(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return ops.logistic_mixture(x * 2, parameters, inverse=inverse)

    y, ladj = torch.compile(transform, fullgraph=True)(x, parameters)
    expected = transform(x, parameters)
    close(y, expected[0])
    close(ladj, expected[1], scale=4)
    if with_gradient:
        actual = torch.autograd.grad((y * weights(y)).sum() + ladj.sum(), (x, parameters))
        wanted = torch.autograd.grad((expected[0] * weights(y)).sum() + expected[1].sum(), (x, parameters))
        for a, b in zip(actual, wanted, strict=True):
            close(a, b, scale=4)


def test_functorch_takes_the_reference(backend, device):
    x, parameters = draw((4, 8), 3, torch.float64, device)
    for inverse in (False, True):
        per_row = torch.vmap(lambda *row, inverse=inverse: ops.logistic_mixture(*row, inverse=inverse))(x, parameters)
        y, ladj = ops.logistic_mixture(x, parameters, inverse=inverse)
        close(per_row[0], y)
        close(per_row[1], ladj, scale=4)
        slope = ops.logistic_mixture(x, parameters, inverse=inverse, event_dims=0)[1].exp()
        function = lambda v, inverse=inverse: ops.logistic_mixture(v, parameters, inverse=inverse)[0]  # noqa: E731
        close(torch.func.jvp(function, (x,), (torch.ones_like(x),))[1], slope, scale=4)


@pytest.mark.usefixtures("four_threads")
def test_threads_and_batch_position_do_not_change_a_bit(backend, device):
    x, parameters = draw((5, 3000), 3, torch.float32, device)
    for inverse in (False, True):
        torch.set_num_threads(4)
        y, ladj = ops.logistic_mixture(x, parameters, inverse=inverse)
        grads = gradients(ops.logistic_mixture, x, parameters, inverse=inverse)
        torch.set_num_threads(1)
        for a, b in zip((y, ladj), ops.logistic_mixture(x, parameters, inverse=inverse), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(grads, gradients(ops.logistic_mixture, x, parameters, inverse=inverse), strict=True):
            assert torch.equal(a, b)
        alone = ops.logistic_mixture(x[3:4, 5:], parameters[3:4, 5:], inverse=inverse, event_dims=0)
        assert torch.equal(alone[0], y[3:4, 5:])
        assert torch.equal(ops.logistic_mixture(x[3:4], parameters[3:4], inverse=inverse)[1], ladj[3:4])


@pytest.mark.parametrize("inverse", [False, True])
def test_no_less_accurate_than_pytorch(backend, device, inverse):
    x, parameters = draw((32, 64), 8, torch.float64, device)
    x, parameters = (x * 4).float(), (parameters * 2).float()
    exact = logistic_mixture_reference(x.double(), parameters.double(), inverse=inverse)
    exact += tuple(gradients(logistic_mixture_reference, x.double(), parameters.double(), inverse=inverse))
    ours, theirs = (
        f(x, parameters, inverse=inverse) + tuple(gradients(f, x, parameters, inverse=inverse))
        for f in (ops.logistic_mixture, logistic_mixture_reference)
    )
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        scale = truth.abs().clamp_min(1)
        # Square roots, because where the slope is tiny the inverse magnifies one rounding over all others.
        error = ((mine.double() - truth).abs() / scale).sqrt().mean()
        peer = ((other.double() - truth).abs() / scale).sqrt().mean()
        assert error <= 1.05 * peer


def test_invalid_data_stays_in_its_row(backend, device):
    x, parameters = draw((4, 9), 3, torch.float32, device)
    for inverse in (False, True):
        clean = ops.logistic_mixture(x, parameters, inverse=inverse)
        broken_x, broken = x.clone(), parameters.clone()
        broken_x[1, 2] = math.nan
        broken[2, 3, 0] = broken[3, 0, 4] = broken[3, 1, 8] = math.nan
        y, ladj = ops.logistic_mixture(broken_x, broken, inverse=inverse)
        assert torch.equal(y[0], clean[0][0])
        assert torch.equal(ladj[0], clean[1][0])
        assert y.isnan().sum(1).tolist() == [0, 1, 1, 2]
        assert ladj[1:].isnan().all()
        grad_x, grad_parameters = gradients(ops.logistic_mixture, broken_x, broken, inverse=inverse)
        assert grad_x.isnan().sum(1).tolist() == [0, 1, 1, 2]
        assert grad_parameters[0].isfinite().all()


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for shape in SHAPES:
            for inverse in (False, True):
                x, parameters = draw(shape, 3, torch.float32, device)
                y, ladj = ops.logistic_mixture(x, parameters, inverse=inverse, event_dims=len(shape))
                assert y.isfinite().all()
                assert ladj.isfinite()
                assert all(g.isfinite().all() for g in gradients(
                    ops.logistic_mixture, x, parameters, inverse=inverse, event_dims=len(shape)
                ))  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("parameters", "options", "sentence"),
    [
        (torch.zeros(3, 4, 7), {}, "parameters has 7 values for an element, but expected as many logits"),
        (torch.zeros(3, 4, 0), {}, f"parameters are for 0 components, but expected 1 to {MAX_COMPONENTS}"),
        (torch.zeros(3, 4, 387), {}, "parameters are for 129 components"),
        (torch.zeros(5, 6), {}, r"parameters has shape \(5, 6\), but expected one that broadcasts to x's \(3, 4\)"),
        (torch.zeros(3, 4, 6, device="meta"), {}, "parameters is on meta, but expected x's cpu"),
        ((torch.zeros(3, 4, 2),) * 2, {}, "parameters has 2 tensors, but expected one, or logits"),
        ((*(torch.zeros(3, 4, 2),) * 2, torch.zeros(3, 4, 5)), {}, r"parameters has 2 \+ 2 \+ 5 values"),
        ((*(torch.zeros(3, 4, 2),) * 2, torch.zeros(5, 2)), {}, r"log_scales has shape \(5, 2\)"),
        (torch.zeros(3, 4, 6), {"event_dims": 3}, "event_dims is 3, but x has 2 dimensions"),
    ],
)
def test_bad_arguments_get_one_sentence(parameters, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.logistic_mixture(torch.zeros(3, 4), parameters, **options)


def test_dtypes_that_are_not_floating_are_refused():
    with pytest.raises(TypeError, match="x has dtype torch.int64"):
        ops.logistic_mixture(torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3))
    with pytest.raises(TypeError, match="means has dtype torch.int32"):
        ops.logistic_mixture(torch.zeros(3), (torch.zeros(3, 1), torch.zeros(3, 1).int(), torch.zeros(3, 1)))


def test_raw_operators_check_what_would_reach_memory(backend, namespace, device):
    library = getattr(torch.ops, namespace)
    x, parameters = draw((3, 4), 2, torch.float32, device)
    with pytest.raises(RuntimeError, match=r"parameters has shape \(3, 5, 6\), but expected x's \(3, 4\)"):
        library.logistic_mixture_forward(x, [torch.zeros(3, 5, 6, device=device)], 1)
    with pytest.raises(RuntimeError, match="parameters has 7 values for an element"):
        library.logistic_mixture_forward(x, [torch.zeros(3, 4, 7, device=device)], 1)
    with pytest.raises(RuntimeError, match="parameters has 2 tensors"):
        library.logistic_mixture_inverse(x, [parameters, parameters], 1)
    with pytest.raises(RuntimeError, match="event_dims is 7"):
        library.logistic_mixture_forward(x, [parameters], 7)
    with pytest.raises(RuntimeError, match=r"grad_output has shape \(4, 4\)"):
        library.logistic_mixture_backward(x, [parameters], torch.zeros(4, 4, device=device), x[:, 0], 1, False)
    with pytest.raises(RuntimeError, match=r"grad_ladj has shape \(3, 4\)"):
        library.logistic_mixture_backward(x, [parameters], x, x, 1, False)


def test_most_components(backend, device):
    for dtype in (torch.float32, torch.float64):
        x, parameters = draw((2, 33), MAX_COMPONENTS, dtype, device)
        for inverse in (False, True):
            y, ladj = ops.logistic_mixture(x, parameters, inverse=inverse)
            expected = logistic_mixture_reference(x, parameters, inverse=inverse)
            close(y, expected[0], scale=10)
            close(ladj, expected[1], scale=20)


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    x, parameters = draw((64, 300), 8, torch.float32, device)
    ops.logistic_mixture(x, parameters, inverse=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, ladj = ops.logistic_mixture(x, parameters, inverse=True)
    x.normal_()
    graph.replay()
    for actual, expected in zip((y, ladj), ops.logistic_mixture(x, parameters, inverse=True), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.large
def test_more_than_two_to_the_31_parameters(backend, device):
    if backend != "cuda":
        pytest.skip("index arithmetic past 2^31 is tested on a GPU only")
    x = torch.zeros(2, 2**29, dtype=torch.bfloat16, device=device)
    parameters = torch.zeros(2, 2**29, 3, dtype=torch.bfloat16, device=device)
    parameters[1, -1, 1] = 1
    y, ladj = ops.logistic_mixture(x, parameters)
    assert y[1, -1] == -1
    assert y[0].count_nonzero() == 0
    assert ladj.tolist() == [0.0, 0.0]


def test_the_reference_serves_where_there_are_no_kernels(monkeypatch):
    x, parameters = draw((4, 8), 3, torch.float32, CPU)
    expected = ops.logistic_mixture(x, parameters)
    monkeypatch.setattr(_native, "_kernels", {})
    for a, b in zip(ops.logistic_mixture(x, parameters), expected, strict=True):
        close(a, b, scale=10)
