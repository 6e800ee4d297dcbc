"""Zuko's flows on pygen's kernels against zuko itself: values, log-determinants, gradients, and what stays zuko's."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import zuko.bayesian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zuko.transforms import (
    DependentTransform,
    LULinearTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
    PermutationTransform,
)

from pygen.compat.zuko import convert, patch, transforms

DTYPES = (torch.float32, torch.float64)
# What zuko's own tests allow in float32.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def agree(actual: Any, expected: Any, *, scale: float = 1.0) -> None:
    """Same shape and dtype, and as close as the dtype allows, relative to the largest value."""
    for ours, theirs in zip(actual, expected, strict=True):
        size = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
        tolerance = TOLERANCE[theirs.dtype] * scale
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * size)


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def splines(draw: Callable[..., Any]) -> tuple[type, tuple[Tensor, ...], dict[str, float], Tensor]:
    """A spline's parameters, constants, and points in the bins, at their edges and in the tails."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, shape, bins = draw(st.sampled_from(DTYPES)), draw(shapes), draw(st.integers(2, 20))
    constants = {"bound": draw(st.sampled_from((1.0, 3, 5.0))), "slope": draw(st.sampled_from((1e-3, 1e-2, 0.3)))}
    size = draw(st.sampled_from((0.0, 1.0, 5.0)))
    parameters = tuple(size * torch.randn(*shape, count, dtype=dtype) for count in (bins, bins, bins - 1))
    return MonotonicRQSTransform, parameters, constants, _points(shape, dtype, constants["bound"])


@st.composite
def affines(draw: Callable[..., Any]) -> tuple[type, tuple[Tensor, ...], dict[str, float], Tensor]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, shape, size = draw(st.sampled_from(DTYPES)), draw(shapes), draw(st.sampled_from((0.0, 1.0, 10.0)))
    parameters = tuple(size * torch.randn(shape, dtype=dtype) for _ in range(2))
    return MonotonicAffineTransform, parameters, {"slope": draw(st.sampled_from((1e-3, 0.3)))}, _points(shape, dtype, 3)


