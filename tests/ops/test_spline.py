from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, close, opcheck
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen import _native, ops
from pygen.ops.spline import rational_quadratic_spline, rational_quadratic_spline_reference
from pygen.ops.spline_reference import PARAMETRIZATIONS

MIXED = "mixed"
TAILS = (None, "linear", "circular", MIXED)
# Whole rows of a block, of a warp, of half a block, rows in one and in several chunks, and fewer elements than lanes.
SHAPES = [(3, 5), (1, 1), (40, 8), (0, 3), (3, 0), (2, 3, 4, 5), (3, 33), (2, 200), (3, 1029), (2, 2049)]


def tails_of(name: str | None, last: int) -> object:
    """The tails by name; MIXED is one for each element of the last dimension."""
    return [("linear", "circular", None)[i % 3] for i in range(last)] if name == MIXED else name


def derivatives(tails: str | None, bins: int) -> int:
    return bins + {None: 1, "linear": -1, "circular": 0, MIXED: 1}[tails]


def draw(
    shape: tuple[int, ...], bins: int, tails: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Values of which a few lie outside of (-3, 3), and packed parameters."""
    x = torch.randn(shape, device=device) * 2
    parameters = torch.randn(*shape, 2 * bins + derivatives(tails, bins), device=device)
    return x.to(dtype), parameters.to(dtype)


def gradients(function: object, tensors: list[Tensor], **options: object) -> tuple[Tensor, ...]:
    """Outputs and gradients with fixed weights."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    parameters = leaves[1] if len(leaves) == 2 else tuple(leaves[1:])
    y, ladj = function(leaves[0], parameters, **options)  # type: ignore[operator]
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=ladj.dtype).view_as(y)
    rows = torch.linspace(1, 2, ladj.numel(), device=y.device, dtype=ladj.dtype).view_as(ladj)
    return (y, ladj, *torch.autograd.grad(((y * weights).sum() + (ladj * rows).sum()), leaves))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("tails", TAILS)
def test_equals_the_reference(backend, device, tails, parametrization, inverse):
    for bins in (2, 5, 8):
        x, parameters = draw((9, 6), bins, tails, torch.float64, device)
        options = {"tails": tails_of(tails, 6), "domain": (-3.0, 3.0), "parametrization": parametrization,
                   "inverse": inverse, "scale": 0.5}  # fmt: skip
        if tails is None:
            options["image"] = (-1.0, 4.0)
        actual = gradients(rational_quadratic_spline, [x, parameters], **options)
        expected = gradients(rational_quadratic_spline_reference, [x, parameters], **options)
        for a, b in zip(actual, expected, strict=True):
            close(a, b, scale=100)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_and_dtypes(backend, device, dtype, inverse):
    for shape in SHAPES:
        x, parameters = draw(shape, 4, "linear", dtype, device)
        options = {"tails": "linear", "domain": (-3.0, 3.0), "inverse": inverse}
        y, ladj = ops.rational_quadratic_spline(x, parameters, **options)
        expected_y, expected_ladj = rational_quadratic_spline_reference(x.double(), parameters.double(), **options)
        assert y.dtype == dtype
        assert ladj.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ladj.shape == shape[:-1]
        close(y, expected_y.to(dtype), scale=4)
        close(ladj, expected_ladj.to(ladj.dtype), scale=20)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bins", [2, 17, 64, 128])
def test_any_number_of_bins(backend, device, bins, dtype, parametrization):
    x, parameters = draw((5, 7), bins, "circular", dtype, device)
    options = {"tails": "circular", "domain": (-3.0, 3.0), "bins": bins, "parametrization": parametrization}
    for inverse in (False, True):
        actual = gradients(rational_quadratic_spline, [x, parameters], inverse=inverse, **options)
        exact = gradients(
            rational_quadratic_spline_reference, [x.double(), parameters.double()], inverse=inverse, **options
        )
        for a, b in zip(actual, exact, strict=True):
            # Narrow bins magnify the rounding of the knots.
            close(a, b.to(a.dtype), scale=1000 if a.dtype == torch.float32 else 100 if dtype == torch.float64 else 4)


