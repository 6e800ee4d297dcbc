"""normflows with pygen's kernels against normflows: results, gradients, errors, state dicts, training, the way back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import normflows as nf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from normflows.flows.neural_spline import autoregressive as spline_autoregressive
from normflows.flows.neural_spline import coupling as spline_coupling
from normflows.utils import splines
from parity import assert_same, attributes, compare, error, results, state
from torch import Tensor, nn

from pygen.compat import normflows as drop_in

USES = {"convert": drop_in.convert, "patch": lambda model: drop_in.patch()}

uses = st.sampled_from(sorted(USES))
methods = st.sampled_from(["forward", "inverse"])
sizes = st.integers(1, 9)
bins = st.integers(2, 12)
seeds = st.integers(0, 2**31)
scale_maps = st.sampled_from(["exp", "sigmoid", "sigmoid_inv"])
split_modes = st.sampled_from(["channel", "channel_inv", "checkerboard", "checkerboard_inv"])


class Joined(nn.Module):
    """A flow on two tensors as one on their concatenation, so that it is compared like the others."""

    def __init__(self, flow: nn.Module, first: int) -> None:
        super().__init__()
        self.flow, self.first = flow, first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._join(self.flow, x)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._join(self.flow.inverse, x)

    def _join(self, call: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        z, ladj = call([x[:, : self.first], x[:, self.first :]])
        return torch.cat(z, 1), ladj


def scatter(model: nn.Module, size: float = 0.5) -> nn.Module:
    """Parameters of ordinary size, where construction leaves zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, size)
    return model.double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def around(shape: tuple[int, ...], bound: float | Tensor, *, wide: float = 1.4) -> Tensor:
    """On both sides of the bound."""
    return (torch.rand(shape, dtype=torch.float64) * 2 - 1) * bound * wide


@given(
    use=uses, method=methods, rows=sizes, kept=sizes, moved=sizes, scale=st.booleans(), scale_map=scale_maps, seed=seeds
)
def test_affine_coupling(use, method, rows, kept, moved, scale, scale_map, seed):
    torch.manual_seed(seed)
    flow = nf.flows.AffineCoupling(nf.nets.MLP([kept, 7, (1 + scale) * moved]), scale, scale_map)
    compare(Joined(scatter(flow), kept), USES[use], method, randn(rows, kept + moved))


@given(
    use=uses, method=methods, mode=split_modes, scale_map=scale_maps, channels=st.integers(1, 3),
    height=st.integers(1, 3), seed=seeds,
)  # fmt: skip
def test_affine_coupling_of_pictures(use, method, mode, scale_map, channels, height, seed):
    torch.manual_seed(seed)
    channels = channels if "checkerboard" in mode else 2 * channels
    half = channels if "checkerboard" in mode else channels // 2
    net = nf.nets.ConvNet2d([half, 4, 2 * half], [3, 1])
    block = nf.flows.AffineCouplingBlock(net, True, scale_map, mode)
    compare(scatter(block), USES[use], method, randn(2, channels, height, 4))


@given(use=uses, mode=split_modes, shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=seeds)
def test_split_and_merge(use, mode, shape, seed):
    torch.manual_seed(seed)
    shape = [*shape[:-1], 2 * shape[-1]]
    if len(shape) == 1 or "channel" in mode:
        shape = [2, 2 * shape[0], *shape[1:]] if "channel" in mode else [2, *shape]
    x = randn(*shape)
    layers = nf.flows.Split(mode), nf.flows.Merge(mode)
    expected = layers[0](x)[0]
    for split, merge in ((layers[0], layers[0].inverse), (layers[1].inverse, layers[1])):
        with USES[use](nn.ModuleList(layers)):
            parts, ladj = split(x)
            back, _ = merge(parts)
        assert ladj == 0 and isinstance(parts, list)
        assert all(torch.equal(mine, other) for mine, other in zip(parts, expected, strict=True))
        assert torch.equal(back, x)


@given(use=uses, method=methods, rows=sizes, features=sizes, nets=st.sampled_from(["both", "s", "t"]), seed=seeds)
def test_masked_affine(use, method, rows, features, nets, seed):
    torch.manual_seed(seed)
    mask = (torch.rand(features) < 0.5).double()
    made = {name: nf.nets.MLP([features, 6, features]) for name in ("s", "t") if nets in ("both", name)}
    compare(scatter(nf.flows.MaskedAffineFlow(mask, **made)), USES[use], method, randn(rows, features))