def _points(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> Tensor:
    x = 0.8 * bound * torch.randn(shape, dtype=dtype)
    edge = torch.rand(shape) < 0.1
    return torch.where(edge, bound * x.sign(), x)


def _run(
    make: Callable[..., Any], parameters: Any, x: Tensor, inverse: bool, bound: float = 5.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Values from every entrance, and gradients of x and the parameters."""
    leaves = [leaf.clone().requires_grad_() for leaf in (x, *parameters)]
    transform = make(*leaves[1:])
    transform = transform.inv if inverse else transform
    y, ladj = transform.call_and_ladj(leaves[0])
    values = [y, ladj, transform(leaves[0]), transform.log_abs_det_jacobian(leaves[0], y)]
    weights = torch.linspace(-1, 1, 2 * y.numel(), dtype=y.dtype).reshape(2, *y.shape)
    # At the bounds, and nowhere else, the slope of the log-determinant depends on the side.
    weights = weights * (x.abs() != bound)
    loss = (weights[0] * y).sum() + (weights[1] * ladj).sum()
    return values, list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


@given(case=st.one_of(splines(), affines()), inverse=st.booleans())
def test_univariate_transforms_agree(case: Any, inverse: bool) -> None:
    cls, parameters, constants, x = case
    make = partial(cls, **constants)
    values, gradients = _run(make, parameters, x, inverse, constants.get("bound", 0.0))
    with patch():
        ours, our_gradients = _run(make, parameters, x, inverse, constants.get("bound", 0.0))
    # An inverse is as uncertain as y times 1 / slope, its derivatives as much again.
    slack = 10 / constants["slope"] if inverse else 10.0
    agree(ours, values, scale=slack)
    agree(our_gradients, gradients, scale=slack**2 / 10)


@given(case=splines(), inverse=st.booleans())
def test_splines_of_large_parameters_are_finite(case: Any, inverse: bool) -> None:
    _, parameters, constants, x = case
    values, gradients = _run(
        partial(transforms.MonotonicRQSTransform, **constants), [100 * part for part in parameters], x, inverse
    )
    assert all(value.isfinite().all() for value in values + gradients)


def test_float32_is_no_worse_than_zukos() -> None:
    parameters = [torch.randn(4096, count, dtype=torch.float64) for count in (8, 8, 7)]
    x = 3 * torch.randn(4096, dtype=torch.float64)
    exact, _ = _run(MonotonicRQSTransform, parameters, x, False)
    rounded = [part.float() for part in parameters]
    theirs, _ = _run(MonotonicRQSTransform, rounded, x.float(), False)
    with patch():
        ours, _ = _run(MonotonicRQSTransform, rounded, x.float(), False)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert (mine - truth).abs().max() <= 1.5 * (other - truth).abs().max()


def _spline(*shape: int, **options: Any) -> MonotonicRQSTransform:
    return MonotonicRQSTransform(*(torch.randn(*shape, count) for count in (8, 8, 7)), **options)


def test_what_zuko_computes_at_construction_is_there_when_asked_for() -> None:
    parts = [torch.randn(3, count) for count in (8, 8, 7)]
    spline, affine = MonotonicRQSTransform(*parts), MonotonicAffineTransform(*parts[:2])
    packed = transforms.MonotonicRQSTransform.packed(torch.cat(parts, -1))
    with patch():
        ours, our_affine = MonotonicRQSTransform(*parts), MonotonicAffineTransform(*parts[:2])
    for name in ("horizontal", "vertical", "derivatives"):
        assert torch.equal(getattr(ours, name), getattr(spline, name))
        assert torch.equal(getattr(packed, name), getattr(spline, name))
    for name in ("shift", "log_scale", "scale"):
        assert torch.equal(getattr(our_affine, name), getattr(affine, name))
    k = torch.tensor([0, 3, 8])
    assert all(map(torch.equal, ours.bin(k), spline.bin(k)))
    assert ours.bins == packed.bins == 8
    for mine, theirs in ((ours, spline), (our_affine, affine)):
        assert isinstance(mine, type(theirs))
        assert repr(mine) == repr(theirs)
        assert repr(mine.inv) == repr(theirs.inv)
        assert mine.inv.inv is mine
        assert mine.domain is theirs.domain and mine.codomain is theirs.codomain
        assert mine.bijective and mine.inv.bijective and mine.sign == mine.inv.sign == 1
    with pytest.raises(AttributeError, match="MonotonicRQSTransform.*knots"):
        ours.knots  # noqa: B018


def test_constrained_parameters_have_the_gradients_of_construction() -> None:
    parts = [torch.randn(3, count, requires_grad=True) for count in (8, 8, 7)]
    with torch.no_grad():
        silent = transforms.MonotonicRQSTransform(*parts)
    assert not silent.horizontal.requires_grad
    assert not silent(torch.randn(3)).requires_grad
    recorded = transforms.MonotonicRQSTransform(*parts)
    with torch.no_grad():
        assert recorded.horizontal.requires_grad


def test_a_transform_is_what_its_parameters_were() -> None:
    shift, scale = (nn.Parameter(torch.randn(3)) for _ in range(2))
    transform = transforms.MonotonicAffineTransform(shift, scale)
    before = transform(torch.ones(3))
    with torch.no_grad():
        shift.add_(1)
    assert torch.equal(transform(torch.ones(3)), before)


@pytest.mark.parametrize("make", [_spline, lambda *shape, **options: MonotonicAffineTransform(
    torch.randn(shape), torch.randn(shape), **options)], ids=["spline", "affine"])  # fmt: skip
def test_caches_as_pytorchs_transforms_do(make: Callable[..., Any]) -> None:
    with patch():
        transform = make(4, cache_size=1)
    x = torch.randn(4)
    y = transform(x)
    assert transform(x) is y
    assert transform.inv(y) is x
    assert transform.call_and_ladj(x)[0] is y
    assert transform.inv.call_and_ladj(y)[0] is x
    agree([DependentTransform(transform, 1).call_and_ladj(x)[1]], [transform.log_abs_det_jacobian(x, y).sum(-1)])
    with pytest.raises(NotImplementedError):
        transform.with_cache(0)


def test_pickles_and_copies() -> None:
    with patch():
        spline = _spline(4)
        before = pickle.loads(pickle.dumps(spline))
    x = torch.randn(4)
    for same in (before, copy.deepcopy(spline), pickle.loads(pickle.dumps(spline))):
        assert torch.equal(same(x), spline(x))
        assert torch.equal(same.inv(x), spline.inv(x))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 4), (2, 3, 4), (3, 1)])
@pytest.mark.parametrize("of_parameters", [(), (4,), (3, 4), (3, 1)])
def test_broadcasts_as_arithmetic_does(shape: tuple[int, ...], of_parameters: tuple[int, ...]) -> None:
    x, parts = torch.randn(shape), [torch.randn(*of_parameters, count) for count in (8, 8, 7)]
    theirs = MonotonicRQSTransform(*parts)
    ours = transforms.MonotonicRQSTransform(*parts)
    agree(ours.call_and_ladj(x), theirs.call_and_ladj(x))
    agree(ours.inv.call_and_ladj(x), theirs.inv.call_and_ladj(x))
    affine = transforms.MonotonicAffineTransform(parts[0][..., 0], parts[1][..., 0])
    y, ladj = affine.call_and_ladj(x)
    agree([y], [MonotonicAffineTransform(parts[0][..., 0], parts[1][..., 0])(x)])
    assert ladj.shape == y.shape


@pytest.mark.parametrize("of_x", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("of_parameters", [torch.float32, torch.float64])
def test_promotes_dtypes_as_arithmetic_does(of_x: torch.dtype, of_parameters: torch.dtype) -> None:
    x = (3 * torch.randn(5)).to(of_x)
    parts = [torch.randn(5, count, dtype=of_parameters) for count in (8, 8, 7)]
    for cls, arguments in (
        (MonotonicRQSTransform, parts),
        (MonotonicAffineTransform, [part[:, 0] for part in parts[:2]]),
    ):
        expected = [cls(*arguments)(x), cls(*arguments).inv(x)]
        with patch():
            ours = [cls(*arguments)(x), cls(*arguments).inv(x)]
        # Zuko constrains float32 parameters in float32, whatever x is.
        agree(ours, expected, scale=1.0 if of_parameters == expected[0].dtype else 1e4)


def test_low_precision_keeps_its_dtype() -> None:
    parts = [torch.randn(5, count, dtype=torch.bfloat16) for count in (8, 8, 7)]
    y, ladj = transforms.MonotonicRQSTransform(*parts).call_and_ladj(torch.randn(5, dtype=torch.bfloat16))
    assert y.dtype == ladj.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, options",
    [
        ([torch.randn(3, 1), torch.randn(3, 1), torch.randn(3, 0)], {}),
        ([torch.randn(3, 200), torch.randn(3, 200), torch.randn(3, 199)], {}),
        ([torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 7)], {"bound": torch.tensor(2.0)}),
        ([torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 7)], {"slope": 2.0}),
        ([torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8)], {}),
    ],
    ids=["one bin", "200 bins", "tensor bound", "slope", "shapes"],
)
def test_what_the_kernel_does_not_take_stays_zukos(arguments: list[Tensor], options: dict[str, Any]) -> None:
    with patch():
        assert type(MonotonicRQSTransform(*arguments, **options)) is MonotonicRQSTransform


def test_errors_are_zukos() -> None:
    for make in (
        lambda: MonotonicAffineTransform(torch.randn(3)),
        lambda: MonotonicAffineTransform(torch.randn(3), torch.randn(3), cache_size=2),
        lambda: MonotonicAffineTransform(torch.randn(3), torch.randn(3), unknown=2),
        lambda: MonotonicAffineTransform(torch.randn(3), torch.randn(3))(torch.randn(4)),
    ):
        with pytest.raises(Exception) as theirs:
            make()
        with patch(), pytest.raises(theirs.type):
            make()


# Lazy transforms and flows, by name: how to make one of so many features and context features.
FLOWS: dict[str, Callable[[int, int], nn.Module]] = {
    "NSF": lambda d, c: zuko.flows.NSF(d, c, transforms=2, hidden_features=(16, 16)),
    "NSF coupling": lambda d, c: zuko.flows.NSF(d, c, transforms=2, passes=2, randperm=True, bins=5, slope=1e-2),
    "MAF": lambda d, c: zuko.flows.MAF(d, c, transforms=3, randperm=True, hidden_features=(16,)),
    "MAF residual": lambda d, c: zuko.flows.MAF(d, c, transforms=2, residual=True, activation=nn.ELU),
    "NICE": lambda d, c: zuko.flows.NICE(d, c, transforms=2, randmask=True, normalize=True),
    "NCSF": lambda d, c: zuko.flows.NCSF(d, c, transforms=2, hidden_features=(16,)),
    "spline coupling": lambda d, c: _flow(d, zuko.flows.GeneralCouplingTransform(
        d, c, univariate=partial(MonotonicRQSTransform, bound=3.0), shapes=[(6,), (6,), (5,)])),
    "element-wise": lambda d, c: _flow(d, zuko.flows.ElementWiseTransform(d, c), zuko.flows.ElementWiseTransform(
        d, c, univariate=MonotonicRQSTransform, shapes=[(8,), (8,), (7,)])),
    "linear": lambda d, c: _flow(
        d, zuko.flows.MaskedAutoregressiveTransform(d, c),
        zuko.lazy.UnconditionalTransform(PermutationTransform, torch.randperm(d), buffer=True),
        zuko.lazy.UnconditionalTransform(LULinearTransform, torch.eye(d) + 0.1 * torch.randn(d, d)),
        zuko.lazy.UnconditionalTransform(zuko.transforms.RotationTransform, torch.randn(d, d)),
    ),
    "inverse": lambda d, c: _flow(d, zuko.flows.MaskedAutoregressiveTransform(d, c).inv),
}  # fmt: skip


def _flow(features: int, *layers: Any) -> zuko.lazy.Flow:
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
    )
    return zuko.lazy.Flow(layers, base)


def _replace(how: str, flow: nn.Module) -> Any:
    return convert(flow) if how == "convert" else patch()


def _observe(flow: nn.Module, x: Tensor, c: Tensor | None, weights: Tensor) -> list[Tensor]:
    """Densities and samples of a flow, and the gradients of both to the parameters, x and the context."""
    leaves = [leaf.requires_grad_() for leaf in (x, c) if leaf is not None]
    leaves += [parameter for parameter in flow.parameters() if parameter.requires_grad]
    log_prob = flow(c).log_prob(x)
    gradients = torch.autograd.grad((weights * log_prob).sum(), leaves, allow_unused=True, materialize_grads=True)
    torch.manual_seed(7)
    samples, log_q = flow(c).rsample_and_log_prob((2,))
    loss = samples.square().sum() + log_q.sum()
    of_samples = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    torch.manual_seed(7)
    return [log_prob, samples, log_q, flow(c).rsample((2,)), *gradients, *of_samples]


# The two ways in are tested by turns, and each flow by a few: they share the kernels that are tested above.
FEW = settings(max_examples=max(6, settings().max_examples // 5))


@pytest.mark.parametrize("how", ["convert", "patch"])
@pytest.mark.parametrize("name", FLOWS)
@FEW
@given(seed=st.integers(0, 2**31), d=st.integers(2, 7), c=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
def test_flows_agree(how: str, name: str, seed: int, d: int, c: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    flow = FLOWS[name](d, c).to(dtype)
    x = torch.randn(3, d, dtype=dtype).clamp(-math.pi, math.pi)
    context = torch.randn(3, c, dtype=dtype) if c else None
    weights = torch.randn(3, dtype=dtype)
    expected = _observe(flow, x, context, weights)
    with _replace(how, flow):
        agree(_observe(flow, x, context, weights), expected, scale=100)
    assert all(map(torch.equal, _observe(flow, x, context, weights), expected))


@st.composite
def orders(draw: Callable[..., Any]) -> dict[str, Any]:
    """An order in as many passes, or a graph, of the features, and of the context."""
    d, c = draw(st.integers(2, 8)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = draw(st.lists(st.sampled_from((1, 5, 16)), max_size=3).map(tuple))
    options: dict[str, Any] = {"features": d, "context": c, "hidden_features": hidden}
    if draw(st.booleans()):
        options |= {"order": torch.randperm(d, generator=generator), "passes": draw(st.integers(1, d))}
    else:
        rank = torch.randperm(d, generator=generator)
        graph = (rank[:, None] > rank) & (torch.rand(d, d, generator=generator) < 0.6)
        wide = torch.cat((graph | torch.eye(d, dtype=torch.bool), torch.rand(d, c, generator=generator) < 0.5), 1)
        options["adjacency"] = wide if draw(st.booleans()) else wide[:, :d]
    return options


@FEW
@given(options=orders(), residual=st.booleans(), spline=st.booleans(), seed=st.integers(0, 2**31))
def test_any_order_is_inverted_in_one_sweep(options: Any, residual: bool, spline: bool, seed: int) -> None:
    torch.manual_seed(seed)
    univariate = {"univariate": MonotonicRQSTransform, "shapes": [(4,), (4,), (3,)]} if spline else {}
    residual = residual and len(options["hidden_features"]) > 0  # Zuko has no residual network without a layer.
    try:
        layer = zuko.flows.MaskedAutoregressiveTransform(**options, **univariate, residual=residual).double()
    except ValueError:  # A graph, or a single pass, that leaves the network without an input.
        return
    y = torch.randn(2, 3, options["features"], dtype=torch.float64)
    c = torch.randn(3, options["context"], dtype=torch.float64) if options["context"] else None
    leaves = list(layer.parameters())

    def observe() -> list[Tensor]:
        x, ladj = layer(c).inv.call_and_ladj(y)
        gradients = torch.autograd.grad(
            x.square().sum() + ladj.sum(), leaves, allow_unused=True, materialize_grads=True
        )  # fmt: skip
        return [x, ladj, layer(c).inv(y), *gradients]

    expected = observe()
    with convert(layer), _no_passes(layer):
        agree(observe(), expected, scale=10)


class _no_passes:
    """Inside, the hyper network of a layer may not be called."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __enter__(self) -> None:
        self._meta = type(self._layer).meta

        def refuse(*_: Any) -> None:
            raise AssertionError("the inverse took a pass")

        type(self._layer).meta = refuse

    def __exit__(self, *_: object) -> None:
        type(self._layer).meta = self._meta


def test_the_sweep_sees_every_change_of_the_network() -> None:
    flow, other = (zuko.flows.MAF(5, transforms=1, randperm=True, hidden_features=(300, 300)) for _ in range(2))
    layer = flow.transform.transforms[0]
    z = torch.randn(3, 5)

    def load() -> None:
        flow.load_state_dict(other.state_dict())  # other masks, too

    def train() -> None:
        optimizer = torch.optim.SGD(flow.parameters(), 0.1)
        flow().log_prob(z).sum().backward()
        optimizer.step()

    def write() -> None:
        for parameter in flow.parameters():
            parameter.data.mul_(0.5)

    def activate() -> None:
        layer.hyper[1] = nn.Tanh()

    def hook() -> None:
        layer.hyper[0].register_forward_hook(lambda part, inputs, output: output + 1)

    def override() -> None:
        layer.hyper[2].forward = lambda h: 2 * h

    with torch.no_grad():
        for change in (lambda: None, load, write, activate, hook, override):
            change()
            expected = [flow().transform.inv(z), flow().log_prob(z)]
            with convert(flow):
                agree([flow().transform.inv(z), flow().log_prob(z)], expected)
    train()
    expected = [flow().transform.inv(z)]
    with convert(flow):
        agree([flow().transform.inv(z)], expected)


def test_each_parameter_may_be_written_to_through_data() -> None:
    """Which moves no version: every weight and bias is looked at."""
    flow = zuko.flows.MAF(4, transforms=1, hidden_features=(12, 12))
    y = torch.randn(3, 4)
    with torch.no_grad():
        for parameter in flow.parameters():
            with convert(flow):
                before = flow().transform.inv(y)
                parameter.data.mul_(1.5).add_(0.1)
                after = flow().transform.inv(y)
            assert not torch.equal(after, before)
            agree([after], [flow().transform.inv(y)])


@pytest.mark.parametrize("features, context", [(5, 3), (3, 3), (4, 2), (4, None)])
def test_wrong_shapes_are_zukos_errors(features: int, context: int | None) -> None:
    flow = zuko.flows.MAF(4, 3, transforms=1)
    y, c = torch.randn(2, features), None if context is None else torch.randn(2, context)
    with pytest.raises(Exception) as theirs:
        flow(c).transform.inv(y)
    with convert(flow), pytest.raises(theirs.type):
        flow(c).transform.inv(y)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: zuko.flows.NCSF(3), "its passes stay: the sweep does not know circular splines"),
        (
            lambda: zuko.flows.MAF(3, activation=nn.Softsign),
            "its passes stay: its activation Softsign() is not one of pygen's",
        ),
    ],
)
def test_an_inverse_without_a_sweep_takes_zukos_passes_and_is_named(make: Callable[..., Any], reason: str) -> None:
    flow = make()
    torch.manual_seed(0)
    expected = flow().rsample_and_log_prob((4,))
    handle = convert(flow)
    assert {line.reason for line in handle.left} == {reason}
    torch.manual_seed(0)
    agree(flow().rsample_and_log_prob((4,)), expected)
    handle.undo()
    assert type(flow.transform.transforms[0]) is zuko.flows.MaskedAutoregressiveTransform


