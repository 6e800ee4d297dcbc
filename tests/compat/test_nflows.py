"""nflows with pygen's kernels against nflows: results, gradients, errors, state dicts, training, and the way back."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nflows import distributions, flows, transforms
from nflows.nn.nde import made as nde_made
from nflows.nn.nets import ConvResidualNet, ResidualNet
from nflows.transforms import splines
from nflows.transforms.base import InputOutsideDomain
from parity import assert_same, attributes, compare, error, results, state
from torch import Tensor, nn
from torch.nn import functional as F

from pygen.compat import nflows as drop_in

USES = {"convert": drop_in.convert, "patch": lambda model: drop_in.patch()}

uses = st.sampled_from(sorted(USES))
methods = st.sampled_from(["forward", "inverse"])
sizes = st.integers(1, 9)
bins = st.integers(2, 12)
seeds = st.integers(0, 2**31)
tails = st.sampled_from([None, "linear"])

COUPLINGS = {
    "linear": transforms.PiecewiseLinearCouplingTransform,
    "quadratic": transforms.PiecewiseQuadraticCouplingTransform,
    "cubic": transforms.PiecewiseCubicCouplingTransform,
    "rational quadratic": transforms.PiecewiseRationalQuadraticCouplingTransform,
}
CDFS = {
    "linear": transforms.PiecewiseLinearCDF,
    "quadratic": transforms.PiecewiseQuadraticCDF,
    "cubic": transforms.PiecewiseCubicCDF,
    "rational quadratic": transforms.PiecewiseRationalQuadraticCDF,
}
AUTOREGRESSIVE = {
    "affine": transforms.MaskedAffineAutoregressiveTransform,
    "linear": transforms.MaskedPiecewiseLinearAutoregressiveTransform,
    "quadratic": transforms.MaskedPiecewiseQuadraticAutoregressiveTransform,
    "cubic": transforms.MaskedPiecewiseCubicAutoregressiveTransform,
    "rational quadratic": transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
}
# nflows finds the inverse of these by formulas that lose digits: the linear one widens its last bin by 1e-6, the cubic
# one leaves the cubic term out where it is below 1e-3.
ROUGH = {"linear": 1e-3, "cubic": 1e-2}


class Plain(nn.Module):
    """A conditioner that tells no hidden features, and ignores the context."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.linear(x)