@given(
    use=uses, method=methods, channels=st.integers(2, 4), mode=split_modes, scale_map=scale_maps, lu=st.booleans(),
    seed=seeds,
)  # fmt: skip
def test_glow_block(use, method, channels, mode, scale_map, lu, seed):
    torch.manual_seed(seed)
    block = nf.flows.GlowBlock(channels, 5, scale_map=scale_map, split_mode=mode, use_lu=lu)
    x = randn(2, channels, 3, 4)
    scatter(block, 0.3)
    for part in block.modules():
        if isinstance(part, nf.flows.ActNorm):
            part.data_dep_init_done.fill_(1)
    compare(block, USES[use], method, x)


@given(
    use=uses, method=methods, rows=sizes, features=st.integers(2, 6), bins=bins, bound=st.floats(0.5, 5),
    tails=st.sampled_from(["linear", "circular"]), with_context=st.booleans(), reverse=st.booleans(), seed=seeds,
)  # fmt: skip
def test_coupled_spline(use, method, rows, features, bins, bound, tails, with_context, reverse, seed):
    torch.manual_seed(seed)
    flow = nf.flows.CoupledRationalQuadraticSpline(
        features, 1, 6, num_context_channels=3 if with_context else None, num_bins=bins, tails=tails, tail_bound=bound,
        reverse_mask=reverse,
    )  # fmt: skip
    context = randn(rows, 3) if with_context else None
    compare(scatter(flow), USES[use], method, around((rows, features), bound), context)


def bounds_of(features: int, many: bool) -> float | Tensor:
    return torch.rand(features, dtype=torch.float64) * 2 + 1 if many else 2.0


@given(
    use=uses, method=methods, rows=sizes, features=st.integers(2, 6), circular=st.sets(st.integers(0, 5)), bins=bins,
    many=st.booleans(), autoregressive=st.booleans(), with_context=st.booleans(), seed=seeds,
)  # fmt: skip
def test_circular_splines(use, method, rows, features, circular, bins, many, autoregressive, with_context, seed):
    """Tails and bounds of each dimension; outside of them normflows returns zeros."""
    torch.manual_seed(seed)
    bound = bounds_of(features, many)
    circular = sorted(index for index in circular if index < features)
    options: dict[str, Any] = {"num_context_channels": 3 if with_context else None, "num_bins": bins}
    if autoregressive:
        flow = nf.flows.CircularAutoregressiveRationalQuadraticSpline(
            features, 1, features + 4, circular or [0], tail_bound=bound, **options
        )
    else:
        # Features that are kept have their bounds looked up in the wrong place by normflows, where there are many.
        flow = nf.flows.CircularCoupledRationalQuadraticSpline(
            features, 1, 6, circular if not many else [features - 1], tail_bound=bound, mask=_last_moves(features),
            **options,
        )  # fmt: skip
    context = randn(rows, 3) if with_context else None
    wide = 1.4 if method == "forward" or not autoregressive else 0.99
    compare(scatter(flow), USES[use], method, around((rows, features), bound, wide=wide), context)


def _last_moves(features: int) -> Tensor:
    mask = torch.zeros(features)
    mask[features // 2 :] = 1
    return mask


ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.ELU, nn.SiLU, nn.LeakyReLU, nn.Hardtanh]


@given(
    use=uses, method=methods, rows=sizes, features=st.integers(1, 6), hidden=st.integers(5, 14),
    blocks=st.integers(0, 2), bins=bins, permute=st.booleans(), with_context=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS), seed=seeds,
)  # fmt: skip
def test_autoregressive_spline(
    use, method, rows, features, hidden, blocks, bins, permute, with_context, activation, seed
):
    torch.manual_seed(seed)
    flow = nf.flows.AutoregressiveRationalQuadraticSpline(
        features, blocks, hidden, num_context_channels=3 if with_context else None, num_bins=bins,
        activation=activation, permute_mask=permute,
    )  # fmt: skip
    context = randn(rows, 3) if with_context else None
    # In its forward direction x is swept for, and its gradient is made of x.
    undo = "inverse" if method == "forward" else None
    compare(scatter(flow, 0.3), USES[use], method, around((rows, features), 3.0), context, undo=undo)


