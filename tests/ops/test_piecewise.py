"""Linear, quadratic and cubic splines against their reference, nflows, their own inverse, autograd, and float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, LAYOUTS, RELATIVE, close, opcheck
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.transforms.splines import cubic, linear, quadratic
from torch import Tensor

from pygen import _native, ops
from pygen.ops.piecewise_reference import counts

DEGREES = (1, 2, 3)
SPLINES = {1: ops.linear_spline, 2: ops.quadratic_spline, 3: ops.cubic_spline}
REFERENCES = {1: ops.linear_spline_reference, 2: ops.quadratic_spline_reference, 3: ops.cubic_spline_reference}
NFLOWS = {
    (1, False): linear.linear_spline,
    (1, True): linear.unconstrained_linear_spline,
    (2, False): quadratic.quadratic_spline,
    (2, True): quadratic.unconstrained_quadratic_spline,
    (3, False): cubic.cubic_spline,
    (3, True): cubic.unconstrained_cubic_spline,
}
SHAPES = [(3, 5), (1, 1), (0, 3), (3, 0), (2, 3, 4), (2, 1027), (130, 3), (5, 40)]

Spline = Callable[..., tuple[Tensor, Tensor]]


def options_of(tails: bool, degree: int = 1) -> dict[str, Any]:
    """Tails and bounds that are not the defaults."""
    if tails:
        return {"tails": "linear", "domain": (-2.0, 2.0), **({"smooth_ends": True} if degree == 2 else {})}
    return {"domain": (-2.0, 2.0), "image": (-1.0, 3.0)}


def draw(
    shape: tuple[int, ...], degree: int, bins: int, tails: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """x, some of it outside of (-2, 2), and packed parameters."""
    x = torch.randn(shape, device=device) * 1.5
    return x.to(dtype), torch.randn(*shape, sum(counts(degree, bins, tails)), device=device).to(dtype)


def exact(degree: int, x: Tensor, parameters: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The reference in float64, rounded to what the operator returns."""
    y, ladj = REFERENCES[degree](x.double(), parameters.double(), **arguments)
    return y.to(x.dtype), ladj.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def gradients(function: Spline, x: Tensor, parameters: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, parameters)]
    y, ladj = function(*leaves, **arguments)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    rows = torch.linspace(0.5, 1, ladj.numel(), device=y.device).view_as(ladj)
    return torch.autograd.grad((y * weights).sum() + (ladj * rows).sum(), leaves)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(backend, device, dtype, degree, tails, inverse):
    for shape in SHAPES:
        x, parameters = draw(shape, degree, 8, tails, dtype, device)
        y, ladj = SPLINES[degree](x, parameters, inverse=inverse, **options_of(tails, degree))
        expected_y, expected_ladj = exact(degree, x, parameters, inverse=inverse, **options_of(tails, degree))
        assert y.dtype == dtype
        assert ladj.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        close(y, expected_y, scale=4)
        # Where the slope is least the logarithm has a thousand times the rounding of its argument.
        close(ladj, expected_ladj, scale=100)