def planar(x: Tensor) -> Tensor:
    """The same values with the elements side by side and their parameters apart, as a convolution leaves them."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def every_other(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, math.nan)), -1).flatten(-2)[..., ::2]


def swapped(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def shifted(x: Tensor) -> Tensor:
    """Contiguous, but starting one element past an aligned address."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", [planar, every_other, swapped, shifted])
def test_takes_any_strides(backend, device, layout, inverse):
    x, parameters = draw((4, 3, 2, 40), 6, "linear", torch.float32, device)
    widths, heights, slopes = parameters.split((6, 6, 5), -1)
    for event_dims in (0, 1, 3, 4):
        options = {"tails": "linear", "domain": (-3.0, 3.0), "event_dims": event_dims, "inverse": inverse}
        expected = ops.rational_quadratic_spline(x, parameters, **options)
        for parts in (
            layout(parameters),
            (widths, layout(heights), slopes),
            tuple(map(layout, (widths, heights, slopes))),
        ):
            y, ladj = ops.rational_quadratic_spline(layout(x), parts, **options)
            assert ladj.shape == x.shape[: 4 - event_dims]
            assert torch.equal(y, expected[0])
            torch.testing.assert_close(ladj, expected[1])


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_any_layout(backend, device, inverse):
    x, parameters = draw((4, 3, 30), 6, "linear", torch.float32, device)
    parts = list(parameters.split((6, 6, 5), -1))
    options = {"tails": "linear", "domain": (-3.0, 3.0), "event_dims": 2, "inverse": inverse}
    packed = gradients(rational_quadratic_spline, [x, parameters], **options)
    apart = gradients(rational_quadratic_spline, [x, *parts], **options)
    assert torch.equal(packed[3], torch.cat(apart[3:], -1))
    strided = gradients(rational_quadratic_spline, [every_other(x), planar(parameters)], **options)
    for a, b in zip(strided, packed, strict=True):
        torch.testing.assert_close(a, b)
    # The gradients that come from above may have any strides as well.
    for event_dims in (0, 2):
        options["event_dims"] = event_dims
        y, ladj = rational_quadratic_spline(x.requires_grad_(), parameters, **options)
        ladj_weight = torch.randn(*ladj.shape, 2, device=device)[..., 0]
        (grad,) = torch.autograd.grad((y, ladj), x, (swapped(torch.ones_like(y)), ladj_weight), retain_graph=True)
        (same,) = torch.autograd.grad((y, ladj), x, (torch.ones_like(y), ladj_weight.clone()))
        assert torch.equal(grad, same)


def test_parameters_broadcast(backend, device):
    x, parameters = draw((6, 5), 4, "linear", torch.float64, device)
    parameters = parameters[:1]
    options = {"tails": "linear", "domain": (-3.0, 3.0)}
    actual = gradients(rational_quadratic_spline, [x, parameters], **options)
    expected = gradients(rational_quadratic_spline_reference, [x, parameters], **options)
    assert actual[3].shape == parameters.shape
    for a, b in zip(actual, expected, strict=True):
        close(a, b, scale=100)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixes_dtypes_as_autocast_does(backend, device, x_dtype):
    x, parameters = draw((5, 24), 8, "linear", torch.float32, device)
    for dtypes in ((torch.bfloat16,) * 3, (torch.float16, torch.float32, torch.bfloat16), (torch.float64,) * 3):
        parts = [part.to(d) for part, d in zip(parameters.split((8, 8, 7), -1), dtypes, strict=True)]
        options = {"tails": "linear", "domain": (-3.0, 3.0)}
        actual = gradients(rational_quadratic_spline, [x.to(x_dtype), *parts], **options)
        expected = gradients(rational_quadratic_spline_reference, [x.to(x_dtype), *parts], **options)
        assert (actual[0].dtype, actual[1].dtype) == (x_dtype, torch.float32)
        for a, b, source in zip(actual[2:], expected[2:], [x.to(x_dtype), *parts], strict=True):
            assert a.dtype == source.dtype
            close(a.float(), b.float(), scale=100)
        close(actual[0], expected[0], scale=4)