def scatter(model: nn.Module, size: float = 0.5) -> nn.Module:
    """Parameters of ordinary size, where construction leaves zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, size)
    return model.double()


def a_mask(features: int, kind: str) -> Tensor:
    mask = torch.zeros(features)
    if kind == "alternating":
        mask[1::2] = 1
    elif kind == "halves":
        mask[features // 2 :] = 1
    else:
        mask[torch.randperm(features)[: features // 2]] = 1
    return mask


def a_net(kind: str, context_features: int | None) -> Callable[[int, int], nn.Module]:
    def make(inputs: int, outputs: int) -> nn.Module:
        if kind == "plain":
            return Plain(inputs, outputs)
        return ResidualNet(inputs, outputs, hidden_features=7, context_features=context_features, num_blocks=1)

    return make


def inputs_for(shape: tuple[int, ...], tails: str | None, bound: float, *, wide: float = 1.5) -> Tensor:
    """On both sides of the bound where there are tails, and at it; inside of the unit interval where there are not."""
    if tails is None:
        return torch.rand(shape, dtype=torch.float64)
    x = (torch.rand(shape, dtype=torch.float64) * 2 - 1) * bound * wide
    if x.numel() > 1:
        x.view(-1)[0] = 2 * bound
    return x


@given(
    use=uses, method=methods, rows=sizes, features=st.integers(2, 9), additive=st.booleans(), seed=seeds,
    split=st.sampled_from(["alternating", "halves", "random"]), with_context=st.booleans(),
)  # fmt: skip
def test_affine_coupling(use, method, rows, features, additive, seed, split, with_context):
    torch.manual_seed(seed)
    cls = transforms.AdditiveCouplingTransform if additive else transforms.AffineCouplingTransform
    layer = scatter(cls(a_mask(features, split), a_net("residual", 3 if with_context else None)))
    context = torch.randn(rows, 3, dtype=torch.float64) if with_context else None
    compare(layer, USES[use], method, torch.randn(rows, features, dtype=torch.float64), context)


@given(
    use=uses, method=methods, spline=st.sampled_from(sorted(COUPLINGS)), rows=sizes, features=st.integers(2, 7),
    bins=bins, tails=tails, bound=st.floats(0.5, 5), alone=st.booleans(), seed=seeds,
    split=st.sampled_from(["alternating", "halves", "random"]), net=st.sampled_from(["plain", "residual"]),
)  # fmt: skip
def test_spline_coupling(use, method, spline, rows, features, bins, tails, bound, alone, seed, split, net):
    torch.manual_seed(seed)
    layer = scatter(
        COUPLINGS[spline](
            a_mask(features, split), a_net(net, None), num_bins=bins, tails=tails, tail_bound=bound,
            apply_unconditional_transform=alone,
        ),
        # In float32 pygen gives each bin of a linear spline 1e-14 of the height at least: 0.5 makes bins of less.
        0.3 if spline == "linear" else 0.5,
    )  # fmt: skip
    x = inputs_for((rows, features), tails, bound)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nflows', about conditioners that tell no hidden features
        compare_spline(layer, use, method, spline, x)


def compare_spline(
    layer: nn.Module, use: str, method: str, spline: str, x: Tensor, *more: Tensor | None, undo: str | None = None
) -> None:
    if method == "inverse" and spline in ROUGH:
        inverts(layer, USES[use], x, *more, tolerance=ROUGH[spline])
    else:
        compare(layer, USES[use], method, x, *more, undo=undo)


def inverts(
    layer: nn.Module, use: Callable[[nn.Module], Any], y: Tensor, *more: Tensor | None, tolerance: float
) -> None:
    """pygen's inverse, put through nflows' forward, is back at y; nflows' own inverse is near."""
    with torch.no_grad():
        near, near_ladj = layer.inverse(y, *more)
        with use(layer):
            x, ladj = layer.inverse(y, *more)
        back, there = layer(x, *more)
    assert error(back, y) < 1e-9
    assert error(there, -ladj) < 1e-8 * max(1.0, float(ladj.abs().max()))
    assert error(x, near) < tolerance and error(ladj, near_ladj) < 10 * tolerance


@given(
    use=uses, method=methods, spline=st.sampled_from(["affine", "rational quadratic", "quadratic"]),
    tails=tails, alone=st.booleans(), height=st.integers(1, 3), width=st.integers(1, 3), seed=seeds,
)  # fmt: skip
def test_coupling_of_pictures(use, method, spline, tails, alone, height, width, seed):
    torch.manual_seed(seed)

    def make(inputs: int, outputs: int) -> nn.Module:
        return ConvResidualNet(inputs, outputs, hidden_channels=5, num_blocks=1)

    if spline == "affine":
        layer = transforms.AffineCouplingTransform(a_mask(4, "alternating"), make)
    else:
        layer = COUPLINGS[spline](
            a_mask(4, "alternating"), make, num_bins=4, tails=tails, apply_unconditional_transform=alone,
            img_shape=[height, width],
        )  # fmt: skip
    x = inputs_for((2, 4, height, width), tails, 1.0)
    compare(scatter(layer), USES[use], method, x)