@pytest.mark.parametrize("bins", [2, 3, 17, 128])
@pytest.mark.parametrize("degree", DEGREES)
def test_takes_any_number_of_bins_packed_or_apart(backend, device, degree, bins):
    for tails in (False, True):
        x, parameters = draw((7, 5), degree, bins, tails, torch.float64, device)
        parts = parameters.split(counts(degree, bins, tails), -1)
        for inverse in (False, True):
            arguments = {"inverse": inverse, **options_of(tails)}
            expected = exact(degree, x, parameters, **arguments)
            wanted = gradients(REFERENCES[degree], x, parameters, **arguments)
            for given_parameters in (parameters, parts):
                for actual, value in zip(SPLINES[degree](x, given_parameters, **arguments), expected, strict=True):
                    torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-9)
            for actual, value in zip(gradients(SPLINES[degree], x, parameters, **arguments), wanted, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("degree", DEGREES)
def test_scale_and_minimum_sizes(backend, device, degree):
    x, parameters = draw((6, 5), degree, 5, False, torch.float64, device)
    x = x / 8 + 0.5
    for sizes in ({}, {"min_bin_width": 0.0, "min_bin_height": 0.0}, {"min_bin_width": 0.2, "min_bin_height": 0.2}):
        arguments = {"scale": 0.3, **(sizes if degree > 1 else {})}
        y, ladj = SPLINES[degree](x, parameters, **arguments)
        expected = REFERENCES[degree](x, parameters, **arguments)
        torch.testing.assert_close(y, expected[0])
        torch.testing.assert_close(ladj, expected[1])
        actual = gradients(SPLINES[degree], x, parameters, **arguments)
        for a, b in zip(actual, gradients(REFERENCES[degree], x, parameters, **arguments), strict=True):
            torch.testing.assert_close(a, b)


def test_smooth_ends_make_equal_parameters_the_identity(backend, device):
    x = torch.linspace(-3, 3, 50, dtype=torch.float64, device=device).view(1, 50)
    zeros = torch.zeros(1, 50, 15, dtype=torch.float64, device=device)
    y, ladj = ops.quadratic_spline(x, zeros, tails="linear", domain=(-2.0, 2.0), smooth_ends=True)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(ladj, torch.zeros_like(ladj))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("degree", DEGREES)
def test_takes_any_strides(backend, device, degree, layout):
    shape = (3, 4, 5, 6)
    bins = 8
    count = sum(counts(degree, bins, False))
    x = LAYOUTS[layout](shape, torch.float32, device)
    # As a convolution leaves them: (n, c, parameters, h, w), and in the layout under test.
    planar = torch.randn(3, 4, count, 5, 6, device=device).permute(0, 1, 3, 4, 2)
    for parameters in (planar, LAYOUTS[layout]((*shape, count), torch.float32, device)):
        for event_dims in (0, 2, 4):
            for inverse in (False, True):
                arguments = {"event_dims": event_dims, "inverse": inverse}
                y, ladj = SPLINES[degree](x, parameters, **arguments)
                expected_y, expected_ladj = exact(degree, x, parameters, **arguments)
                assert ladj.shape == shape[: 4 - event_dims]
                close(y, expected_y, scale=4)
                close(ladj, expected_ladj, scale=100)
        dense = gradients(SPLINES[degree], x.contiguous(), parameters.contiguous(), event_dims=2)
        for actual, expected in zip(gradients(SPLINES[degree], x, parameters, event_dims=2), dense, strict=True):
            assert torch.equal(actual, expected)


def test_parameters_broadcast(backend, device):
    x = torch.rand(6, 5, device=device)
    parameters = torch.randn(5, 8, device=device, requires_grad=True)
    y, ladj = ops.linear_spline(x, parameters)
    expected = ops.linear_spline(x, parameters.expand(6, 5, 8).contiguous())
    assert torch.equal(y, expected[0])
    assert torch.equal(ladj, expected[1])
    (grad,) = torch.autograd.grad(ladj.sum(), parameters)
    assert grad.shape == parameters.shape


@pytest.mark.parametrize("x_dtype", DTYPES[:1] + DTYPES[2:])
@pytest.mark.parametrize("parameter_dtype", DTYPES[:1] + DTYPES[2:])
@pytest.mark.parametrize("degree", DEGREES)
def test_mixes_dtypes_as_autocast_does(backend, device, degree, x_dtype, parameter_dtype):
    x, parameters = draw((5, 24), degree, 8, True, torch.float32, device)
    x, parameters = x.to(x_dtype), parameters.to(parameter_dtype)
    y, ladj = SPLINES[degree](x, parameters, **options_of(True))
    expected_y, expected_ladj = exact(degree, x, parameters, **options_of(True))
    assert (y.dtype, ladj.dtype) == (x_dtype, torch.float32)
    close(y, expected_y, scale=2)
    close(ladj, expected_ladj, scale=100)
    actual = gradients(SPLINES[degree], x, parameters, **options_of(True))
    expected = gradients(REFERENCES[degree], x.double(), parameters.double(), **options_of(True))
    for a, b, dtype in zip(actual, expected, (x_dtype, parameter_dtype), strict=True):
        assert a.dtype == dtype
        # The gradient that comes in has x's dtype.
        coarsest = max(2 * RELATIVE[x_dtype], 2 * RELATIVE[dtype], 100 * RELATIVE[torch.float32])
        close(a, b.to(dtype), scale=coarsest / RELATIVE[dtype])


def test_parts_of_different_dtypes_get_gradients_of_theirs(backend, device):
    x = torch.rand(4, 6, device=device)
    widths = torch.randn(4, 6, 8, device=device, requires_grad=True)
    heights = torch.randn(4, 6, 9, device=device).bfloat16().requires_grad_()
    y, ladj = ops.quadratic_spline(x, (widths, heights))
    (y.sum() + ladj.sum()).backward()
    assert (widths.grad.dtype, heights.grad.dtype) == (torch.float32, torch.bfloat16)


@given(
    degree=st.sampled_from(DEGREES),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    bins=st.integers(2, 20),
    tails=st.booleans(),
    data=st.data(),
)
def test_round_trip(degree, shape, bins, tails, data):
    event_dims = data.draw(st.integers(0, len(shape)))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 4e-5)):
        x, parameters = draw(shape, degree, bins, tails, dtype, torch.device("cpu"))
        arguments = {"event_dims": event_dims, **options_of(tails)}
        y, ladj = SPLINES[degree](x, parameters, **arguments)
        back, back_ladj = SPLINES[degree](y, parameters, inverse=True, **arguments)
        # 1e-5 of the domain's width.
        torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
        if dtype == torch.float64:
            torch.testing.assert_close(back_ladj, -ladj, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("degree", DEGREES)
def test_ladj_is_the_jacobian_of_autograd(backend, device, degree, tails):
    x, parameters = draw((1, 6), degree, 5, tails, torch.float64, device)
    for inverse in (False, True):
        arguments = {"inverse": inverse, **options_of(tails, degree)}

        def transform(value: Tensor, arguments: dict = arguments) -> Tensor:
            return SPLINES[degree](value, parameters, **arguments)[0]

        jacobian = torch.autograd.functional.jacobian(transform, x).reshape(6, 6)
        _, ladj = SPLINES[degree](x, parameters, **arguments)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ladj[0])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("degree", DEGREES)