@pytest.mark.parametrize("inverse", [False, True])
def test_bounds_and_tails_of_each_dimension(backend, device, inverse):
    # A column of the whole is the spline with that column's bounds and tails alone.
    columns = 6
    x, parameters = draw((50, columns), 5, MIXED, torch.float64, device)
    left, right = -1 - torch.rand(columns, device=device), 1 + torch.rand(columns, device=device)
    tails = tails_of(MIXED, columns)
    y, ladj = ops.rational_quadratic_spline(x, parameters, tails=tails, domain=(left, right), inverse=inverse)
    total = torch.zeros_like(ladj)
    for i in range(columns):
        own = parameters[:, i : i + 1]
        if tails[i] == "linear":
            own = torch.cat((own[..., :10], own[..., 11:-1]), -1)
        elif tails[i] == "circular":
            own = own[..., :-1]
        column, column_ladj = ops.rational_quadratic_spline(
            x[:, i : i + 1], own, tails=tails[i], domain=(float(left[i]), float(right[i])), inverse=inverse
        )
        close(y[:, i : i + 1], column, scale=100)
        total += column_ladj
    close(ladj, total, scale=100)
    image = (torch.tensor(-2.0, device=device), 5.0)
    y, ladj = ops.rational_quadratic_spline(x, parameters, domain=(left, 3.0), image=image, inverse=inverse)
    expected = rational_quadratic_spline_reference(x, parameters, domain=(left, 3.0), image=image, inverse=inverse)
    close(y, expected[0], scale=100)
    close(ladj, expected[1], scale=100)


def test_ends_that_the_tails_decide_get_no_gradient(backend, device):
    x, parameters = draw((200, 3), 4, MIXED, torch.float64, device)
    tails = ["linear", "circular", None]
    grad = gradients(rational_quadratic_spline, [x, parameters], tails=tails, domain=(-3.0, 3.0))[3][..., 8:]
    used = (grad != 0).any(0)
    assert used.tolist() == [[False, True, True, True, False], [True, True, True, True, False], [True] * 5]


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    bins=st.integers(2, 20),
    tails=st.sampled_from(TAILS),
    parametrization=st.sampled_from(PARAMETRIZATIONS),
    data=st.data(),
)
def test_round_trip(shape, bins, tails, parametrization, data):
    options = {"event_dims": data.draw(st.integers(0, len(shape))), "parametrization": parametrization,
               "tails": tails_of(tails, shape[-1]), "domain": (-2.0, 5.0)}  # fmt: skip
    x, parameters = draw(shape, bins, tails, torch.float64, torch.device("cpu"))
    y, ladj = rational_quadratic_spline(x, parameters, **options)
    back, back_ladj = rational_quadratic_spline(y, parameters, inverse=True, **options)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back_ladj, -ladj, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_round_trip_in_float32(backend, device, parametrization):
    options = {"tails": "linear", "domain": (-3.0, 3.0), "parametrization": parametrization, "event_dims": 0}
    for bins in (8, 32):
        # The promises of the docstring: of an element at most, and the share that may be beyond 1e-5.
        for size, most, share in ((0.5, 1e-5, 0.0), (1.0, 1e-3, 0.005), (3.0, 0.2, 0.4)):
            x, parameters = draw((1000, 4), bins, "linear", torch.float32, device)
            parameters = parameters * size
            y, ladj = ops.rational_quadratic_spline(x, parameters, **options)
            back, _ = ops.rational_quadratic_spline(y, parameters, inverse=True, **options)
            error = (back - x).abs() / 6
            assert error.max() < most
            assert (error > 1e-5).double().mean() <= share
            # Where the spline is flat the rounding of y comes back divided by its slope.
            assert (error * ladj.exp().clamp_max(1)).max() < 5e-7
            # An exact spline whose y is rounded to float32 loses as many.
            exact = rational_quadratic_spline_reference(x.double(), parameters.double(), **options)[0].float().double()
            found, _ = rational_quadratic_spline_reference(exact, parameters.double(), inverse=True, **options)
            least = ((found - x).abs() / 6 > 1e-5).double().mean()
            assert (error > 1e-5).double().mean() <= 1.1 * least + 0.002