@given(
    use=uses, method=methods, spline=st.sampled_from(sorted(CDFS)), shape=st.lists(st.integers(1, 4), max_size=3),
    rows=sizes, bins=bins, tails=tails, bound=st.floats(0.5, 5), seed=seeds,
)  # fmt: skip
def test_elementwise_splines(use, method, spline, shape, rows, bins, tails, bound, seed):
    torch.manual_seed(seed)
    shape = shape or [1]
    layer = scatter(CDFS[spline](shape, num_bins=bins, tails=tails, tail_bound=bound))
    compare_spline(layer, use, method, spline, inputs_for((rows, *shape), tails, bound))


ACTIVATIONS = [F.relu, torch.tanh, F.leaky_relu, nn.ELU(), nn.Softplus(), F.silu, lambda h: h.sin()]


@given(
    use=uses, method=methods, spline=st.sampled_from(sorted(AUTOREGRESSIVE)), rows=sizes, features=st.integers(1, 6),
    hidden=st.integers(5, 16), blocks=st.integers(0, 2), residual=st.booleans(), random_mask=st.booleans(), tails=tails,
    with_context=st.booleans(), activation=st.sampled_from(ACTIVATIONS), norm=st.booleans(), seed=seeds,
)  # fmt: skip
def test_autoregressive(
    use, method, spline, rows, features, hidden, blocks, residual, random_mask, tails, with_context, activation, norm,
    seed,
):  # fmt: skip
    torch.manual_seed(seed)
    options: dict[str, Any] = {} if spline == "affine" else {"num_bins": 4}
    if spline in ("quadratic", "rational quadratic"):
        options |= {"tails": tails, "tail_bound": 2.0}
    else:
        tails = None
    layer = AUTOREGRESSIVE[spline](
        features=features, hidden_features=hidden, context_features=3 if with_context else None, num_blocks=blocks,
        use_residual_blocks=residual, random_mask=random_mask and not residual, activation=activation,
        use_batch_norm=norm, **options,
    )  # fmt: skip
    scatter(layer, 0.3).eval()
    for part in layer.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    x = (
        torch.randn(rows, features, dtype=torch.float64)
        if spline == "affine"
        else inputs_for((rows, features), tails, 2.0)
    )
    context = torch.randn(rows, 3, dtype=torch.float64) if with_context else None
    # In its inverse direction x is swept for, and its gradient is made of x.
    undo = "forward" if method == "inverse" and spline == "rational quadratic" else None
    compare_spline(layer, use, method, spline, x, context, undo=undo)


@given(use=uses, method=methods, rows=sizes, features=sizes, seed=seeds)
def test_lu_linear(use, method, rows, features, seed):
    torch.manual_seed(seed)
    layer = scatter(transforms.LULinear(features), 0.3)
    compare(layer, USES[use], method, torch.randn(rows, features, dtype=torch.float64))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_layers_with_their_cache(use, dtype):
    """nflows' own cache of the inverse is made in float32 alone."""
    vector, picture = scatter(transforms.LULinear(4), 0.3), scatter(transforms.OneByOneConvolution(4), 0.3)
    for layer, x in ((vector, torch.randn(5, 4)), (picture, torch.randn(2, 4, 3, 3))):
        layer, x = layer.to(dtype).eval(), x.to(dtype)
        expected = [*layer(x), *layer.inverse(x)]
        with USES[use](layer):
            layer.use_cache(True)
            for _ in range(2):
                assert_same([*layer(x), *layer.inverse(x)], expected, tolerance=2e-5)


@given(use=uses, method=methods, rows=st.integers(1, 3), channels=sizes, height=st.integers(1, 3), seed=seeds)
def test_one_by_one_convolution(use, method, rows, channels, height, seed):
    torch.manual_seed(seed)
    layer = scatter(transforms.OneByOneConvolution(channels), 0.3)
    compare(layer, USES[use], method, torch.randn(rows, channels, height, 2, dtype=torch.float64))