def test_gradients(backend, device, degree, tails, inverse):
    x, parameters = (t.requires_grad_() for t in draw((2, 3), degree, 3, tails, torch.float64, device))
    arguments = {"inverse": inverse, "scale": 0.8, **options_of(tails, degree)}

    def transform(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return SPLINES[degree](*tensors, **arguments)

    assert torch.autograd.gradcheck(transform, (x, parameters))
    assert torch.autograd.gradgradcheck(transform, (x, parameters), fast_mode=True)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("degree", DEGREES)
def test_gradients_of_long_rows_equal_the_reference(backend, device, degree, inverse):
    for shape, event_dims in (((2, 1500), 1), ((40, 33), 0)):
        x, parameters = draw(shape, degree, 9, True, torch.float64, device)
        arguments = {"inverse": inverse, "event_dims": event_dims, **options_of(True, degree)}
        expected = gradients(REFERENCES[degree], x, parameters, **arguments)
        for actual, value in zip(gradients(SPLINES[degree], x, parameters, **arguments), expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("degree", DEGREES)
def test_the_reference_has_derivatives_of_its_own(degree):
    x, parameters = (t.requires_grad_() for t in draw((2, 2), degree, 3, False, torch.float64, torch.device("cpu")))
    for inverse in (False, True):

        def transform(*tensors: Tensor, inverse: bool = inverse) -> tuple[Tensor, Tensor]:
            return REFERENCES[degree](*tensors, inverse=inverse, **options_of(False))

        assert torch.autograd.gradcheck(transform, (x, parameters))
        assert torch.autograd.gradgradcheck(transform, (x, parameters), fast_mode=True)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("degree", DEGREES)
def test_no_data_is_too_extreme(backend, device, degree, tails, inverse):
    for dtype in (torch.float32, torch.bfloat16):
        # In tails a number as large as there is, without them one whose straight line is in range.
        far = 3e38 if tails else 1e6
        for size in (1, 10, 100):
            for bins in (2, 8, 40):
                x, parameters = draw((24, 7), degree, bins, tails, dtype, device)
                x[0] = torch.tensor([-2.0, 2.0, -far, far, 0.0, -2.001, 1.999], device=device)
                x[1] = 50.0
                x[2] = -50.0
                x[3:8, ::2] = far / 1e8
                x[3:8, 1::2] = -far / 1e8
                parameters = parameters * size
                arguments = {"inverse": inverse, **options_of(tails, degree)}
                for function in (SPLINES[degree], REFERENCES[degree]):
                    y, ladj = function(x, parameters, **arguments)
                    grad_x, grad_parameters = gradients(function, x, parameters, **arguments)
                    for value in (y, ladj, grad_x, grad_parameters):
                        assert value.isfinite().all()
                    if tails:
                        assert not grad_parameters[3:8].any()


@pytest.mark.parametrize("degree", DEGREES)
def test_outside_of_the_domain(backend, device, degree):
    x, parameters = draw((1, 5), degree, 6, False, torch.float64, device)
    parameters = parameters[:, :1].expand(1, 5, -1)
    x[:] = torch.tensor([0.0, -0.5, 1.0, 1.25, 2.5])
    y, ladj = SPLINES[degree](x, parameters, event_dims=0)
    slope = ladj[0].exp()
    assert slope[1] == slope[0]
    torch.testing.assert_close(y[0], torch.stack((0 * slope[0], -0.5 * slope[0], 0 * slope[2] + 1,
                                                  1 + 0.25 * slope[2], 1 + 1.5 * slope[2])))  # fmt: skip
    x, parameters = draw((1, 5), degree, 6, True, torch.float64, device)
    x = x + 9
    y, ladj = SPLINES[degree](x, parameters, tails="linear", domain=(-2.0, 2.0))
    assert torch.equal(y, x)
    assert ladj.tolist() == [0.0]
    grad_x, grad_parameters = gradients(SPLINES[degree], x, parameters, tails="linear", domain=(-2.0, 2.0))
    assert grad_x.abs().max() == 1
    assert not grad_parameters.any()


def test_the_root_of_every_cubic_is_found(backend, device):
    # End slopes from almost none to the most, neighbours from as steep to a thousand times as flat.
    torch.manual_seed(1)
    parameters = torch.randn(4000, 10, device=device) * torch.linspace(0, 12, 4000, device=device).unsqueeze(-1)
    parameters[:, 8:] *= 2
    y = torch.rand(4000, device=device)
    y[:1000] **= 8
    y[1000:2000] = 1 - y[1000:2000] ** 8
    for dtype in (torch.float32, torch.float64):
        rounding = torch.finfo(dtype).eps
        x, _ = ops.cubic_spline(y.to(dtype), parameters.to(dtype), inverse=True, event_dims=0)
        again, back = ops.cubic_spline(x, parameters.to(dtype), event_dims=0)
        # The slope's share of the rounding of x is not the solver's.
        assert ((again - y).abs() <= 4 * rounding * (1 + back.exp())).all()


@settings(max_examples=40)
@given(
    degree=st.sampled_from(DEGREES),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    bins=st.integers(2, 20),
    tails=st.booleans(),
    inverse=st.booleans(),
    double=st.booleans(),
)
def test_agrees_with_nflows(degree, shape, bins, tails, inverse, double):
    dtype = torch.float64 if double else torch.float32
    x, parameters = draw(shape, degree, bins, tails, dtype, torch.device("cpu"))
    x = x if tails else x.sigmoid()
    ours = {"tails": "linear", "domain": (-2.0, 2.0)} if tails else {}
    theirs = {"tails": "linear", "tail_bound": 2.0} if tails else {}

    def peer(x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        parts = parameters.split(counts(degree, bins, tails), -1)
        return NFLOWS[degree, tails](x, *parts, inverse=inverse, **theirs)

    y, ladj = SPLINES[degree](x, parameters, inverse=inverse, event_dims=0, **ours)
    expected_y, expected_ladj = peer(x, parameters, inverse)
    # nflows moves the last knot of the linear one by 1e-6 to invert, and finds the cubic's root by a formula that
    # cancels, of which its own tests ask no more than this.
    rough = {1: 1e-4 if double else 4e-3, 3: 1e-2} if inverse else {}
    tolerance = rough.get(degree, 1e-8 if double else 4e-3 if inverse else 1e-4)
    torch.testing.assert_close(y, expected_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ladj, expected_ladj, rtol=0, atol=10 * tolerance)
    if inverse and double:
        # Its formulas of the other direction lose nothing.
        back, there = peer(y, parameters, inverse=False)
        torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(there, -ladj, rtol=1e-8, atol=1e-8)
    # Where all of x is in the tails its result does not depend on the parameters, and autograd has no gradient.
    if inverse or (tails and bool((x.abs() > 2).all())):
        return
    actual = gradients(SPLINES[degree], x, parameters, event_dims=0, **ours)
    for a, b in zip(actual, gradients(peer, x, parameters, inverse=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 if not double else 1e-7)


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("bins", [8, 32])
@pytest.mark.parametrize("degree", DEGREES)
def test_no_less_accurate_than_nflows(backend, device, degree, bins, tails):
    x, parameters = draw((20_000,), degree, bins, tails, torch.float32, device)
    x = x if tails else x.sigmoid()
    ours = {"tails": "linear", "domain": (-2.0, 2.0)} if tails else {}
    theirs = {"tails": "linear", "tail_bound": 2.0} if tails else {}

    def peer(x: Tensor, parameters: Tensor, inverse: bool, **_: Any) -> tuple[Tensor, Tensor]:
        parts = parameters.split(counts(degree, bins, tails), -1)
        return NFLOWS[degree, tails](x, *parts, inverse=inverse, **theirs)

    for inverse in (False, True):
        arguments = {"inverse": inverse, "event_dims": 0, **ours}
        results = []
        for function, dtype in ((REFERENCES[degree], torch.float64), (SPLINES[degree], None), (peer, None)):
            tensors = (x.to(dtype or x.dtype), parameters.to(dtype or x.dtype))
            results.append((*function(*tensors, **arguments), *gradients(function, *tensors, **arguments)))
        for truth, mine, theirs_ in zip(*results, strict=True):
            if not theirs_.isfinite().all():
                continue  # the gradient of nflows' cubic inverse
            size = truth.abs().clamp_min(1)
            # Of the mean: the largest errors, at the flattest points, are too few to compare.
            error = ((mine.double() - truth).abs() / size).mean()
            peer_error = ((theirs_.double() - truth).abs() / size).mean()
            # The inputs' own rounding to float32 is in both; a tenth more is the noise of two different roundings.
            assert error <= 1.1 * peer_error + 1e-9, (inverse, float(error), float(peer_error))


def test_raw_operators_pass_opcheck(backend, device, namespace):
    library, degree = getattr(torch.ops, namespace), 2
    x, parameters = draw((2, 3, 4), degree, 4, False, torch.float32, device)
    options = (degree, 4, False, [-2.0, 2.0, -1.0, 3.0], [1e-3, 1e-3], 0.25, 1.0, 2)
    strided = parameters.transpose(1, 2).contiguous().transpose(1, 2)
    for operator in (library.piecewise_spline_forward.default, library.piecewise_spline_inverse.default):
        for tensors in ([parameters], [strided], list(parameters.split(counts(degree, 4, False), -1))):
            opcheck(operator, (x, tensors, *options))
    grad_ladj = torch.randn(2, device=device)
    opcheck(library.piecewise_spline_backward.default, (x, [parameters], x, grad_ladj, *options, True))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_compiles_in_one_graph(backend, device, with_gradient):
    degree = 3
    x, parameters = (t.requires_grad_(with_gradient) for t in draw((4, 8), degree, 5, True, torch.float32, device))

    def transform(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return SPLINES[degree](x * 2, parameters, tails="linear", domain=(-2.0, 2.0))

    y, ladj = torch.compile(transform, fullgraph=True)(x, parameters)
    expected = transform(x, parameters)
    close(y, expected[0])
    close(ladj, expected[1], scale=4)
    if with_gradient:
        actual = torch.autograd.grad((y * y.detach()).sum() + ladj.sum(), (x, parameters))
        wanted = torch.autograd.grad((expected[0] * expected[0].detach()).sum() + expected[1].sum(), (x, parameters))
        for a, b in zip(actual, wanted, strict=True):
            close(a, b, scale=4)


@pytest.mark.parametrize("degree", DEGREES)
def test_functorch_takes_the_reference(backend, device, degree):
    x, parameters = draw((4, 8), degree, 5, False, torch.float64, device)
    for inverse in (False, True):
        y, ladj = SPLINES[degree](x, parameters, inverse=inverse)
        per_row = torch.vmap(lambda *row, inverse=inverse: SPLINES[degree](*row, inverse=inverse))(x, parameters)
        torch.testing.assert_close(per_row, (y, ladj))
        tangent = torch.func.jvp(
            lambda v, inverse=inverse: SPLINES[degree](v, parameters, inverse=inverse, event_dims=0)[0],
            (x,), (torch.ones_like(x),),
        )[1]  # fmt: skip
        torch.testing.assert_close(tangent.log().sum(-1), ladj)


def test_saves_its_input_and_the_parameters_only(backend, device):
    x, parameters = (t.requires_grad_() for t in draw((16, 8), 3, 8, True, torch.float32, device))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ops.cubic_spline(x, parameters, **options_of(True))
    assert sum(tensor.nbytes for tensor in saved) == x.nbytes + parameters.nbytes


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("degree", DEGREES)
def test_threads_and_batch_position_do_not_change_a_bit(backend, device, degree):
    x, parameters = draw((5, 3000), degree, 8, False, torch.float32, device)
    many = (*SPLINES[degree](x, parameters), *gradients(SPLINES[degree], x, parameters))
    torch.set_num_threads(1)
    once = (*SPLINES[degree](x, parameters), *gradients(SPLINES[degree], x, parameters))
    alone = SPLINES[degree](x[3:4], parameters[3:4])
    for a, b in zip(many, once, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(alone[0], once[0][3:4])
    assert torch.equal(alone[1], once[1][3:4])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("degree", DEGREES)
def test_nan_stays_in_its_row(backend, device, degree, inverse):
    x, parameters = draw((4, 9), degree, 6, False, torch.float32, device)
    clean = SPLINES[degree](x, parameters, inverse=inverse)
    clean_gradients = gradients(SPLINES[degree], x, parameters, inverse=inverse)
    x[1, 2] = math.nan
    parameters[2, 3, 1] = math.nan
    y, ladj = SPLINES[degree](x, parameters, inverse=inverse)
    assert y.isnan().nonzero().tolist() == [[1, 2], [2, 3]]
    assert ladj.isnan().tolist() == [False, True, True, False]
    assert torch.equal(y[[0, 3]], clean[0][[0, 3]])
    for actual, expected in zip(
        gradients(SPLINES[degree], x, parameters, inverse=inverse), clean_gradients, strict=True
    ):
        assert torch.equal(actual[[0, 3]], expected[[0, 3]])
        assert actual[1, 2].isnan().any()
        assert actual[1, 3:].isfinite().all()


@pytest.mark.parametrize("degree", DEGREES)
def test_unwritten_output_would_show(backend, device, degree):
    torch.use_deterministic_algorithms(True)
    try:
        for shape in SHAPES:
            x, parameters = draw(shape, degree, 8, True, torch.float32, device)
            for value in (*SPLINES[degree](x, parameters, **options_of(True)),
                          *gradients(SPLINES[degree], x, parameters, **options_of(True))):  # fmt: skip
                assert value.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("degree", "arguments", "sentence"),
    [
        (1, {"tails": "circular"}, "tails is 'circular'"),
        (1, {"tails": "linear", "image": (0.0, 2.0)}, r"image is \(0.0, 2.0\), but with tails 'linear'"),
        (1, {"domain": (1.0, 1.0)}, r"domain is \(1.0, 1.0\)"),
        (1, {"image": (0.0, math.inf)}, r"image is \(0.0, inf\)"),
        (1, {"scale": 0.0}, "scale is 0.0"),
        (1, {"event_dims": 3}, "event_dims is 3, but x has 2 dimensions"),
        (1, {"parameters": torch.zeros(3, 4, 1)}, "parameters are for 1 bins, but expected 2 to 128"),
        (1, {"parameters": torch.zeros(3, 5, 8)}, r"densities has shape \(3, 5, 8\)"),
        (1, {"parameters": torch.zeros(())}, r"parameters has shape \(\)"),
        (1, {"parameters": (torch.zeros(3, 4, 8),) * 2}, "parameters has 2 tensors, but expected one"),
        (1, {"parameters": torch.zeros(3, 4, 8, device="meta")}, "densities is on meta, but expected x's cpu"),
        (2, {"min_bin_width": 0.2}, "min_bin_width is 0.2, but 8 bins need"),
        (2, {"min_bin_height": -1.0}, "min_bin_height is -1.0"),
        (2, {"smooth_ends": True}, "smooth_ends is True, but without tails"),
        (2, {"parameters": torch.zeros(3, 4, 16)}, "parameters has 16 values for an element, but expected 7 [+] 8"),
        (3, {"parameters": torch.zeros(3, 4, 17)}, "parameters has 17 values for an element, but expected 7 [+] 7"),
        (3, {"parameters": (torch.zeros(3, 4, 8),) * 3}, "parameters has 3 tensors, but expected one, or widths"),
    ],
)
def test_bad_arguments_get_one_sentence(degree, arguments, sentence):
    parameters = arguments.pop("parameters", torch.zeros(3, 4, sum(counts(degree, 8, False))))
    with pytest.raises(ValueError, match=sentence):
        SPLINES[degree](torch.zeros(3, 4), parameters, **arguments)
    with pytest.raises(TypeError, match="x has dtype torch.int64"):
        SPLINES[degree](torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, 18))
    with pytest.raises(TypeError, match="parameters has dtype torch.int32"):
        SPLINES[degree](torch.zeros(3, 4), torch.zeros(3, 4, 18, dtype=torch.int32))


def test_raw_operators_check_what_would_reach_memory(backend, namespace, device):
    library = getattr(torch.ops, namespace)
    x = torch.zeros(3, 4, device=device)
    good = (1, 8, False, [0.0, 1.0, 0.0, 1.0], [0.0, 0.0], 0.25, 1.0, 1)
    parameters = torch.zeros(3, 4, 8, device=device)
    with pytest.raises(
        RuntimeError, match=r"parameters has shape \(3, 4, 7\), but expected that of x, \(3, 4\), and 8"
    ):
        library.piecewise_spline_forward(x, [parameters[..., :7]], *good)
    with pytest.raises(RuntimeError, match="degree is 4"):
        library.piecewise_spline_forward(x, [parameters], 4, *good[1:])
    with pytest.raises(RuntimeError, match="event_dims is 7"):
        library.piecewise_spline_inverse(x, [parameters], *good[:-1], 7)
    with pytest.raises(RuntimeError, match=r"grad_output has shape \(3,\)"):
        library.piecewise_spline_backward(x, [parameters], x[:, 0], x[:, 0], *good, False)


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    x, parameters = draw((64, 3000), 3, 8, True, torch.float32, device)
    ops.cubic_spline(x, parameters, **options_of(True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, ladj = ops.cubic_spline(x, parameters, **options_of(True))
    x.normal_()
    graph.replay()
    expected = ops.cubic_spline(x, parameters, **options_of(True))
    assert torch.equal(y, expected[0])
    assert torch.equal(ladj, expected[1])


@pytest.mark.large
def test_more_than_two_to_the_31_parameters(backend, device):
    if backend != "cuda":
        pytest.skip("index arithmetic past 2^31 is tested on a GPU only")
    x = torch.full((2**20 + 1, 512), 0.25, dtype=torch.bfloat16, device=device)
    parameters = torch.zeros(2**20 + 1, 512, 8, dtype=torch.bfloat16, device=device)
    parameters[-1, -1, 0] = 2
    y, _ = ops.linear_spline(x, parameters)
    expected, _ = ops.linear_spline_reference(x[-1:], parameters[-1:])
    assert torch.equal(y[-1:], expected)


def test_the_reference_serves_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(_native, "_kernels", {})
    x, parameters = draw((4, 8), 3, 5, False, torch.float32, torch.device("cpu"))
    y, ladj = ops.cubic_spline(x, parameters)
    expected = ops.cubic_spline_reference(x, parameters)
    assert torch.equal(y, expected[0])
    assert torch.equal(ladj, expected[1])