def test_ladj_is_the_jacobian_of_autograd(backend, device):
    for inverse in (False, True):
        for tails in TAILS:
            x, parameters = draw((1, 6), 5, tails, torch.float64, device)

            def transform(value: Tensor, **options: object) -> Tensor:
                return ops.rational_quadratic_spline(value, parameters, **options)[0]  # noqa: B023

            options = {"tails": tails_of(tails, 6), "domain": (-2.0, 2.0), "inverse": inverse}
            jacobian = torch.autograd.functional.jacobian(lambda v: transform(v, **options), x).reshape(6, 6)  # noqa: B023
            _, ladj = ops.rational_quadratic_spline(x, parameters, **options)
            torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ladj[0])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", TAILS)
def test_gradients(backend, device, tails, inverse):
    x, parameters = (t.requires_grad_() for t in draw((2, 3), 3, tails, torch.float64, device))
    for parametrization, more in (("softplus", {"identity_init": True, "scale": 0.7}), ("softclip", {"slope": 1e-2})):
        options = {"tails": tails_of(tails, 3), "domain": (-1.5, 2.0), "inverse": inverse, **more}

        def transform(*tensors: Tensor, p: str = parametrization, o: dict = options) -> tuple[Tensor, Tensor]:
            return ops.rational_quadratic_spline(*tensors, parametrization=p, **o)

        assert torch.autograd.gradcheck(transform, (x, parameters))