@pytest.mark.parametrize("how", ["convert", "patch"])
@pytest.mark.parametrize("name", FLOWS)
def test_distributions_stay_zukos(how: str, name: str) -> None:
    flow = FLOWS[name](4, 3)
    c = torch.randn(2, 3)

    def describe() -> list[Any]:
        with torch.no_grad():
            q = flow(c)
            x = q.sample((5,))
            transform = q.transform
            constraints = [transform.domain, transform.codomain, transform.inv.domain]
            return [
                repr(flow), q.batch_shape, q.event_shape, q.expand((6, 2)).sample().shape, x.shape, q.log_prob(x).shape,
                q.log_prob(x[0]).shape, x.requires_grad, transform.bijective, q.has_rsample,
                *((type(constraint), constraint.event_dim) for constraint in constraints),
            ]  # fmt: skip

    expected = describe()
    with _replace(how, flow):
        assert describe() == expected


@pytest.mark.parametrize("name", FLOWS)
def test_state_dicts_go_both_ways(name: str) -> None:
    torch.manual_seed(1)
    theirs = FLOWS[name](4, 0)
    torch.manual_seed(2)
    ours = FLOWS[name](4, 0)
    parameters = dict(ours.named_parameters())
    with convert(ours):
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(parameters[key] is value for key, value in ours.named_parameters())
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(3, 4)
        agree([ours().log_prob(x)], [theirs().log_prob(x)])
        fresh = FLOWS[name](4, 0)
        fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh().log_prob(x), theirs().log_prob(x))