def parameters_for(spline: str, shape: tuple[int, ...], bins: int, tails: str | None) -> list[Tensor]:
    more = -1 if tails else 1
    counts = {
        "linear": [bins],
        "quadratic": [bins, bins + more],
        "cubic": [bins, bins, 1, 1],
        "rational_quadratic": [bins, bins, bins + more],
    }[spline]
    return [torch.randn(*shape, count, dtype=torch.float64) for count in counts]


class Functional(nn.Module):
    """A functional spline as a layer, so that it is compared like one. It looks the function up at each call."""

    def __init__(self, name: str, parameters: list[Tensor], options: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.options = name, options
        self.of_spline = nn.ParameterList(nn.Parameter(p) for p in parameters)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(splines, self.name)(x, *self.of_spline, inverse=False, **self.options)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(splines, self.name)(x, *self.of_spline, inverse=True, **self.options)


@given(
    method=methods, spline=st.sampled_from(["linear", "quadratic", "cubic", "rational_quadratic"]),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), bins=bins, tails=tails, bound=st.floats(0.5, 4),
    seed=seeds, corner=st.floats(-3, 3), size=st.floats(0.5, 4), other_corner=st.floats(-3, 3),
    other_size=st.floats(0.5, 4),
)  # fmt: skip
def test_functional_splines(method, spline, shape, bins, tails, bound, seed, corner, size, other_corner, other_size):
    torch.manual_seed(seed)
    if tails:
        name, options = f"unconstrained_{spline}_spline", {"tail_bound": bound}
        x = inputs_for(tuple(shape), tails, bound)
    else:
        name = f"{spline}_spline"
        # nflows tests the inputs of both directions against left and right, so both boxes are one for the inverse.
        if method == "inverse":
            other_corner, other_size = corner, size
        options = {"left": corner, "right": corner + size, "bottom": other_corner, "top": other_corner + other_size}
        x = corner + size * torch.rand(shape, dtype=torch.float64)
    layer = Functional(name, parameters_for(spline, tuple(shape), bins, tails), options)
    compare_spline(layer, "patch", method, spline, x)


@given(rows=sizes, bins=bins, method=methods, seed=seeds)
def test_quadratic_spline_with_end_heights_left_out(rows, bins, method, seed):
    torch.manual_seed(seed)
    parameters = parameters_for("quadratic", (rows,), bins + 1, "linear")
    layer = Functional("quadratic_spline", parameters, {"left": -1.0, "right": 2.0, "bottom": -1.0, "top": 2.0})
    compare(layer, USES["patch"], method, torch.rand(rows, dtype=torch.float64) * 3 - 1)


def test_one_bin_stays_with_nflows():
    layer = Functional("rational_quadratic_spline", parameters_for("rational_quadratic", (5,), 1, None), {})
    x = torch.rand(5, dtype=torch.float64)
    expected = results(layer, "forward", x)
    with drop_in.patch():
        assert_same(results(layer, "forward", x), expected, tolerance=0)


