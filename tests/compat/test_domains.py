"""Inputs outside of a spline's domain: with a drop-in the error, or the result, is the library's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nflows.transforms.splines
import normflows
import pytest
import torch
import zuko
from normflows.flows.neural_spline import autoregressive, coupling
from torch import Tensor

import pygen.compat.nflows
import pygen.compat.normflows
import pygen.compat.zuko

BINS = 5
# In the domain and the image of the tests, in one of them, in none.
VALUES = (-9.0, -2.0, -0.5, 1.4, 2.5, 9.0)
BOXES: dict[str, dict[str, float]] = {
    "apart": {"left": -1.0, "right": 2.0, "bottom": -2.5, "top": 1.0},
    "alike": {"left": -1.0, "right": 2.0, "bottom": -1.0, "top": 2.0},
    "unit": {},
}


def outcome(call: Callable[..., Any], x: Tensor, **options: Any) -> Any:
    """The type of the error, or y."""
    try:
        return call(x, **options)[0]
    except Exception as error:
        return type(error)


def same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        assert ours is theirs


def parameters(*counts: int) -> list[Tensor]:
    return [torch.randn(1, count, dtype=torch.float64) for count in counts]


BOUNDED = {
    "linear_spline": (BINS,),
    "quadratic_spline": (BINS, BINS + 1),
    "cubic_spline": (BINS, BINS, 1, 1),
    "rational_quadratic_spline": (BINS, BINS, BINS + 1),
}
WITH_TAILS = {
    "unconstrained_linear_spline": (BINS,),
    "unconstrained_quadratic_spline": (BINS, BINS - 1),
    "unconstrained_cubic_spline": (BINS, BINS, 1, 1),
    "unconstrained_rational_quadratic_spline": (BINS, BINS, BINS - 1),
}
FUNCTIONS = [("nflows", name, counts, box) for name, counts in BOUNDED.items() for box in BOXES]
FUNCTIONS += [("nflows", name, counts, "unit") for name, counts in WITH_TAILS.items()]
FUNCTIONS += [("normflows", "rational_quadratic_spline", BOUNDED["rational_quadratic_spline"], box) for box in BOXES]
FUNCTIONS += [("normflows", name, counts, "unit") for name, counts in WITH_TAILS.items() if "rational" in name]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("library, name, counts, box", FUNCTIONS)
def test_functions(library: str, name: str, counts: tuple[int, ...], box: str, inverse: bool) -> None:
    module: Any = nflows.transforms.splines if library == "nflows" else normflows.utils.splines
    patch = pygen.compat.nflows.patch if library == "nflows" else pygen.compat.normflows.patch
    of_spline = parameters(*counts)
    found = []
    for value in VALUES:
        x = torch.tensor([value], dtype=torch.float64)

        def call(x: Tensor, **options: Any) -> Any:
            return getattr(module, name)(x, *of_spline, **options)

        theirs = outcome(call, x, inverse=inverse, **BOXES[box])
        with patch():
            same(outcome(call, x, inverse=inverse, **BOXES[box]), theirs)
        found.append(isinstance(theirs, type))
    assert any(found) is (name in BOUNDED)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("make", [
    lambda: zuko.transforms.MonotonicRQSTransform(*parameters(BINS, BINS, BINS - 1), bound=1.0),
    lambda: zuko.flows.spline.CircularRQSTransform(*parameters(BINS, BINS, BINS - 1)),
], ids=["MonotonicRQSTransform", "CircularRQSTransform"])  # fmt: skip
def test_transforms_of_zuko(make: Callable[[], Any], inverse: bool) -> None:
    """None has a domain that ends: outside is the identity, or once more around."""
    x = torch.tensor([[value] for value in VALUES], dtype=torch.float64)
    found = []
    for patch in (None, pygen.compat.zuko.patch):
        torch.manual_seed(0)
        with patch() if patch else torch.enable_grad():
            transform = make()
            found.append((transform.inv if inverse else transform).call_and_ladj(x))
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs)


LAYERS: dict[str, Callable[[], Any]] = {
    "elementwise": lambda: coupling.PiecewiseRationalQuadraticCDF([2], BINS, identity_init=False),
    "coupling": lambda: coupling.PiecewiseRationalQuadraticCoupling(
        torch.tensor([0, 1]), lambda i, o: normflows.nets.MLP([i, 6, o]), BINS
    ),
    "autoregressive": lambda: autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive(
        2, 6, num_bins=BINS, init_identity=False
    ),
}


@pytest.mark.parametrize("use", ["convert", "patch"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_normflows(kind: str, inverse: bool, use: str) -> None:
    layer = LAYERS[kind]()
    if kind == "coupling":
        forward, conditioner = layer.transform_net.forward, layer.transform_net
        conditioner.forward = lambda x, context=None: forward(x)
    call = layer.inverse if inverse else layer
    for values in ((0.5, 0.5), (0.5, -0.1), (0.5, 1.1), (0.0, 1.0)):
        x = torch.tensor([values])
        theirs = outcome(call, x)
        assert isinstance(theirs, type) == (values[1] in (-0.1, 1.1))
        handle = pygen.compat.normflows.convert(layer) if use == "convert" else pygen.compat.normflows.patch()
        with handle:
            call = layer.inverse if inverse else layer
            same(outcome(call, x), theirs)
        call = layer.inverse if inverse else layer


def test_bounded_splines_of_normflows_are_traced_and_mapped() -> None:
    of_spline = parameters(BINS, BINS, BINS + 1)

    def call(x: Tensor) -> Tensor:
        return normflows.utils.splines.rational_quadratic_spline(x, *(part[0] for part in of_spline))[0]

    x = torch.rand(7, dtype=torch.float64)
    with pygen.compat.normflows.patch():
        expected = torch.stack([call(each) for each in x])
        torch.testing.assert_close(torch.func.vmap(call)(x), expected)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x[0]), expected[0])
        with pytest.raises(RuntimeError):
            compiled(x[0] - 2)