@pytest.mark.parametrize("name", FLOWS)
def test_converted_flows_pickle_and_copy(name: str) -> None:
    flow = FLOWS[name](4, 0)
    convert(flow)
    x = torch.randn(3, 4)
    for same in (pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow)):
        assert [type(layer) for layer in same.modules()] == [type(layer) for layer in flow.modules()]
        assert torch.equal(same().log_prob(x), flow().log_prob(x))


def test_training_with_adam_ends_where_zuko_ends() -> None:
    data = torch.randn(64, 4)
    ends = []
    for replace in (False, True):
        torch.manual_seed(3)
        flow = FLOWS["NSF"](4, 0)
        optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
        handle = convert(flow) if replace else None
        for _ in range(20):
            loss = -flow().log_prob(data).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(loss)
        if handle is not None:
            handle.undo()
    agree(ends[1:], ends[:1], scale=10)


def test_convert_lists_what_it_replaced_and_takes_it_back() -> None:
    flow = FLOWS["linear"](4, 0)
    before = {name: (type(layer), dict(vars(layer))) for name, layer in flow.named_modules()}
    handle = convert(flow)
    assert {place for line in handle.replaced for place in line.places} == {
        "transform.transforms.0", "transform.transforms.1", "transform.transforms.2",
    }  # fmt: skip
    assert [(line.places, line.reason) for line in handle.left] == [
        (("transform.transforms.3",), "no kernel for RotationTransform")
    ]
    handle.undo()
    assert {name: (type(layer), dict(vars(layer))) for name, layer in flow.named_modules()} == before