@pytest.mark.parametrize("min_derivative", [1e-3, 0.1])
def test_identity_initialisation_has_nflows_boundary_slope(min_derivative):
    """As nflows' later versions compute it: the parameter of slope 1 for a plain softplus, in one of another
    sharpness. With the default that is 1.294, where the tails need 1."""
    from pygen.compat.nflows import splines as ours

    bins, bound = 4, 2.0
    sharpness = math.log(2) / (1 - min_derivative)
    slope = min_derivative + float(
        F.softplus(torch.tensor(math.log(math.exp(1 - min_derivative) - 1), dtype=torch.float64), beta=sharpness)
    )
    if min_derivative == 1e-3:
        assert slope == pytest.approx(1.294, abs=1e-3)
    zeros = [torch.zeros(1, count, dtype=torch.float64) for count in (bins, bins, bins - 1)]
    _, ladj = ours.unconstrained_rational_quadratic_spline(
        torch.full((1,), -bound, dtype=torch.float64), *zeros, tail_bound=bound, min_derivative=min_derivative,
        enable_identity_init=True,
    )  # fmt: skip
    assert ladj.exp().item() == pytest.approx(slope, rel=1e-12)
    x = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64) * bound / bins
    y, ladj = ours.unconstrained_rational_quadratic_spline(
        x, *(zero.expand(7, -1) for zero in zeros), tail_bound=bound, min_derivative=min_derivative,
        enable_identity_init=True,
    )  # fmt: skip
    assert error(y, x) < 1e-12 and ladj.abs().max() < 1e-12


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("method", ["forward", "inverse"])
@pytest.mark.parametrize("outside", [-1e-3, 1.001])
def test_inputs_outside_of_a_bounded_spline(use, method, outside):
    x = torch.full((4, 3), 0.5)
    x[2, 1] = outside
    layers = [
        COUPLINGS["rational quadratic"](a_mask(3, "alternating"), a_net("residual", None), num_bins=4),
        CDFS["quadratic"]([3], num_bins=4),
        AUTOREGRESSIVE["rational quadratic"](features=3, hidden_features=8, num_bins=4),
        AUTOREGRESSIVE["cubic"](features=3, hidden_features=8, num_bins=4),
    ]
    for layer in layers:
        with USES[use](layer), pytest.raises(InputOutsideDomain):
            getattr(layer, method)(x)


@pytest.mark.parametrize("use", USES)
def test_bins_without_room_are_a_value_error(use):
    layer = COUPLINGS["rational quadratic"](a_mask(4, "halves"), a_net("residual", None), 20, min_bin_width=0.1)
    with USES[use](layer), pytest.raises(ValueError):
        layer(torch.rand(3, 4))


@pytest.mark.parametrize("use", USES)
def test_unknown_tails_stay_an_error(use):
    layer = COUPLINGS["rational quadratic"](
        a_mask(4, "halves"), lambda i, o: Plain(i, 2 * (3 * 5 + 1)), 5, tails="cubic"
    )
    with warnings.catch_warnings(), USES[use](layer):
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="tails"):
            layer(torch.rand(3, 4))


@pytest.mark.parametrize("use", USES)
def test_wrong_shapes_are_value_errors(use):
    layer = transforms.AffineCouplingTransform(a_mask(4, "halves"), a_net("residual", None))
    with USES[use](layer):
        for shape in ((2, 5), (2, 4, 3)):
            with pytest.raises(ValueError):
                layer(torch.rand(shape))
            with pytest.raises(ValueError):
                layer.inverse(torch.rand(shape))


@pytest.mark.parametrize("use", USES)
def test_what_nflows_asserts_on_data_is_computed(use):
    """Large parameters make nflows' discriminant negative by rounding; its assert ends the program (issue 87)."""
    torch.manual_seed(0)
    layer = CDFS["rational quadratic"]([64], num_bins=8, tails="linear", tail_bound=3.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 100)
    y = torch.linspace(-3, 3, 64).expand(256, 64).contiguous()
    with USES[use](layer):
        x, ladj = layer.inverse(y.requires_grad_())
        (x.sum() + ladj.sum()).backward()
    assert x.isfinite().all() and ladj.isfinite().all() and y.grad.isfinite().all()


def spline_flow(features: int = 5, layers: int = 3) -> flows.Flow:
    parts: list[nn.Module] = []
    for index in range(layers):
        parts += [
            transforms.RandomPermutation(features),
            transforms.LULinear(features, identity_init=False),
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                a_mask(features, "alternating" if index % 2 else "halves"), a_net("residual", None), num_bins=6,
                tails="linear", tail_bound=3.0, apply_unconditional_transform=True,
            ),
        ]  # fmt: skip
    return flows.Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([features]))