@pytest.mark.parametrize("inverse", [False, True])
def test_second_derivatives(backend, device, inverse):
    x = torch.tensor([[-1.7, 0.3, 1.2]], device=device, dtype=torch.float64, requires_grad=True)
    parameters = torch.randn(1, 3, 7, device=device, dtype=torch.float64, requires_grad=True)
    tails = ["linear", "circular", None]

    def transform(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rational_quadratic_spline(x, parameters, tails=tails, domain=(-1.5, 2.0), inverse=inverse)

    assert torch.autograd.gradgradcheck(transform, (x, parameters))


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("tails", TAILS)
def test_extreme_input_stays_finite(backend, device, tails, parametrization):
    # Out of bounds, on the bounds, and parameters that leave single bins with all of the domain.
    x = torch.tensor([-1e30, -3.0, 3.0, 2.9999998, 1e6, -0.0, 3.0000002, 1e-30, 1.0], device=device)
    for scale in (0.0, 1.0, 100.0, 1e6):
        for dtype in (torch.float32, torch.bfloat16):
            for minimum in (1e-3, 0.0):
                for inverse in (False, True):
                    _, parameters = draw((40, 9), 8, tails, torch.float32, device)
                    options = {"tails": tails_of(tails, 9), "domain": (-3.0, 3.0), "inverse": inverse,
                               "parametrization": parametrization, "min_bin_width": minimum, "min_bin_height": minimum,
                               "min_derivative": minimum}  # fmt: skip
                    results = gradients(
                        rational_quadratic_spline, [x.expand(40, 9), (parameters * scale).to(dtype)], **options
                    )
                    if inverse and not minimum and tails is None and parametrization == "softplus":
                        # Far out, the inverse of a straight line whose slope may be 0 has no derivative by it in range.
                        results = (*results[:3], results[3][:, 1:])
                    for result in results:
                        assert result.isfinite().all()


@pytest.mark.parametrize("inverse", [False, True])
def test_float16_overflows_to_infinity(backend, device, inverse):
    # Infinite gradients are what loss scaling looks for: neither the largest number nor NaN.
    x = torch.linspace(-4, 4, 65, device=device).half().expand(64, 65)
    _, parameters = draw((64, 65), 8, "linear", torch.float32, device)
    beyond = 0
    for scale in (1.0, 10.0, 100.0):
        found = []
        for dtype in (torch.float16, torch.float32):
            leaf = x.to(dtype).requires_grad_()
            outputs = ops.rational_quadratic_spline(
                leaf, parameters * scale, tails="linear", domain=(-3.0, 3.0), inverse=inverse
            )
            found.append(torch.autograd.grad(outputs, leaf, [torch.ones_like(v) for v in outputs])[0].half())
        assert torch.equal(*found)
        beyond += int(found[0].isinf().sum())
    assert beyond


def test_all_tail_batches(backend, device):
    x, parameters = draw((30, 5), 8, "linear", torch.float32, device)
    x = x.sign() * (4 + x.abs())
    for inverse in (False, True):
        y, ladj, grad_x, grad_parameters = gradients(
            rational_quadratic_spline, [x, parameters], tails="linear", domain=(-3.0, 3.0), inverse=inverse
        )
        assert torch.equal(y, x)
        assert not ladj.any()
        assert grad_x.isfinite().all()
        assert not grad_parameters.any()


def test_without_tails_the_ends_go_straight_on(backend, device):
    _, parameters = draw((1, 2), 4, None, torch.float64, device)
    ends = torch.tensor([[0.0, 1.0]], device=device, dtype=torch.float64)
    out = torch.tensor([[-2.0, 4.0]], device=device, dtype=torch.float64)
    at_ends, _ = ops.rational_quadratic_spline(ends, parameters, event_dims=0)
    y, ladj = ops.rational_quadratic_spline(out, parameters, event_dims=0)
    torch.testing.assert_close(at_ends, ends)
    torch.testing.assert_close(y, at_ends + ladj.exp() * (out - ends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_parameters_are_the_identity(backend, device, dtype):
    x = torch.linspace(-5, 5, 1001, device=device, dtype=dtype).view(-1, 1)
    for bins in (2, 8, 33):
        zeros = torch.zeros(1001, 1, 3 * bins - 1, device=device, dtype=dtype)
        for options in ({"identity_init": True}, {"parametrization": "softclip"}):
            y, ladj = ops.rational_quadratic_spline(x, zeros, tails="linear", domain=(-3.0, 3.0), **options)
            close(y, x)
            close(ladj, torch.zeros_like(ladj), scale=4)


def peer(name: str, x: Tensor, parameters: Tensor, bins: int, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """A peer's own spline with linear tails."""
    parts = parameters.split((bins, bins, bins - 1), -1)
    if name == "zuko":
        transforms = pytest.importorskip("zuko.transforms")
        transform = transforms.MonotonicRQSTransform(*parts, bound=bound)
        y, ladj = (transform.inv if inverse else transform).call_and_ladj(x)
    else:
        module = "nflows.transforms.splines.rational_quadratic" if name == "nflows" else "normflows.utils.splines"
        function = pytest.importorskip(module).unconstrained_rational_quadratic_spline
        y, ladj = function(x, *parts, inverse=inverse, tails="linear", tail_bound=bound)
    return y, ladj.sum(-1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nflows", "normflows", "zuko"])
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_peers_and_is_no_less_accurate(backend, device, name, inverse):
    for bins, size in ((8, 1.0), (16, 1.0), (8, 3.0)):
        x, parameters = draw((1500, 8), bins, "linear", torch.float32, device)
        parameters = parameters * size
        options = {"tails": "linear", "domain": (-3.0, 3.0), "inverse": inverse,
                   "parametrization": "softclip" if name == "zuko" else "softplus"}  # fmt: skip

        def theirs(x: Tensor, parameters: Tensor, bins: int = bins, **_: object) -> tuple[Tensor, Tensor]:
            return peer(name, x, parameters, bins, 3.0, inverse)

        exact = gradients(theirs, [x.double(), parameters.double()])
        mine = gradients(rational_quadratic_spline, [x.double(), parameters.double()], **options)
        for a, b in zip(mine, exact, strict=True):
            close(a, b, scale=1e5 if inverse else 1e3)
        ours = gradients(rational_quadratic_spline, [x, parameters], **options)
        rounded = gradients(theirs, [x, parameters])
        for actual, other, truth in zip(ours, rounded, exact, strict=True):
            scale = truth.abs().clamp_min(1)
            error, their_error = (((value.double() - truth).abs() / scale).mean() for value in (actual, other))
            assert error <= their_error


def test_circular_tails_and_bounds_of_normflows(backend, device):
    function = pytest.importorskip("normflows.utils.splines").unconstrained_rational_quadratic_spline
    x, parameters = draw((50, 4), 6, MIXED, torch.float64, device)
    tails = ["linear", "circular", "circular", "linear"]
    bound = torch.tensor([1.0, math.pi, 2.0, 0.5], device=device, dtype=torch.float64)
    x = (torch.rand_like(x) * 2 - 1) * bound  # outside, with tails by dimension, normflows gives zeros
    y, ladj = function(x, *parameters.split((6, 6, 7), -1), tails=tails, tail_bound=bound)
    own_y, own_ladj = ops.rational_quadratic_spline(x, parameters, tails=tails, domain=(-bound, bound), event_dims=0)
    close(own_y, y, scale=100)
    close(own_ladj, ladj, scale=100)


def test_saves_its_input_and_parameters_alone(backend, device):
    x, parameters = (t.requires_grad_() for t in draw((16, 8), 8, "linear", torch.float32, device))
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.rational_quadratic_spline(x, parameters, tails="linear", domain=(-3.0, 3.0))
    assert sum(saved.values()) == 96 * x.numel()


def test_raw_operators_pass_opcheck(backend, device, namespace):
    library = getattr(torch.ops, namespace)
    x, parameters = draw((2, 3, 8), 4, "linear", torch.float32, device)
    parts = list(parameters.split((4, 4, 3), -1))
    common = (4, 1, [-3.0, 3.0, -3.0, 3.0], [1e-3] * 3, 0, 1.0, 1.0, 1.0, 2)
    for name in ("forward", "inverse"):
        operator = getattr(library, f"rational_quadratic_spline_{name}").default
        opcheck(operator, (x, [planar(parameters)] if name == "forward" else parts, None, *common))
    rows = torch.tensor([-3.0, 3.0, -3.0, 3.0, 1.0], device=device).view(5, 1).repeat(1, 8)
    backward = library.rational_quadratic_spline_backward.default
    grad_ladj = torch.randn(2, device=device)
    opcheck(backward, (x, [parameters], rows, x, grad_ladj, *common, False))
    mixed = [parts[0], parts[1].double(), parts[2]]
    opcheck(backward, (x, mixed, None, x, grad_ladj, *common, True))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_compiles_in_one_graph(backend, device, with_gradient):
    x, parameters = (t.requires_grad_(with_gradient) for t in draw((4, 6), 5, MIXED, torch.float32, device))

    def transform(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        tails = ("linear", "circular", None) * 2
        return ops.rational_quadratic_spline(x * 2, parameters, tails=tails, domain=(-3.0, 3.0))

    compiled = torch.compile(transform, fullgraph=True)
    results, expected = compiled(x, parameters), transform(x, parameters)
    for a, b in zip(results, expected, strict=True):
        close(a, b, scale=4)
    if with_gradient:
        actual = torch.autograd.grad(results[0].sum() + results[1].sum(), (x, parameters))
        wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), (x, parameters))
        for a, b in zip(actual, wanted, strict=True):
            close(a, b, scale=4)


def test_functorch_takes_the_reference(backend, device):
    x, parameters = draw((4, 8), 5, "linear", torch.float64, device)
    options = {"tails": "linear", "domain": (-3.0, 3.0)}
    y, ladj = ops.rational_quadratic_spline(x, parameters, **options)
    rows = torch.vmap(lambda *row: ops.rational_quadratic_spline(*row, **options))(x, parameters)
    close(rows[0], y, scale=100)
    close(rows[1], ladj, scale=100)
    tangent = torch.func.jvp(
        lambda v: ops.rational_quadratic_spline(v, parameters, **options)[0], (x,), (torch.ones_like(x),)
    )[1]
    close(tangent.log().sum(-1), ladj, scale=100)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("shape", [(5, 5000), (600, 9)])
def test_threads_and_batch_position_do_not_change_a_bit(backend, device, shape):
    x, parameters = draw(shape, 4, "linear", torch.float32, device)
    options = {"tails": "linear", "domain": (-3.0, 3.0)}
    many = gradients(rational_quadratic_spline, [x, parameters], **options)
    torch.set_num_threads(1)
    once = gradients(rational_quadratic_spline, [x, parameters], **options)
    for a, b in zip(many, once, strict=True):
        assert torch.equal(a, b)
    y, ladj = ops.rational_quadratic_spline(x[3:4], parameters[3:4], **options)
    assert torch.equal(y, many[0][3:4])
    assert torch.equal(ladj, many[1][3:4])


@pytest.mark.parametrize("inverse", [False, True])
def test_invalid_data_stays_in_its_row(backend, device, inverse):
    x, parameters = draw((5, 9), 4, "linear", torch.float32, device)
    x = x.clamp(-2.5, 2.5)
    options = {"tails": "linear", "domain": (-3.0, 3.0), "inverse": inverse}
    clean = gradients(rational_quadratic_spline, [x, parameters], **options)
    x[1, 2], parameters[2, 3, 1], x[3, 0], x[3, 1] = math.nan, math.nan, math.inf, -math.inf
    y, ladj, grad_x, grad_parameters = gradients(rational_quadratic_spline, [x, parameters], **options)
    assert y.isnan().nonzero().tolist() == [[1, 2], [2, 3]]
    assert ladj.isnan().nonzero().tolist() == [[1], [2]]
    assert y[3, :2].tolist() == [math.inf, -math.inf]
    assert ladj[3].isfinite()
    assert grad_x.isnan().nonzero().tolist() == [[1, 2], [2, 3]]
    assert grad_parameters.isnan().any(-1).nonzero().tolist() == [[1, 2], [2, 3]]
    for row in (0, 4):
        for a, b in zip((y, ladj, grad_x, grad_parameters), clean, strict=True):
            assert torch.equal(a[row], b[row])


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for shape in SHAPES:
            x, parameters = draw(shape, 4, None, torch.float32, device)
            for result in gradients(rational_quadratic_spline, [x, parameters]):
                assert result.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_number_alone(backend, device):
    x, parameters = draw((), 4, "linear", torch.float64, device)
    y, ladj = ops.rational_quadratic_spline(x, parameters, tails="linear", event_dims=0)
    expected = rational_quadratic_spline_reference(x, parameters, tails="linear", event_dims=0)
    close(y, expected[0])
    close(ladj, expected[1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"parameters": torch.zeros(3, 4, 12)}, "parameters has 12 values for an element, but expected 10: 3 widths"),
        ({"parameters": torch.zeros(3, 4, 4)}, "parameters are for 1 bins, but expected 2 to 128"),
        ({"parameters": torch.zeros(3, 5, 13)}, r"parameters has shape \(3, 5, 13\)"),
        ({"parameters": torch.zeros(3, 4, 13, device="meta")}, "parameters is on meta, but expected x's cpu"),
        ({"parameters": (torch.zeros(3, 4, 4),) * 2}, "parameters has 2 tensors"),
        ({"parameters": (torch.zeros(3, 4, 4),) * 3}, r"parameters has 4 \+ 4 \+ 4 values"),
        ({"parameters": torch.tensor(1.0)}, r"parameters has shape \(\)"),
        ({"bins": 5}, "parameters has 13 values for an element, but expected 16"),
        ({"tails": "straight"}, "tails has 'straight', but expected None, 'linear' or 'circular'"),
        ({"tails": ["linear"] * 3}, "tails has 3 entries"),
        ({"domain": (1.0, 1.0)}, r"domain is \(1.0, 1.0\)"),
        ({"domain": (0.0, math.inf)}, r"domain is \(0.0, inf\)"),
        ({"domain": (torch.zeros(3), 1.0)}, r"domain has a bound of shape \(3,\)"),
        ({"domain": (torch.zeros(4, device="meta"), 1.0)}, "domain is on meta"),
        ({"image": (2.0, 1.0)}, r"image is \(2.0, 1.0\)"),
        ({"image": (0.0, 2.0), "tails": ["linear"] * 4}, "image is given, but with tails"),
        ({"min_bin_width": 0.3}, "min_bin_width is 0.3, but 4 bins need a number from 0 to 1/4"),
        ({"min_bin_height": -1.0}, "min_bin_height is -1.0"),
        ({"min_derivative": math.nan}, "min_derivative is nan"),
        ({"min_derivative": 1.0, "identity_init": True}, "min_derivative is 1.0, but expected a number >= 0, below 1"),
        ({"parametrization": "softmax"}, "parametrization is 'softmax'"),
        ({"parametrization": "softclip", "slope": 1.0}, "slope is 1.0"),
        ({"parametrization": "softclip", "identity_init": True}, "identity_init is True"),
        ({"boundary_slope": 0.0}, "boundary_slope is 0.0"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"event_dims": 3}, "event_dims is 3, but x has 2 dimensions"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, sentence):
    parameters = arguments.pop("parameters", torch.zeros(3, 4, 13))
    with pytest.raises(ValueError, match=sentence):
        ops.rational_quadratic_spline(torch.zeros(3, 4), parameters, **arguments)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="x has dtype torch.int64"):
        ops.rational_quadratic_spline(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, 13))
    with pytest.raises(TypeError, match="heights has dtype torch.int32"):
        parts = (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.int32), torch.zeros(3, 4, 5))
        ops.rational_quadratic_spline(torch.zeros(3, 4), parts)