def test_patch_restores_every_attribute() -> None:
    modules = (zuko.transforms, zuko.lazy, zuko.nn, zuko.distributions, zuko.flows.autoregressive, zuko.flows.coupling,
               zuko.flows.gaussianization, zuko.flows.spline)  # fmt: skip
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}

    def read() -> dict[Any, dict[str, Any]]:
        return {owner: dict(vars(owner)) for owner in (*modules, *classes)}

    before = read()
    with patch() as outer, patch():
        assert read() != before
    assert not outer.active
    assert read() == before


@pytest.mark.parametrize(
    "make, reason",
    [
        (zuko.flows.NAF, "no kernel for the univariate transform MNN of parameters (16,)"),
        (zuko.flows.UNAF, "no kernel for the univariate transform UMNN of parameters (16,), ()"),
        (zuko.flows.SOSPF, "no kernel for the univariate transform ShiftedSOSPTransform of parameters (3, 5), ()"),
        (zuko.flows.BPF, "no kernel for the univariate transform BoundedBernsteinTransform of parameters (17,)"),
        (zuko.flows.GF, "no kernel for the univariate transform GaussianizationTransform of parameters (8,), (8,)"),
        (zuko.flows.CNF, "no kernel for FFJTransform"),
    ],
)
def test_what_has_no_kernel_is_left_and_named(make: Callable[..., nn.Module], reason: str) -> None:
    flow = make(3)
    x = torch.randn(2, 3)
    before = flow().log_prob(x)
    handle = convert(flow)
    assert not handle.replaced
    assert reason in {line.reason for line in handle.left}
    assert reason in repr(handle)
    assert torch.equal(flow().log_prob(x), before)
    with patch():
        agree([flow().log_prob(x)], [before])