@given(
    use=uses, method=methods, rows=sizes, features=st.integers(1, 6), hidden=st.integers(5, 14),
    blocks=st.integers(0, 2), residual=st.booleans(), random_mask=st.booleans(), with_context=st.booleans(),
    norm=st.booleans(), seed=seeds,
)  # fmt: skip
def test_masked_affine_autoregressive(
    use, method, rows, features, hidden, blocks, residual, random_mask, with_context, norm, seed
):
    torch.manual_seed(seed)
    with_context = with_context and residual  # the other blocks take none
    flow = nf.flows.MaskedAffineAutoregressive(
        features, hidden, context_features=3 if with_context else None, num_blocks=blocks, use_residual_blocks=residual,
        random_mask=random_mask and not residual, use_batch_norm=norm,
    )  # fmt: skip
    context = randn(rows, 3) if with_context else None
    compare(scatter(flow, 0.3).eval(), USES[use], method, randn(rows, features), context)


@given(
    use=uses, method=methods, rows=sizes, features=st.integers(1, 4), bins=bins, seed=seeds, many=st.booleans(),
    tails=st.sampled_from([None, "linear", "circular"]),
)  # fmt: skip
def test_elementwise_spline(use, method, rows, features, bins, seed, many, tails):
    torch.manual_seed(seed)
    bound = bounds_of(features, many)
    layer = scatter(spline_coupling.PiecewiseRationalQuadraticCDF([features], bins, tails, bound))
    x = torch.rand(rows, features, dtype=torch.float64) if tails is None else around((rows, features), bound)
    compare(layer, USES[use], method, x)