def test_raw_operators_check_what_would_reach_memory(backend, namespace, device):
    library = getattr(torch.ops, namespace)
    x, parameters = torch.zeros(3, 4, device=device), torch.zeros(3, 4, 11, device=device)
    common = [4, 1, [-3.0, 3.0, -3.0, 3.0], [1e-3] * 3, 0, 1.0, 1.0, 1.0, 1]
    forward, backward = library.rational_quadratic_spline_forward, library.rational_quadratic_spline_backward

    def changed(position: int, value: object) -> list[object]:
        return [*common[:position], value, *common[position + 1 :]]

    for arguments, sentence in (
        ((x, [parameters[..., :5]], None, *common), r"parameters has shape \(3, 4, 5\), but expected that of x"),
        ((x, [parameters], None, *changed(0, 129)), "bins is 129, but expected 2 to 128"),
        ((x, [parameters], None, *changed(1, 4)), "tails is 4"),
        ((x, [parameters], None, *changed(1, 3)), "tails is 3, one for each dimension, but dimensions is absent"),
        ((x, [parameters], None, *changed(4, 2)), "parametrization is 2"),
        ((x, [parameters], None, *changed(8, 7)), "event_dims is 7"),
        ((x, [parameters], x, *common), r"dimensions has shape \(3, 4\), but expected \(5, 4\)"),
        ((x, [parameters, parameters], None, *common), "parameters has 2 tensors"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            forward(*arguments)
    with pytest.raises(RuntimeError, match=r"grad_ladj has shape \(4,\)"):
        backward(x, [parameters], None, x, torch.zeros(4, device=device), *common, False)
    with pytest.raises(RuntimeError, match=r"grad_output has shape \(3,\)"):
        backward(x, [parameters], None, x[:, 0], x[:, 0], *common, False)


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    x, parameters = draw((64, 3000), 8, MIXED, torch.float32, device)
    options = {"tails": tails_of(MIXED, 3000), "domain": (-3.0, 3.0)}
    ops.rational_quadratic_spline(x, parameters, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, ladj = ops.rational_quadratic_spline(x, parameters, **options)
    x.normal_()
    graph.replay()
    expected = ops.rational_quadratic_spline(x, parameters, **options)
    assert torch.equal(y, expected[0])
    assert torch.equal(ladj, expected[1])


@pytest.mark.large
def test_more_than_two_to_the_31_parameters(backend, device):
    if backend != "cuda":
        pytest.skip("index arithmetic past 2^31 is tested on a GPU only")
    rows = 2**31 // 5 + 100
    parameters = torch.zeros(rows, 1, 5, dtype=torch.bfloat16, device=device)
    x = torch.full((rows, 1), 0.5, dtype=torch.bfloat16, device=device)
    parameters[-1, 0, 0] = 5
    y, ladj = ops.rational_quadratic_spline(x, parameters, tails="linear")
    expected = ops.rational_quadratic_spline(x[-1:], parameters[-1:], tails="linear")
    assert torch.equal(y[-1], expected[0][0])
    assert torch.equal(ladj[-1:], expected[1])


def test_the_reference_serves_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(_native, "_kernels", {})
    x, parameters = draw((4, 8), 5, None, torch.float32, torch.device("cpu"))
    y, ladj = ops.rational_quadratic_spline(x, parameters)
    expected = rational_quadratic_spline_reference(x, parameters)
    assert torch.equal(y, expected[0])
    assert torch.equal(ladj, expected[1])