def test_a_derived_layer_is_left_and_named() -> None:
    class Mine(zuko.flows.MaskedAutoregressiveTransform):
        def meta(self, c: Any, x: Tensor) -> Any:
            return DependentTransform(MonotonicAffineTransform(torch.ones_like(x), torch.zeros_like(x)), 1)

    layer = Mine(3)
    x = torch.randn(2, 3)
    handle = convert(layer)
    assert type(layer) is Mine
    assert "subclass of MaskedAutoregressiveTransform" in handle.left[0].reason
    with patch():
        assert torch.equal(layer()(x), x + 1)
        assert torch.equal(layer().inv(x), x - 1)


def test_a_derived_transform_stays_as_it_is_under_patch() -> None:
    class Mine(MonotonicRQSTransform):
        def bin(self, k: Tensor) -> Any:
            raise LookupError

    with patch(), pytest.raises(LookupError):
        Mine(torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 7))(torch.zeros(3))


def test_transforms_outlive_the_patch_and_precede_it() -> None:
    before, x = _spline(4), torch.randn(3, 4)
    flow = FLOWS["element-wise"](4, 0)
    expected = flow().log_prob(x)
    with patch():
        y = before(x)
        during, q = _spline(4), flow()
        inside = during(x)
    assert type(before) is MonotonicRQSTransform
    assert torch.equal(before(x), y)
    assert torch.equal(during(x), inside)
    assert during.horizontal.shape == (4, 9)
    agree([q.log_prob(x)], [expected])
    q.sample((2,))


