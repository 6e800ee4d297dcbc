"""Squeezing and the Haar transform against their references, bit for bit, their own inverses, and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, LAYOUTS, opcheck
from hypothesis import given
from hypothesis import strategies as st

from pygen import _native, ops

OPERATORS = {"haar": (ops.haar, ops.haar_reference), "squeeze": (ops.squeeze, ops.squeeze_reference)}
# Of pictures: rows shorter and longer than a vector and a strip, small planes, empty ones.
SHAPES = [
    (2, 3, 4, 6), (1, 1, 2, 2), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (3, 5, 2, 34), (9, 7, 8, 8),
    (2, 2, 6, 16), (2, 3, 6, 2), (1, 2, 64, 130), (1, 1, 4, 1500),
]  # fmt: skip
CPU = torch.device("cpu")


def channels_of(shape):
    n, c, height, width = shape
    return n, 4 * c, height // 2, width // 2


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_reference(backend, device, name, dtype, inverse):
    operator, reference = OPERATORS[name]
    for shape in SHAPES:
        x = torch.randn(channels_of(shape) if inverse else shape, device=device).to(dtype)
        y = operator(x, inverse=inverse)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert torch.equal(y, reference(x, inverse=inverse))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_any_strides(backend, device, name, layout, dtype):
    operator, reference = OPERATORS[name]
    for inverse, shape in ((False, (3, 4, 6, 8)), (True, (3, 8, 5, 4))):
        if layout == "channels_last":
            x = torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last)
        else:
            x = LAYOUTS[layout](shape, dtype, device)
        assert torch.equal(operator(x, inverse=inverse), reference(x, inverse=inverse))


def test_corners_and_coefficients_of_a_block(backend, device):
    block = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]], device=device)
    assert ops.squeeze(block).flatten().tolist() == [1, 8, 2, 4]
    assert ops.haar(block).flatten().tolist() == [7.5, -2.5, -4.5, 1.5]


@pytest.mark.parametrize("name", OPERATORS)
@given(
    n=st.integers(0, 3), c=st.integers(0, 4), height=st.integers(0, 12), width=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_round_trip(name, n, c, height, width, dtype):
    operator, _ = OPERATORS[name]
    x = torch.randn(n, c, 2 * height, 2 * width, dtype=dtype)
    y = operator(x)
    assert y.shape == (n, 4 * c, height, width)
    torch.testing.assert_close(operator(y, inverse=True), x)
    torch.testing.assert_close(y.square().sum(), x.square().sum())


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(backend, device, name, inverse):
    operator, reference = OPERATORS[name]
    x = torch.randn((1, 4, 2, 2), dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: operator(x, inverse=inverse), x)
    assert torch.autograd.gradgradcheck(lambda x: operator(x, inverse=inverse), x)
    x = torch.randn((5, 8, 6, 10), device=device, requires_grad=True)
    weight = torch.randn_like(operator(x, inverse=inverse)).to(memory_format=torch.channels_last)
    for a, b in zip(
        torch.autograd.grad(operator(x, inverse=inverse), x, weight),
        torch.autograd.grad(reference(x, inverse=inverse), x, weight), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_nothing_is_kept_for_backward():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    for operator, _ in OPERATORS.values():
        assert operator(x).grad_fn.saved_tensors == ()


def test_raw_operators_pass_opcheck(backend, device, namespace):
    library = getattr(torch.ops, namespace)
    for haar in (False, True):
        opcheck(library.wavelet_forward.default, (torch.randn(2, 3, 4, 6, device=device), haar))
        opcheck(library.wavelet_inverse.default, (torch.randn(2, 8, 4, 6, device=device), haar))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_compiles_in_one_graph(backend, device, name, with_gradient):
    operator, _ = OPERATORS[name]
    x = torch.randn(2, 4, 6, 8, device=device, requires_grad=with_gradient)

    def there_and_further(x):
        return operator(operator(x * 2), inverse=False) if x.shape[2] % 4 == 0 else operator(x * 2) + 1

    y, expected = torch.compile(there_and_further, fullgraph=True)(x), there_and_further(x)
    torch.testing.assert_close(y, expected)
    if with_gradient:
        weight = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, x, weight), torch.autograd.grad(expected, x, weight))


def test_functorch_takes_the_reference(backend, device):
    x = torch.randn(5, 2, 3, 4, 6, device=device)
    for operator, _ in OPERATORS.values():
        torch.testing.assert_close(torch.vmap(operator)(x), torch.stack([operator(part) for part in x]))
        tangent = torch.func.jvp(operator, (x[0],), (x[1],))[1]
        torch.testing.assert_close(tangent, operator(x[1]))


@pytest.mark.usefixtures("four_threads")
def test_threads_do_not_change_a_bit(backend, device):
    x = torch.randn(7, 5, 48, 52, device=device)
    for operator, _ in OPERATORS.values():
        torch.set_num_threads(4)
        y = operator(x)
        back = operator(y, inverse=True)
        torch.set_num_threads(1)
        assert torch.equal(operator(x), y)
        assert torch.equal(operator(y, inverse=True), back)


def test_invalid_data_stays_in_its_block(backend, device):
    x = torch.randn(1, 2, 4, 4, device=device)
    x[0, 1, 2, 3] = math.nan
    assert ops.squeeze(x).isnan().sum() == 1
    assert ops.haar(x).isnan().sum() == 4


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for shape in SHAPES:
            for operator, _ in OPERATORS.values():
                y = operator(torch.randn(shape, device=device))
                assert y.isfinite().all()
                assert operator(y, inverse=True).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", OPERATORS)
def test_bad_arguments_get_one_sentence(name):
    for function in OPERATORS[name]:
        with pytest.raises(ValueError, match=r"x has shape \(2, 3, 5, 4\), but expected .* even height and width"):
            function(torch.zeros(2, 3, 5, 4))
        with pytest.raises(ValueError, match=r"x has shape \(2, 4\), but expected \(n, c, height, width\)"):
            function(torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"x has shape \(2, 6, 4, 4\), but expected \(n, 4 c, height, width\)"):
            function(torch.zeros(2, 6, 4, 4), inverse=True)
        with pytest.raises(TypeError, match="x has dtype torch.int64"):
            function(torch.zeros(2, 4, 4, 4, dtype=torch.int64))


def test_raw_operators_check_what_would_reach_memory(backend, namespace, device):
    library = getattr(torch.ops, namespace)
    with pytest.raises(RuntimeError, match=r"x has shape \(2, 3, 4, 5\)"):
        library.wavelet_forward(torch.zeros(2, 3, 4, 5, device=device), True)
    with pytest.raises(RuntimeError, match=r"y has shape \(2, 3, 4, 5\)"):
        library.wavelet_inverse(torch.zeros(2, 3, 4, 5, device=device), True)


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    x = torch.randn(4, 3, 8, 8, device=device)
    ops.haar(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.haar(x)
    x.normal_()
    graph.replay()
    assert torch.equal(y, ops.haar(x))


@pytest.mark.large
def test_more_than_two_to_the_31_elements(backend, device):
    if backend != "cuda":
        pytest.skip("index arithmetic past 2^31 is tested on a GPU only")
    x = torch.zeros(2, 2, 2**15, 2**15 + 2, dtype=torch.bfloat16, device=device)
    x[1, 1, -1, -1] = 2
    y = ops.haar(x)
    assert y[1, 1::2, -1, -1].tolist() == [1, -1, -1, 1]
    assert y.count_nonzero() == 4


def test_the_reference_serves_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(_native, "_kernels", {})
    x = torch.randn(2, 3, 4, 6)
    for operator, reference in OPERATORS.values():
        assert torch.equal(operator(x), reference(x))
