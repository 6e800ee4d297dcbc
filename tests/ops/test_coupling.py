"""The affine coupling against its reference, its own inverse, autograd, and float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, LAYOUTS, close, opcheck
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen import _native, ops
from pygen.ops.coupling import ACTIVATIONS, affine_reference

LIMITS = {"tanh": 2.0, "atan": 1.5, "sigmoid_symmetric": 3.0, "softclip": math.log(1000)}
SHAPES = [(3, 5), (1, 1), (4, 8), (0, 3), (3, 0), (2, 3, 4, 5), (2, 1027), (7, 2049), (2, 40_000)]


def options_of(activation: str) -> dict[str, object]:
    return {"activation": activation, "limit": LIMITS.get(activation)}


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(shape, device=device).to(dtype) for _ in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(backend, device, dtype, activation, inverse):
    for shape in SHAPES if activation == "exp" else SHAPES[:6]:
        for options in ({}, {"offset": 2.0, "epsilon": 1e-3}):
            x, raw, shift = draw(shape, dtype, device)
            arguments = {**options_of(activation), **options, "inverse": inverse}
            y, ladj = ops.affine(x, raw, shift, **arguments)
            expected_y, expected_ladj = affine_reference(x, raw, shift, **arguments)
            assert y.dtype == dtype
            assert ladj.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            # A value on the edge of two roundings may fall on either side, once in the 16-bit dtypes.
            close(y, expected_y, scale=2)
            close(ladj, expected_ladj, scale=10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("event_dims", [0, 1, 2, 3, 4])
def test_takes_any_strides(backend, device, layout, event_dims):
    shape = (3, 4, 5, 8)
    x = LAYOUTS["transposed"](shape, torch.float32, device) if layout == "transposed" else torch.randn(shape).to(device)
    raw, shift = (LAYOUTS[layout](shape, torch.float32, device) for _ in range(2))
    for inverse in (False, True):
        y, ladj = ops.affine(x, raw, shift, event_dims=event_dims, inverse=inverse)
        expected_y, expected_ladj = affine_reference(x, raw, shift, event_dims=event_dims, inverse=inverse)
        assert ladj.shape == shape[: 4 - event_dims]
        close(y, expected_y)
        close(ladj, expected_ladj, scale=4)


@pytest.mark.parametrize("x_dtype", DTYPES[:1] + DTYPES[2:])
@pytest.mark.parametrize("parameter_dtype", DTYPES[:1] + DTYPES[2:])
def test_mixes_dtypes_as_autocast_does(backend, device, x_dtype, parameter_dtype):
    x, raw, shift = (t.to(d) for t, d in zip(draw((5, 24), torch.float32, device),
                                            (x_dtype, parameter_dtype, parameter_dtype), strict=True))  # fmt: skip
    y, ladj = ops.affine(x, raw, shift)
    expected_y, expected_ladj = affine_reference(x, raw, shift)
    assert (y.dtype, ladj.dtype) == (x_dtype, torch.float32)
    close(y, expected_y, scale=2)
    close(ladj, expected_ladj, scale=4)
    leaves = [t.detach().requires_grad_() for t in (x, raw, shift)]
    twins = [t.detach().requires_grad_() for t in (x, raw, shift)]
    for tensors, function in ((leaves, ops.affine), (twins, affine_reference)):
        value, logarithm = function(*tensors)
        (value.float().sum() + logarithm.sum()).backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        close(leaf.grad, twin.grad, scale=2)


@pytest.mark.parametrize("absent", ["raw_scale", "shift", "both"])
@pytest.mark.parametrize("inverse", [False, True])
def test_absent_parameters(backend, device, absent, inverse):
    x, raw, shift = draw((3, 70), torch.float32, device)
    raw = None if absent in ("raw_scale", "both") else raw
    shift = None if absent in ("shift", "both") else shift
    y, ladj = ops.affine(x, raw, shift, inverse=inverse)
    expected_y, expected_ladj = affine_reference(x, raw, shift, inverse=inverse)
    close(y, expected_y)
    close(ladj, expected_ladj, scale=4)
    x.requires_grad_()
    (ops.affine(x, raw, shift, inverse=inverse)[0] ** 2).sum().backward()
    assert x.grad.isfinite().all()


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    data=st.data(),
    activation=st.sampled_from(ACTIVATIONS),
    epsilon=st.sampled_from([0.0, 1e-3]),
)
def test_round_trip(shape, data, activation, epsilon):
    event_dims = data.draw(st.integers(0, len(shape)))
    x, raw, shift = draw(shape, torch.float64, torch.device("cpu"))
    arguments = {**options_of(activation), "epsilon": epsilon, "event_dims": event_dims}
    y, ladj = ops.affine(x, raw, shift, **arguments)
    back, back_ladj = ops.affine(y, raw, shift, inverse=True, **arguments)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back_ladj, -ladj, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ladj_is_the_jacobian_of_autograd(backend, device, activation):
    x, raw, shift = draw((1, 6), torch.float64, device)

    def transform(value: Tensor) -> Tensor:
        return ops.affine(value, raw, shift, **options_of(activation))[0]

    jacobian = torch.autograd.functional.jacobian(transform, x).reshape(6, 6)
    _, ladj = ops.affine(x, raw, shift, **options_of(activation))
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ladj[0])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(backend, device, activation, inverse):
    x, raw, shift = (t.requires_grad_() for t in draw((2, 3), torch.float64, device))
    for epsilon in (0.0, 0.1):
        arguments = {**options_of(activation), "epsilon": epsilon, "offset": 0.3, "inverse": inverse}

        def transform(*tensors: Tensor, arguments: dict = arguments) -> tuple[Tensor, Tensor]:
            return ops.affine(*tensors, **arguments)

        assert torch.autograd.gradcheck(transform, (x, raw, shift))
        assert torch.autograd.gradgradcheck(transform, (x, raw, shift))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_stay_finite_where_the_scale_underflows(backend, device, activation, inverse):
    # Where the scale is 0 the inverse itself is 0 / 0, and its gradient with it.
    lowest = [-86.0, -80.0, -50.0] if inverse else [-200.0, -110.0, -90.0]
    raw = torch.tensor([[*lowest, -40.0, 30.0, 85.0]], device=device, requires_grad=True)
    twin = raw.detach().double().requires_grad_()
    x = torch.zeros(1, 6, device=device)
    ops.affine(x, raw, None, inverse=inverse, **options_of(activation))[1].sum().backward()
    affine_reference(x.double(), twin, None, inverse=inverse, **options_of(activation))[1].sum().backward()
    close(raw.grad, twin.grad.float(), scale=2)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_long_strided_rows(backend, device, inverse):
    shape = (2, 3, 1024, 6)
    grads = []
    base = [torch.randn(2, 6, 1024, 6, device=device) for _ in range(2)]
    x0 = torch.randn(shape, device=device)
    for function in (ops.affine, affine_reference):
        x = x0.clone().requires_grad_()
        leaves = [b.clone().requires_grad_() for b in base]
        y, ladj = function(x, leaves[0][:, 0::2], leaves[1][:, 3:], event_dims=3, inverse=inverse)
        ((y * y0_weight(y)).sum() + (ladj * 0.01).sum()).backward()
        grads.append([x.grad, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*grads, strict=True):
        close(actual, expected, scale=4)


def y0_weight(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)


def test_raw_operators_pass_opcheck(backend, device, namespace):
    library = getattr(torch.ops, namespace)
    x, raw, shift = draw((2, 3, 8), torch.float32, device)
    for operator in (library.affine_forward.default, library.affine_inverse.default):
        strided = raw.transpose(1, 2).contiguous().transpose(1, 2)
        for arguments in ((x, raw, shift), (x, None, shift), (x, strided, None)):
            opcheck(operator, (*arguments, 1, 2.0, 0.5, 0.0, 2))
    grad_ladj = torch.randn(2, device=device)
    opcheck(library.affine_backward.default, (x, raw, shift, grad_ladj, 1, 2.0, 0.5, 0.0, 2, True))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_compiles_in_one_graph(backend, device, with_gradient):
    x, raw, shift = (t.requires_grad_(with_gradient) for t in draw((4, 8), torch.float32, device))

    def transform(x: Tensor, raw: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return ops.affine(x * 2, raw, shift, activation="tanh", limit=2.0)

    y, ladj = torch.compile(transform, fullgraph=True)(x, raw, shift)
    expected = transform(x, raw, shift)
    close(y, expected[0])
    close(ladj, expected[1], scale=4)
    if with_gradient:
        actual = torch.autograd.grad((y * y0_weight(y)).sum() + ladj.sum(), (x, raw, shift))
        wanted = torch.autograd.grad((expected[0] * y0_weight(y)).sum() + expected[1].sum(), (x, raw, shift))
        for a, b in zip(actual, wanted, strict=True):
            close(a, b, scale=4)


def test_functorch_takes_the_reference(backend, device):
    x, raw, shift = draw((4, 8), torch.float32, device)
    per_row = torch.vmap(lambda *row: ops.affine(*row))(x, raw, shift)
    y, ladj = ops.affine(x, raw, shift)
    close(per_row[0], y)
    close(per_row[1], ladj, scale=4)
    tangent = torch.func.jvp(lambda v: ops.affine(v, raw, shift)[0], (x,), (torch.ones_like(x),))[1]
    close(tangent, raw.exp())


@pytest.mark.usefixtures("four_threads")
def test_threads_and_batch_position_do_not_change_a_bit(backend, device):
    x, raw, shift = draw((5, 40_000), torch.float32, device)
    y, ladj = ops.affine(x, raw, shift)
    torch.set_num_threads(1)
    once = ops.affine(x, raw, shift)
    alone = ops.affine(x[3:4], raw[3:4], shift[3:4])
    assert torch.equal(once[0], y)
    assert torch.equal(once[1], ladj)
    assert torch.equal(alone[0], y[3:4])
    assert torch.equal(alone[1], ladj[3:4])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_less_accurate_than_pytorch(backend, device, activation):
    x, raw, shift = draw((64, 512), torch.float64, device)
    raw = raw * 4
    exact = affine_reference(x, raw, shift, **options_of(activation))
    ours = ops.affine(x.float(), raw.float(), shift.float(), **options_of(activation))
    rounded = affine_reference(x.float(), raw.float(), shift.float(), **options_of(activation))
    for mine, theirs, truth in zip(ours, rounded, exact, strict=True):
        scale = truth.abs().clamp_min(1)
        error = ((mine.double() - truth).abs() / scale).pow(2).mean().sqrt()
        peer = ((theirs.double() - truth).abs() / scale).pow(2).mean().sqrt()
        # The inputs' own rounding to float32 is in both; a fifth more is the noise of two different roundings.
        assert error <= 1.2 * peer + 1e-9


def test_invalid_data_stays_in_its_row(backend, device):
    x, raw, shift = draw((4, 9), torch.float32, device)
    clean = ops.affine(x, raw, shift)
    x[1, 2], raw[2, 3], raw[3, 0] = math.nan, math.nan, 1000.0
    y, ladj = ops.affine(x, raw, shift)
    assert torch.equal(y[0], clean[0][0])
    assert y[1].isnan().sum() == 1
    assert ladj[1] == clean[1][1]
    assert ladj[2].isnan()
    assert y[2].isnan().sum() == 1
    assert y[3, 0].abs() == math.inf


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for shape in SHAPES:
            y, ladj = ops.affine(*draw(shape, torch.float32, device))
            assert y.isfinite().all()
            assert ladj.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"activation": "expo"}, "activation is 'expo'"),
        ({"activation": "tanh"}, "limit is None, but activation 'tanh'"),
        ({"limit": 2.0}, "limit is 2.0, but activation 'exp' has no bound"),
        ({"activation": "tanh", "limit": -1.0}, "limit is -1.0"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        ({"event_dims": 3}, "event_dims is 3, but x has 2 dimensions"),
        ({"raw_scale": torch.zeros(5)}, r"raw_scale has shape \(5,\)"),
        ({"shift": torch.zeros(2, 3, 4)}, r"shift has shape \(2, 3, 4\)"),
        ({"raw_scale": torch.zeros(3, 4, device="meta")}, "raw_scale is on meta, but expected x's cpu"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, sentence):
    tensors = {"raw_scale": torch.zeros(3, 4), "shift": torch.zeros(3, 4)}
    tensors |= {key: arguments.pop(key) for key in ("raw_scale", "shift") if key in arguments}
    with pytest.raises(ValueError, match=sentence):
        ops.affine(torch.zeros(3, 4), **tensors, **arguments)
    with pytest.raises(TypeError, match="x has dtype torch.int64"):
        ops.affine(torch.zeros(3, 4, dtype=torch.int64), None, None)
    with pytest.raises(TypeError, match="shift has dtype torch.int32"):
        ops.affine(torch.zeros(3, 4), None, torch.zeros(3, 4, dtype=torch.int32))


def test_raw_operators_check_what_would_reach_memory(backend, namespace, device):
    library = getattr(torch.ops, namespace)
    x = torch.zeros(3, 4, device=device)
    with pytest.raises(RuntimeError, match=r"raw_scale has shape \(3, 5\), but expected \(3, 4\)"):
        library.affine_forward(x, torch.zeros(3, 5, device=device), None, 0, 1.0, 0.0, 0.0, 1)
    with pytest.raises(RuntimeError, match="event_dims is 7"):
        library.affine_forward(x, x, None, 0, 1.0, 0.0, 0.0, 7)


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    x, raw, shift = draw((64, 3000), torch.float32, device)
    ops.affine(x, raw, shift)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, ladj = ops.affine(x, raw, shift)
    x.normal_()
    graph.replay()
    expected = ops.affine(x, raw, shift)
    assert torch.equal(y, expected[0])
    assert torch.equal(ladj, expected[1])


@pytest.mark.large
def test_more_than_two_to_the_31_elements(backend, device):
    if backend != "cuda":
        pytest.skip("index arithmetic past 2^31 is tested on a GPU only")
    x = torch.zeros(2, 2**30 + 8, dtype=torch.bfloat16, device=device)
    raw = torch.zeros_like(x)
    raw[1, -1] = 1
    y, ladj = ops.affine(x + 1, raw, None)
    assert y[1, -1] == torch.tensor(math.e, dtype=torch.bfloat16)
    assert ladj.tolist() == [0.0, 1.0]


def test_the_reference_serves_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(_native, "_kernels", {})
    x, raw, shift = draw((4, 8), torch.float32, torch.device("cpu"))
    y, _ = ops.affine(x, raw, shift)
    torch.testing.assert_close(y, x * raw.exp() + shift)