def test_bayesian_models_sample_and_reparameterize() -> None:
    model = zuko.bayesian.BayesianModel(FLOWS["MAF"](3, 0), init_logvar=-3.0)
    x = torch.randn(4, 3)
    for trick in (False, True):

        def observe(trick: bool = trick) -> list[Tensor]:
            torch.manual_seed(5)
            with model.reparameterize(local_trick=trick) as flow:
                q = flow()
                log_prob = q.log_prob(x)
                torch.manual_seed(6)
                return [log_prob, q.rsample((4,))]

        expected = observe()
        with patch():
            agree(observe(), expected)


def test_functional_transforms_and_calls() -> None:
    flow = FLOWS["NSF"](4, 0)
    x = torch.randn(3, 4)

    def density(x: Tensor) -> Tensor:
        return flow().log_prob(x)

    expected = [torch.func.vmap(density)(x), torch.func.vmap(torch.func.grad(density))(x)]
    halved = {name: 0.5 * value.detach() for name, value in flow.transform.named_parameters()}
    with torch.no_grad():
        torch.manual_seed(0)
        expected.append(torch.func.functional_call(flow.transform, halved, ()).call_and_ladj(x)[0])
    with convert(flow), torch.no_grad():
        ours = [torch.func.vmap(density)(x), torch.func.vmap(torch.func.grad(density))(x)]
        ours.append(torch.func.functional_call(flow.transform, halved, ()).call_and_ladj(x)[0])
        agree(ours, expected)