class Functional(nn.Module):
    """A functional spline as a layer. It looks the function up at each call."""

    def __init__(self, name: str, parameters: list[Tensor], options: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.options = name, options
        self.of_spline = nn.ParameterList(nn.Parameter(p) for p in parameters)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._call(x, False)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._call(x, True)

    def _call(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        options = {
            name: value.to(x.dtype) if isinstance(value, Tensor) else value for name, value in self.options.items()
        }
        return getattr(splines, self.name)(x, *self.of_spline, inverse=inverse, **options)


@given(
    method=methods, shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), bins=bins, many=st.booleans(),
    seed=seeds,
    tails=st.one_of(st.sampled_from([None, "linear", "circular"]),
                    st.lists(st.sampled_from(["linear", "circular"]), min_size=5, max_size=5)),
)  # fmt: skip
def test_functional_splines(method, shape, bins, many, seed, tails):
    torch.manual_seed(seed)
    if isinstance(tails, list):
        tails = tails[: shape[-1]]
    more = {"linear": -1, "circular": 0}.get(tails, 1) if isinstance(tails, str) else 1
    parameters = [randn(*shape, count) for count in (bins, bins, bins + more)]
    bound = bounds_of(shape[-1], many)
    if tails is None:
        layer = Functional("rational_quadratic_spline", parameters, {"left": -1.0, "right": 2.0, "top": 3.0})
        low, high = (0.0, 3.0) if method == "inverse" else (-1.0, 2.0)
        x = low + (high - low) * torch.rand(shape, dtype=torch.float64)
    else:
        name = "unconstrained_rational_quadratic_spline"
        layer = Functional(name, parameters, {"tails": tails, "tail_bound": bound})
        x = around(tuple(shape), bound)
    compare(layer, USES["patch"], method, x)


@pytest.mark.parametrize("tails", [None, "linear", "circular"])
def test_one_bin_stays_with_normflows(tails):
    parameters = [randn(4, count) for count in (1, 1, {None: 2, "linear": 0, "circular": 1}[tails])]
    name = "rational_quadratic_spline" if tails is None else "unconstrained_rational_quadratic_spline"
    layer = Functional(name, parameters, {} if tails is None else {"tails": tails})
    x = torch.rand(4, dtype=torch.float64)
    expected = results(layer, "forward", x)
    with drop_in.patch():
        assert_same(results(layer, "forward", x), expected, tolerance=0)


@given(use=uses, method=methods, channels=sizes, lu=st.booleans(), training=st.booleans(), seed=seeds)
def test_invertible_convolution_and_its_vector_form(use, method, channels, lu, training, seed):
    torch.manual_seed(seed)
    for flow, x in (
        (nf.flows.Invertible1x1Conv(channels, lu), randn(2, channels, 3, 2)),
        (nf.flows.InvertibleAffine(channels, lu), randn(5, channels)),
    ):
        compare(flow.double().train(training), USES[use], method, x)


@given(use=uses, method=methods, rows=sizes, features=sizes, seed=seeds)
def test_lu_linear_permute(use, method, rows, features, seed):
    torch.manual_seed(seed)
    compare(scatter(nf.flows.LULinearPermute(features), 0.3), USES[use], method, randn(rows, features))


@pytest.mark.parametrize("use", USES)
def test_unknown_names_stay_errors(use):
    coupling = nf.flows.AffineCoupling(nf.nets.MLP([2, 4, 4]), scale_map="cube")
    unknown = [nf.flows.Split("rows"), nf.flows.Merge("rows")]
    with USES[use](nn.ModuleList([coupling, *unknown])):
        for method in ("forward", "inverse"):
            with pytest.raises(NotImplementedError):
                getattr(coupling, method)([torch.randn(3, 2), torch.randn(3, 2)])
        with pytest.raises(NotImplementedError):
            unknown[0](torch.randn(3, 4))
        with pytest.raises(NotImplementedError):
            unknown[1]([torch.randn(3, 2), torch.randn(3, 2)])
    flow = nf.flows.CoupledRationalQuadraticSpline(4, 1, 6, tails="cubic", num_bins=4)
    with USES[use](flow), pytest.raises(RuntimeError):
        flow(torch.randn(3, 4))


@pytest.mark.parametrize("use", USES)
def test_bins_without_room_are_a_value_error(use):
    layer = spline_coupling.PiecewiseRationalQuadraticCDF([3], 20, "linear", min_bin_width=0.1)
    with USES[use](layer), pytest.raises(ValueError):
        layer(torch.rand(3, 3))


@pytest.mark.parametrize("use", USES)
def test_what_normflows_asserts_on_data_is_computed(use):
    """A negative discriminant by rounding (pyro issue 3139)."""
    torch.manual_seed(0)
    layer = spline_coupling.PiecewiseRationalQuadraticCDF([64], 8, "linear", 3.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 100)
    y = torch.linspace(-3, 3, 64).expand(256, 64).contiguous()
    with USES[use](layer):
        x, ladj = layer.inverse(y.requires_grad_())
        (x.sum() + ladj.sum()).backward()
    assert x.isfinite().all() and ladj.isfinite().all() and y.grad.isfinite().all()


def spline_flow() -> nf.NormalizingFlow:
    parts: list[nn.Module] = []
    for index in range(3):
        parts += [
            nf.flows.CoupledRationalQuadraticSpline(5, 1, 8, reverse_mask=bool(index % 2)),
            nf.flows.LULinearPermute(5, identity_init=False),
        ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(5, trainable=False), parts)


def real_nvp() -> nf.NormalizingFlow:
    mask = torch.tensor([1.0, 0, 1, 0, 1])
    parts = [
        nf.flows.MaskedAffineFlow(mask if i % 2 else 1 - mask, nf.nets.MLP([5, 8, 5]), nf.nets.MLP([5, 8, 5]))
        for i in range(3)
    ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(5, trainable=False), parts)


def masked_flow() -> nf.NormalizingFlow:
    parts: list[nn.Module] = []
    for _ in range(2):
        parts += [
            nf.flows.MaskedAffineAutoregressive(5, 12, num_blocks=1),
            nf.flows.Permute(5, "swap"),
            nf.flows.AutoregressiveRationalQuadraticSpline(5, 1, 12, init_identity=False),
        ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(5, trainable=False), parts)


FLOWS = {"spline": spline_flow, "RealNVP": real_nvp, "masked": masked_flow}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", FLOWS)
def test_training_takes_the_same_steps(use, kind):
    model = FLOWS[kind]()
    other = copy.deepcopy(model)
    batches = torch.randn(4, 32, 5)

    def train(model: nf.NormalizingFlow) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for x in batches:
            optimizer.zero_grad()
            model.forward_kld(x).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected = train(other)
    with USES[use](model):
        assert_same(train(model), expected, tolerance=1e-5)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", FLOWS)
def test_samples_are_the_same(use, kind):
    model = FLOWS[kind]().eval()
    with torch.no_grad():
        torch.manual_seed(3)
        x, log_prob = model.sample(20)
        with USES[use](model):
            torch.manual_seed(3)
            assert_same(list(model.sample(20)), [x, log_prob], tolerance=2e-5)
            assert_same([model.log_prob(x)], [log_prob], tolerance=2e-5)


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


@pytest.mark.parametrize("write", ["in place", "data", "load"])
def test_kept_weights_follow_the_parameters(write):
    """In evaluation the matrices of 1x1 convolutions and masked weights are kept, until the parameters change."""
    pairs = [
        (nf.flows.Invertible1x1Conv(4, lu).eval(), nf.flows.Invertible1x1Conv(4, lu).eval()) for lu in (True, False)
    ]
    pairs.append(tuple(nf.flows.MaskedAffineAutoregressive(4, 9, num_blocks=1).eval() for _ in range(2)))
    for mine, other in pairs:
        x = torch.randn(2, 4, 3, 3) if isinstance(mine, nf.flows.Invertible1x1Conv) else torch.randn(2, 4)
        with torch.no_grad(), drop_in.convert(mine):
            mine(x), mine.inverse(x)
            for p, q in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
                if write == "in place":
                    p.copy_(q)
                elif write == "data":
                    p.data.copy_(q)
            if write == "load":
                mine.load_state_dict(other.state_dict())
            assert_same(list(mine(x)), list(other(x)), tolerance=1e-5)
            assert_same(list(mine.inverse(x)), list(other.inverse(x)), tolerance=1e-5)


def test_convert_lists_what_it_replaced_and_what_it_left():
    class Loud(nf.flows.AffineCoupling):
        pass

    model = nn.ModuleList([
        nf.flows.GlowBlock(4, 6),
        nf.flows.CoupledRationalQuadraticSpline(4, 1, 6),
        nf.flows.Planar((4,)),
        Loud(nf.nets.MLP([2, 4, 4])),
        nf.flows.CircularAutoregressiveRationalQuadraticSpline(4, 1, 6, [1]),
        nf.flows.CoupledRationalQuadraticSpline(4, 1, 6, num_bins=1),
    ])  # fmt: skip
    handle = drop_in.convert(model)
    replaced = {line.name.rpartition(".")[2]: line for line in handle.replaced}
    left = {line.name.rpartition(".")[2]: line for line in handle.left}
    assert replaced["AffineCoupling"].places == ("0.flows.0.flows.1",)
    assert replaced["Invertible1x1Conv"].places == ("0.flows.1",)
    assert replaced["PiecewiseRationalQuadraticCoupling"].places == ("1.prqct",)
    assert {"ActNorm", "Planar", "Loud", "inverse", "PiecewiseRationalQuadraticCoupling"} <= set(left)
    assert "PeriodicFeaturesElementwise" in left["inverse"].reason
    assert "1 bins" in left["PiecewiseRationalQuadraticCoupling"].reason
    handle.undo()
    assert type(model[0].flows[1]) is nf.flows.Invertible1x1Conv


def test_undo_of_convert_leaves_every_attribute_as_it_was():
    model = nn.ModuleList([make() for make in FLOWS.values()])
    before = state(model)
    handle = drop_in.convert(model)
    assert state(model) != before
    for flow in model:
        flow.sample(2)
        flow.forward_kld(torch.randn(2, 5)).backward()
    model.zero_grad()
    handle.undo()
    assert state(model) == before


def test_undo_of_patch_leaves_every_attribute_as_it_was():
    before = attributes("normflows")
    handle = drop_in.patch()
    assert len(attributes("normflows").items() ^ before.items()) > 40
    handle.undo()
    assert attributes("normflows") == before


@pytest.mark.parametrize("kind", FLOWS)
def test_converted_models_are_copied_and_pickled(kind):
    model = FLOWS[kind]().eval()
    x = torch.randn(4, 5)
    drop_in.convert(model)
    model.sample(2)
    expected = model.log_prob(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.log_prob(x), expected)
        other.sample(2)


def test_nan_stays_in_its_element():
    layer = spline_coupling.PiecewiseRationalQuadraticCDF([3], 8, ["linear", "circular", "linear"], 3.0)
    x = torch.zeros(2, 3)
    x[0, 1] = torch.nan
    with drop_in.convert(layer):
        y, ladj = layer(x)
    assert torch.equal(y.isnan(), x.isnan())
    assert ladj.isnan().tolist() == [True, False]


def test_inverse_of_spline_layers_without_tails_is_swept():
    layer = spline_autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive(
        4, 9, num_blocks=1, init_identity=False
    )
    x = torch.rand(5, 4, dtype=torch.float64)
    layer.double()
    y, ladj = layer(x)
    with drop_in.convert(layer) as handle:
        assert not handle.left
        back, back_ladj = layer.inverse(y)
    assert error(back, x) < 1e-9 and error(back_ladj, -ladj) < 1e-9