FLOWS = {
    "spline": spline_flow,
    "RealNVP": lambda: flows.SimpleRealNVP(5, 8, 3, 1),
    "MAF": lambda: flows.MaskedAutoregressiveFlow(5, 16, 3, 2),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", FLOWS)
def test_training_takes_the_same_steps(use, kind):
    model = FLOWS[kind]().double()
    other = copy.deepcopy(model)
    batches = torch.randn(5, 32, 5, dtype=torch.float64)

    def train(model: flows.Flow) -> list[Tensor]:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for x in batches:
            optimizer.zero_grad()
            (-model.log_prob(x).mean()).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected = train(other)
    with USES[use](model):
        assert_same(train(model), expected, tolerance=1e-6)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", FLOWS)
def test_samples_are_the_same(use, kind):
    model = FLOWS[kind]().eval()
    with torch.no_grad():
        torch.manual_seed(3)
        x, log_prob = model.sample_and_log_prob(20)
        with USES[use](model):
            torch.manual_seed(3)
            assert_same(list(model.sample_and_log_prob(20)), [x, log_prob], tolerance=1e-5)
            assert_same([model.log_prob(x)], [log_prob], tolerance=1e-5)


def test_samples_with_a_context_are_the_same():
    maf = transforms.MaskedAffineAutoregressiveTransform(4, 12, context_features=2)
    model = flows.Flow(transforms.InverseTransform(maf), distributions.StandardNormal([4]))
    context = torch.randn(3, 2)
    torch.manual_seed(3)
    expected = model.sample(5, context), model.log_prob(torch.ones(3, 4), context)
    with drop_in.convert(model):
        torch.manual_seed(3)
        ours = model.sample(5, context), model.log_prob(torch.ones(3, 4), context)
    assert_same(list(ours), list(expected), tolerance=1e-5)


@pytest.mark.parametrize("kind", FLOWS)
def test_state_dicts_go_both_ways(kind):
    model, fresh, back = FLOWS[kind](), FLOWS[kind](), FLOWS[kind]()
    x = torch.randn(7, 5)
    expected = model.log_prob(x)
    saved = copy.deepcopy(model.state_dict())
    parameters = list(fresh.parameters())
    drop_in.convert(fresh)
    assert list(fresh.state_dict()) == list(saved)
    fresh.load_state_dict(saved)
    assert all(p is q for p, q in zip(fresh.parameters(), parameters, strict=True))
    assert_same([fresh.log_prob(x)], [expected], tolerance=1e-5)
    back.load_state_dict(fresh.state_dict())
    assert torch.equal(back.log_prob(x), expected)


def test_mask_that_is_loaded_is_used():
    """Masks are buffers: a state dict may bring others than the layer was made with."""
    first, second = (
        transforms.AffineCouplingTransform(mask, a_net("residual", None)) for mask in ([0, 1, 0, 1], [1, 0, 1, 0])
    )
    x = torch.randn(3, 4)
    with drop_in.convert(first):
        first(x)
        first.load_state_dict(second.state_dict())
        assert_same(list(first(x)), list(second(x)), tolerance=1e-5)
    mafs = [
        transforms.MaskedAffineAutoregressiveTransform(4, 9, use_residual_blocks=False, random_mask=True)
        for _ in range(2)
    ]
    with torch.no_grad(), drop_in.convert(mafs[0]):
        mafs[0].inverse(x)
        mafs[0].load_state_dict(mafs[1].state_dict())
        assert_same(list(mafs[0].inverse(x)), list(mafs[1].inverse(x)), tolerance=1e-5)


@pytest.mark.parametrize("write", ["in place", "data", "optimizer", "load"])
def test_kept_weights_follow_the_parameters(write):
    """In evaluation masked weights are kept, until they change, however that is done."""
    maf = transforms.MaskedAffineAutoregressiveTransform(4, 12).eval()
    other = transforms.MaskedAffineAutoregressiveTransform(4, 12).eval()
    x = torch.randn(5, 4)
    with drop_in.convert(maf):
        with torch.no_grad():
            maf(x), maf.inverse(x)
            for p, q in zip(maf.parameters(), other.parameters(), strict=True):
                if write == "in place":
                    p.copy_(q)
                elif write == "data":
                    p.data.copy_(q)
        if write == "optimizer":
            optimizer = torch.optim.SGD(maf.parameters(), 0.5)
            maf(x)[1].sum().backward()
            optimizer.step()
            other.load_state_dict(maf.state_dict())
        if write == "load":
            maf.load_state_dict(other.state_dict())
        with torch.no_grad():
            assert_same(list(maf(x)), list(other(x)), tolerance=1e-5)
            assert_same(list(maf.inverse(x)), list(other.inverse(x)), tolerance=1e-5)


def test_kept_weights_of_inference_mode_serve_training():
    maf = transforms.MaskedAffineAutoregressiveTransform(4, 12).eval()
    x = torch.randn(5, 4)
    with drop_in.convert(maf):
        with torch.inference_mode():
            maf(x), maf.inverse(x)
        y, ladj = maf(x)
        x_again, _ = maf.inverse(y)
        (x_again.sum() + ladj.sum()).backward()
    assert all(p.grad is not None for p in maf.parameters())


@pytest.mark.parametrize("part", ["dropout", "batch norm"])
def test_inverse_of_what_is_random_in_training_is_nflows(part):
    maf = transforms.MaskedAffineAutoregressiveTransform(
        4, 12, dropout_probability=0.5 * (part == "dropout"), use_batch_norm=part == "batch norm"
    )
    y = torch.randn(6, 4)
    expected = copy.deepcopy(maf)
    torch.manual_seed(1)
    theirs = expected.inverse(y)
    with drop_in.convert(maf):
        torch.manual_seed(1)
        assert_same(list(maf.inverse(y)), list(theirs), tolerance=1e-4)


def test_convert_lists_what_it_replaced_and_what_it_left():
    class Loud(transforms.AffineCouplingTransform):
        def _scale_and_shift(self, transform_params):
            scale, shift = super()._scale_and_shift(transform_params)
            return 2 * scale, shift

    loud = Loud(a_mask(4, "halves"), a_net("residual", None))
    model = nn.ModuleList([
        transforms.CompositeTransform([transforms.RandomPermutation(4), loud]),
        transforms.AffineCouplingTransform(a_mask(4, "halves"), a_net("residual", None)),
        transforms.AffineCouplingTransform(a_mask(4, "halves"), a_net("residual", None)),
        transforms.PiecewiseRationalQuadraticCDF([4], num_bins=200),
        COUPLINGS["linear"](a_mask(4, "halves"), a_net("residual", None), num_bins=1),
        transforms.MaskedAffineAutoregressiveTransform(4, 8, activation=torch.cos),
    ])  # fmt: skip
    handle = drop_in.convert(model)
    replaced = {line.name.rpartition(".")[2]: line for line in handle.replaced}
    left = {line.name.rpartition(".")[2]: line for line in handle.left}
    assert replaced["AffineCouplingTransform"].places == ("1", "2")
    assert replaced["AffineCouplingTransform"].by == "pygen.compat.nflows.coupling.AffineCoupling"
    assert "subclass of AffineCouplingTransform" in left[f"{Loud.__qualname__}".rpartition(".")[2]].reason
    assert left["RandomPermutation"].places == ("0._transforms.0",)
    assert "1 bins" in left["PiecewiseLinearCouplingTransform"].reason
    assert "200 bins" in left["PiecewiseRationalQuadraticCDF"].reason
    (inverse,) = (line for line in handle.left if line.name.endswith("MaskedAffineAutoregressiveTransform.inverse"))
    assert "activation cos" in inverse.reason and inverse.places == ("5",)
    assert "MaskedAffineAutoregressiveTransform" in replaced
    again = drop_in.convert(model)
    assert not again.replaced and any("already" in line.reason for line in again.left)
    again.undo()
    assert type(model[1]) is not transforms.AffineCouplingTransform
    handle.undo()
    assert type(model[1]) is transforms.AffineCouplingTransform


def test_patch_leaves_a_subclass_what_it_changed():
    class Loud(transforms.AffineCouplingTransform):
        def _scale_and_shift(self, transform_params):
            scale, shift = super()._scale_and_shift(transform_params)
            return 2 * scale, shift

    layer = Loud(a_mask(4, "halves"), a_net("residual", None))
    x = torch.randn(3, 4)
    expected = layer(x)
    with drop_in.patch():
        assert_same(list(layer(x)), list(expected), tolerance=0)


def test_convert_of_one_layer_and_of_something_else():
    layer = transforms.AffineCouplingTransform(a_mask(4, "halves"), a_net("residual", None))
    with drop_in.convert(layer) as handle:
        assert handle.replaced[0].places == ("",)
        assert isinstance(layer, transforms.AffineCouplingTransform)
    assert not drop_in.convert(nn.Linear(2, 2)).replaced
    with pytest.raises(TypeError, match="model is a builtins.int"):
        drop_in.convert(3)


def test_undo_of_convert_leaves_every_attribute_as_it_was():
    model = nn.ModuleList([make() for make in FLOWS.values()])
    for flow in model:
        flow.sample(2)
    before = state(model)
    handle = drop_in.convert(model)
    assert state(model) != before
    for flow in model:
        flow.eval()
        flow.sample(2)
        flow.log_prob(torch.randn(2, 5)).sum().backward()
        flow.train()
    model.zero_grad()
    handle.undo()
    assert state(model) == before


def test_undo_of_patch_leaves_every_attribute_as_it_was():
    before = attributes("nflows")
    handle = drop_in.patch()
    assert len(attributes("nflows").items() ^ before.items()) > 40
    handle.undo()
    assert attributes("nflows") == before


def test_patch_reaches_functions_imported_by_name():
    from nflows.transforms import autoregressive

    x, parameters = torch.rand(4), [torch.randn(4, count) for count in (5, 5, 6)]
    with drop_in.patch() as handle:
        assert autoregressive.rational_quadratic_spline is splines.rational_quadratic_spline
        assert splines.rational_quadratic_spline(x, *parameters)[0].shape == (4,)
    (line,) = (line for line in handle.replaced if line.name.endswith(".rational_quadratic_spline"))
    assert "nflows.transforms.autoregressive.rational_quadratic_spline" in line.places


@pytest.mark.parametrize("kind", FLOWS)
def test_converted_models_are_copied_and_pickled(kind):
    model = FLOWS[kind]().eval()
    x = torch.randn(4, 5)
    drop_in.convert(model)
    model.log_prob(x), model.sample(2)
    expected = model.log_prob(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.log_prob(x), expected)
        other.sample(2)


def test_hooks_and_order_of_modules_stay():
    model = spline_flow()
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    names = [name for name, _ in model.named_modules()]
    x = torch.randn(2, 5)
    model.log_prob(x)
    before = list(seen)
    seen.clear()
    drop_in.convert(model)
    model.log_prob(x)
    assert seen == before
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("use", USES)
def test_a_flow_compiles_to_one_graph(use):
    """nflows' own is cut into several."""
    model = spline_flow(features=4, layers=1)
    x = torch.randn(3, 4)
    expected = model.log_prob(x)
    torch.compiler.reset()
    with USES[use](model):
        compiled = torch.compile(lambda x: model.log_prob(x), backend="aot_eager", fullgraph=True)
        assert_same([compiled(x)], [expected], tolerance=1e-5)


def test_density_made_keeps_its_masked_weights():
    made = nde_made.MixtureOfGaussiansMADE(3, 12, num_mixture_components=2).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = made.log_prob(x)
    with drop_in.convert(made) as handle:
        assert handle.replaced
        assert_same([made.log_prob(x)], [expected])