def test_the_jacobian_of_a_flow_has_its_log_determinant() -> None:
    flow = FLOWS["NSF"](3, 0).double()
    convert(flow)
    x = torch.randn(3, dtype=torch.float64)
    for transform in (flow().transform, flow().transform.inv):
        jacobian = torch.autograd.functional.jacobian(transform, x)
        agree([jacobian.slogdet().logabsdet], [transform.call_and_ladj(x)[1]])


def test_compiles() -> None:
    parts, x = [torch.randn(4, count) for count in (8, 8, 7)], torch.randn(4)

    def theirs(x: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        return MonotonicRQSTransform(*parts).call_and_ladj(x)

    def ours(x: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        return transforms.MonotonicRQSTransform(*parts).call_and_ladj(x)

    expected = theirs(x, *parts)
    with patch():
        agree(torch.compile(theirs, backend="eager", fullgraph=True)(x, *parts), expected)
    agree(torch.compile(ours, backend="aot_eager", fullgraph=True)(x, *parts), expected)
    flow = FLOWS["MAF"](4, 0)
    expected = flow().log_prob(x)
    with convert(flow):
        agree([torch.compile(lambda x: flow().log_prob(x), backend="eager")(x)], [expected])


def test_convert_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="model is a zuko.distributions.NormalizingFlow"):
        convert(zuko.flows.MAF(3)())
