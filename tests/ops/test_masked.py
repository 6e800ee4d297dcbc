"""The one-sweep inverse against D passes through the network, autograd through these, nflows and zuko."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from cases import DTYPES, close, opcheck
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pygen import _native, ops
from pygen.ops.masked import MaskedAffine, MaskedSpline, masked_inverse_reference, plan_of
from pygen.ops.masked_network import MaskedNetwork, Tensors
from pygen.ops.masked_units import ACTIVATIONS

NFLOWS = MaskedAffine("softplus", epsilon=1e-3)
ZUKO = MaskedAffine("softclip", limit=math.log(1000), scale_first=False)
CLAMPED = MaskedAffine("tanh", limit=1.0)


class Layer(nn.Module):
    """A masked linear layer of nobody's library, with weights large enough to matter."""

    def __init__(self, mask: Tensor, bias: bool = True) -> None:
        super().__init__()
        fan_in = mask.sum(1, keepdim=True).clamp_min(1)
        self.weight = nn.Parameter(torch.randn(mask.shape) / fan_in.sqrt())
        self.bias = nn.Parameter(0.3 * torch.randn(len(mask))) if bias else None
        self.register_buffer("mask", mask)


class Stack(nn.Module):
    """Masked layers of any widths, degrees and order, with what a masked network may have between them."""

    def __init__(
        self, features: int = 6, widths: tuple[int, ...] = (9, 9), *, per_input: int = 2, context: int = 0,
        residual: bool = False, gate: bool = False, norm: bool = False, skip: bool = False, shuffled: bool = False,
        activations: tuple[str, ...] = ("relu",), bias: bool = True, interleaved: bool = True, groups: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        # The position of each input; inputs of one group share it.
        position = torch.randperm(features) if shuffled else torch.arange(features)
        if groups:
            position = position * groups // features
        degrees, last = position, int(position.max())
        self.layers = nn.ModuleList()
        self.contexts = nn.ModuleList()
        self.norms = nn.ModuleList()
        network = MaskedNetwork(features, context)
        h = network.x
        for count, width in enumerate(widths):
            # Repeated widths keep their degrees where a residual connection needs them.
            own = torch.randint(-1, last, (width,)) if shuffled else torch.arange(width) % max(1, last)
            if residual and len(degrees) == width:
                own = degrees
            layer = Layer(own[:, None] >= degrees, bias)
            self.layers.append(layer)
            below, h = h, network.linear(h, layer)
            if context:
                self.contexts.append(nn.Linear(context, width))
                c = network.linear(network.context, self.contexts[-1])
                h = network.multiply(h, network.activation(c, "sigmoid")) if gate else network.add(h, c)
            if norm:
                self.norms.append(nn.BatchNorm1d(width).eval())
                nn.init.uniform_(self.norms[-1].running_mean, -1, 1)
                nn.init.uniform_(self.norms[-1].running_var, 0.5, 2)
                nn.init.uniform_(self.norms[-1].weight, 0.5, 2)
                h = network.normalize(h, self.norms[-1])
            h = network.activation(h, activations[count % len(activations)])
            if residual and len(degrees) == width and count:
                h = network.add(below, h)
            degrees = own
        owner = torch.arange(features)
        owner = owner.repeat_interleave(per_input) if interleaved else owner.repeat(per_input)
        self.layers.append(Layer(position[owner][:, None] > degrees))
        h = network.linear(h, self.layers[-1])
        if skip:
            self.layers.append(Layer(position[owner][:, None] > position))
            h = network.add(h, network.linear(network.x, self.layers[-1]))
        self.network = network


def compare(
    network: MaskedNetwork, elementwise: Any, y: Tensor, context: Tensor | None = None, *, scale: float = 1.0
) -> None:
    """Values, and gradients for y, the context and all parameters, equal the reference's."""
    results, gradients = [], []
    parameters = [p for p in network.parameters() if p.requires_grad]
    for function in (ops.masked_inverse, masked_inverse_reference):
        leaves = [t.detach().clone().requires_grad_() for t in (y, context) if t is not None]
        x, ladj = function(leaves[0], network, *leaves[1:], elementwise=elementwise)
        weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)
        loss = (x * weights).sum() + (ladj * torch.linspace(0.5, 1, len(ladj), dtype=ladj.dtype)).sum()
        gradients.append(torch.autograd.grad(loss, leaves + parameters, allow_unused=True, materialize_grads=True))
        results.append((x, ladj))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        close(actual, expected, scale=scale)
    # What cancels in one gradient is as large as another.
    largest = max([1.0, *(float(each.abs().max()) for each in gradients[1] if each.numel())])
    for actual, expected in zip(*gradients, strict=True):
        if actual.dtype == torch.float64 and y.dtype != torch.float64:  # no more exact than the arithmetic
            actual, expected = actual.float(), expected.float()
        close(actual / largest, expected / largest, scale=10 * scale)  # sums over the batch


structures = st.fixed_dictionaries({
    "features": st.integers(1, 7),
    "widths": st.lists(st.integers(1, 13), min_size=1, max_size=3).map(tuple),
    "context": st.sampled_from([0, 2]),
    "residual": st.booleans(), "gate": st.booleans(), "norm": st.booleans(), "skip": st.booleans(),
    "shuffled": st.booleans(), "bias": st.booleans(), "interleaved": st.booleans(),
    "groups": st.sampled_from([0, 2, 3]),
    "activations": st.lists(st.sampled_from(list(ACTIVATIONS)), min_size=1, max_size=2).map(tuple),
})  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend is the same for all examples
@given(structure=structures, batch=st.integers(0, 40), seed=st.integers(0, 1000))
def test_equals_d_passes_on_any_network(backend, device, structure, batch, seed):
    torch.manual_seed(seed)
    stack = Stack(**structure).double().to(device)
    elementwise = MaskedAffine("tanh", 1.0, offset=0.1, epsilon=0.2, interleaved=structure["interleaved"])
    context = torch.randn(batch, 2).double().to(device) if structure["context"] else None
    compare(
        stack.network, elementwise, torch.randn(batch, structure["features"]).double().to(device), context, scale=100
    )


SPLINES = {
    "linear tails": MaskedSpline(4, tails="linear", domain=(-2.0, 2.0)),
    "circular": MaskedSpline(3, tails="circular", domain=(-math.pi, math.pi)),
    "bounded": MaskedSpline(5, domain=(-3.0, 3.0), image=(-1.0, 4.0)),
    "zuko": MaskedSpline(4, tails="linear", domain=(-5.0, 5.0), parametrization="softclip"),
    "per dimension": MaskedSpline(
        3, tails=["linear", "circular", "linear", "circular", "linear", "linear"],
        domain=(-torch.arange(1.0, 7.0), torch.arange(1.0, 7.0)),
    ),
    "identity": MaskedSpline(2, tails="linear", domain=(-2.0, 2.0), identity_init=True, scale=0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLINES)
def test_splines_equal_d_passes(backend, device, name):
    spline = SPLINES[name]
    stack = Stack(6, (11, 11), per_input=spline.per_input, residual=True, context=3, shuffled=True).double().to(device)
    y = (2 * torch.randn(5, 6)).double().to(device)
    if "tails" in name or name == "identity":
        y[0] = 10.0  # in the tails
    compare(stack.network, spline, y, torch.randn(5, 3).double().to(device), scale=1e4)


@pytest.mark.parametrize("activation", ["exp", "tanh", "atan", "sigmoid_symmetric", "sigmoid", "softplus", "softclip"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
def test_every_scale(backend, device, activation, epsilon):
    limit = 1.5 if activation in ("tanh", "atan", "sigmoid_symmetric", "softclip") else None
    elementwise = MaskedAffine(activation, limit, offset=0.5, epsilon=epsilon, scale_first=False, interleaved=False)
    stack = Stack(5, (8,), interleaved=False, activations=("tanh",)).double().to(device)
    compare(stack.network, elementwise, torch.randn(3, 5).double().to(device), scale=100)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(backend, device, name):
    stack = Stack(4, (40, 40), activations=(name,)).to(device)
    with torch.no_grad():
        for layer in stack.layers[:-1]:
            layer.weight.mul_(6)  # into the flat parts
    compare(stack.network, CLAMPED, torch.randn(9, 4).to(device), scale=30)
    network = MaskedNetwork(1)
    h = network.activation(network.linear(network.x, Layer(torch.zeros(64, 1))), name)
    network.linear(h, Layer(torch.ones(2, 64)))
    compare(network, CLAMPED, torch.randn(3, 1).to(device), scale=30)


def test_many_blocks(backend, device):
    stack = Stack(70, (150, 150), residual=True, context=2, shuffled=True).to(device)
    y, context = torch.randn(3, 70).to(device), torch.randn(3, 2).to(device)
    assert len(plan_of(stack.network, CLAMPED).placement.blocks) > 2
    compare(stack.network, CLAMPED, y, context, scale=100)


def test_wide_steps(backend, device):
    # Two groups: a coupling. All of a group is one step, with more rows than warps of a block, or panels of a tile.
    stack = Stack(130, (300,), groups=2).to(device)
    assert plan_of(stack.network, CLAMPED).placement.last == 2
    compare(stack.network, CLAMPED, torch.randn(35, 130).to(device), scale=30)


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 31, 32, 33, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_batch(backend, device, batch, dtype):
    stack = Stack(5, (13, 7)).to(dtype).to(device)
    compare(stack.network, CLAMPED, torch.randn(batch, 5, dtype=dtype).to(device), scale=30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", DTYPES)
def test_mixes_dtypes(backend, device, dtype, weights):
    stack = Stack(5, (13, 13), context=2).to(weights).to(device)
    y, context = torch.randn(4, 5).to(dtype).to(device), torch.randn(4, 2).to(weights).to(device)
    x, ladj = ops.masked_inverse(y, stack.network, context, elementwise=CLAMPED)
    assert x.dtype == dtype
    assert ladj.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    compare(stack.network, CLAMPED, y, context, scale=10)


def test_autocast_changes_nothing(backend, device):
    stack = Stack(5, (13, 13), context=2).to(device)
    y, context = (torch.randn(4, n, device=device).requires_grad_() for n in (5, 2))

    def run() -> tuple[Tensor, ...]:
        x, ladj = ops.masked_inverse(y, stack.network, context, elementwise=CLAMPED)
        gradients = torch.autograd.grad(x.square().sum() + ladj.sum(), (y, context, *stack.network.parameters()))
        return (x, ladj, *gradients)

    expected = run()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = run()
    for value, wanted in zip(actual, expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("made", ["residual", "feedforward", "random"])
@pytest.mark.parametrize("context", [0, 3])
def test_equals_nflows(backend, device, made, context):
    nflows_autoregressive = pytest.importorskip("nflows.transforms.autoregressive")
    features = 9
    transform = nflows_autoregressive.MaskedAffineAutoregressiveTransform(
        features, 20, context_features=context or None, use_residual_blocks=made == "residual",
        random_mask=made == "random", use_batch_norm=made == "residual",
    ).to(device).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    y = torch.randn(6, features, device=device)
    c = torch.randn(6, context, device=device) if context else None
    x, ladj = ops.masked_inverse(y, nflows_network(transform.autoregressive_net, context), c, elementwise=NFLOWS)
    expected = transform.inverse(y, c)
    close(x, expected[0], scale=30)
    close(ladj, expected[1], scale=30)


def nflows_network(made: Any, context: int) -> MaskedNetwork:
    """The network of nflows' MADE."""
    network = MaskedNetwork(made.initial_layer.in_features, context)
    h = network.linear(network.x, made.initial_layer)
    if context:
        h = network.add(h, network.activation(network.linear(network.context, made.context_layer), "relu"))
    if not made.use_residual_blocks:
        h = network.activation(h, "relu")
    for block in made.blocks:
        if made.use_residual_blocks:
            t = h
            for position, layer in enumerate(block.linear_layers):
                t = network.normalize(t, block.batch_norm_layers[position]) if block.use_batch_norm else t
                t = network.linear(network.activation(t, "relu"), layer)
                if context and position == 0:
                    t = network.add(t, network.linear(network.context, block.context_layer))
            h = network.add(h, t)
        else:
            h = network.activation(network.linear(h, block.linear), "relu")
    network.linear(h, made.final_layer)
    return network


@pytest.mark.parametrize("spline", [False, True])
@pytest.mark.parametrize("passes", [None, 2])
def test_equals_zuko(backend, device, spline, passes):
    zuko = pytest.importorskip("zuko")
    features, context = 7, 2
    flow = zuko.flows.NSF if spline else zuko.flows.MAF
    transform = flow(features, context, transforms=1, randperm=True, passes=passes, hidden_features=(24, 24))
    transform = transform.transform.transforms[0].to(device)
    hyper = transform.hyper
    network = MaskedNetwork(features, context)
    whole = features + context
    h = network.linear(network.x, hyper[0], columns=(0, features))
    c = network.linear(network.context, hyper[0], columns=(features, whole), bias=False)
    h = network.add(h, c)
    for layer in list(hyper)[2::2]:
        h = network.linear(network.activation(h, "relu"), layer)
    y, c = torch.randn(6, features, device=device), torch.randn(6, context, device=device)
    x, ladj = ops.masked_inverse(y, network, c, elementwise=SPLINES_OF_ZUKO if spline else ZUKO)
    theirs = transform(c).inv
    close(x, theirs(y), scale=30)
    close(ladj, theirs.log_abs_det_jacobian(y, theirs(y)), scale=30)


SPLINES_OF_ZUKO = MaskedSpline(8, tails="linear", domain=(-5.0, 5.0), parametrization="softclip")


@pytest.mark.parametrize("elementwise", [CLAMPED, MaskedSpline(2, tails="linear", domain=(-3.0, 3.0))])
def test_gradcheck(backend, device, elementwise):
    per_input = elementwise.layout[0]
    stack = Stack(3, (5, 5), per_input=per_input, context=2, residual=True, activations=("tanh",)).double().to(device)
    y, context = (torch.randn(2, n, device=device).double().requires_grad_() for n in (3, 2))

    def invert(y: Tensor, context: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return ops.masked_inverse(y, stack.network, context, elementwise=elementwise)

    parameters = tuple(stack.network.parameters())
    assert torch.autograd.gradcheck(invert, (y, context, *parameters))
    assert torch.autograd.gradgradcheck(invert, (y, context, *parameters[:2]))


def test_ladj_is_the_jacobian_of_autograd(backend, device):
    stack = Stack(5, (12,), shuffled=True).double().to(device)
    y = torch.randn(1, 5).double().to(device)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: ops.masked_inverse(v, stack.network, elementwise=CLAMPED)[0], y
    ).reshape(5, 5)  # fmt: skip
    _, ladj = ops.masked_inverse(y, stack.network, elementwise=CLAMPED)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ladj[0])


def test_only_what_is_wanted_gets_a_gradient(backend, device):
    stack = Stack(4, (8,), context=2).to(device).requires_grad_(False)
    y, context = torch.randn(3, 4).to(device), torch.randn(3, 2).to(device).requires_grad_()
    ops.masked_inverse(y, stack.network, context, elementwise=CLAMPED)[1].sum().backward()
    assert context.grad.abs().sum() > 0
    frozen = y.requires_grad_()
    ops.masked_inverse(frozen, stack.network, context.detach(), elementwise=CLAMPED)[0].sum().backward()
    assert frozen.grad.abs().sum() > 0
    assert all(p.grad is None for p in stack.parameters())


def corrupted(*entries: tuple[int, int]) -> MaskedNetwork:
    """A network of five inputs, one unit each, whose output i also reads input j for each (i, j)."""
    mask = torch.ones(5, 5).tril(-1)
    for i, j in entries:
        mask[i, j] = 1
    network = MaskedNetwork(5)
    h = network.activation(network.linear(network.x, Layer(torch.eye(5))), "tanh")
    network.linear(h, Layer(mask.repeat_interleave(2, 0)))
    return network


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([(2, 2)], "network is not autoregressive: output 2 depends on input 2, its own"),
        ([(1, 3)], "network is not autoregressive: output 1 depends on input 3, and output 3 on input 1"),
        ([(0, 4), (4, 4)], "output 4 depends on input 4, its own"),
    ],
)
def test_refuses_what_is_not_autoregressive(entries, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.masked_inverse(torch.zeros(1, 5), corrupted(*entries), elementwise=CLAMPED)


def test_refuses_a_mask_that_weighs():
    mask = torch.ones(4, 4).tril(-1).repeat_interleave(2, 0)
    mask[6, 1] = 0.5
    network = MaskedNetwork(4)
    network.linear(network.x, Layer(mask))
    with pytest.raises(ValueError, match=r"the mask of Layer, node 1 of network, has 0.5, but expected zeros and ones"):
        ops.masked_inverse(torch.zeros(1, 4), network, elementwise=CLAMPED)


def test_refuses_a_cycle_through_others():
    mask = torch.zeros(3, 3)
    mask[0, 2] = mask[2, 1] = mask[1, 0] = 1
    network = MaskedNetwork(3)
    network.linear(network.x, Layer(mask.repeat_interleave(2, 0)))
    with pytest.raises(ValueError, match="output 0 depends on input 2, and output 2 on input 0 through others"):
        plan_of(network, CLAMPED)


def test_an_order_that_is_only_implied_is_found(backend, device):
    # Output i reads input i + 1 alone: 4 comes first.
    network = MaskedNetwork(5)
    network.linear(network.x, Layer(torch.ones(4).diag(1).repeat_interleave(2, 0)).to(device))
    assert plan_of(network, CLAMPED).placement.levels.tolist() == [5, 4, 3, 2, 1]
    compare(network, CLAMPED, torch.randn(3, 5, device=device))


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("elementwise", [CLAMPED, SPLINES["linear tails"]])
def test_threads_and_batch_position_do_not_change_a_bit(backend, device, elementwise):
    per_input = elementwise.layout[0]
    stack = Stack(40, (90, 90), per_input=per_input, residual=True).to(device)
    y = torch.randn(150, 40, device=device).requires_grad_()

    def run(rows: slice) -> tuple[Tensor, ...]:
        x, ladj = ops.masked_inverse(y[rows], stack.network, elementwise=elementwise)
        return x, ladj

    whole = run(slice(0, 150))
    torch.set_num_threads(1)
    for rows in (slice(0, 150), slice(5, 6), slice(37, 70), slice(60, 150)):
        for value, expected in zip(run(rows), whole, strict=True):
            assert torch.equal(value, expected[rows])


def test_nan_stays_in_its_row(backend, device):
    stack = Stack(6, (12, 12), context=2).to(device)
    y, context = torch.randn(40, 6, device=device), torch.randn(40, 2, device=device)
    clean = ops.masked_inverse(y, stack.network, context, elementwise=CLAMPED)
    y[3, 2], context[7, 0], y[9, 0] = math.nan, math.nan, math.inf
    x, ladj = ops.masked_inverse(y, stack.network, context, elementwise=CLAMPED)
    good = torch.ones(40, dtype=torch.bool)
    good[[3, 7, 9]] = False
    assert torch.equal(x[good], clean[0][good])
    assert torch.equal(ladj[good], clean[1][good])
    assert torch.equal(x[3, :2], clean[0][3, :2])  # what comes before does not depend on it
    assert x[3, 2:].isnan().all()
    assert ladj[3].isnan()


def test_no_less_accurate_than_d_passes(backend, device):
    stack = Stack(30, (64, 64), residual=True).to(device)
    y = torch.randn(64, 30, device=device)
    ours = ops.masked_inverse(y, stack.network, elementwise=CLAMPED)
    theirs = masked_inverse_reference(y, stack.network, elementwise=CLAMPED)
    exact = masked_inverse_reference(y.double(), copy.deepcopy(stack).double().network, elementwise=CLAMPED)
    for mine, peer, truth in zip(ours, theirs, exact, strict=True):
        error, rival = ((value.double() - truth).square().mean().sqrt() for value in (mine, peer))
        assert error <= 1.5 * rival


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for features, batch in ((1, 1), (6, 33), (9, 16)):
            stack = Stack(features, (10,)).to(device)
            y = torch.randn(batch, features, device=device).requires_grad_()
            x, ladj = ops.masked_inverse(y, stack.network, elementwise=CLAMPED)
            (x.sum() + ladj.sum()).backward()
            assert x.isfinite().all()
            assert ladj.isfinite().all()
            assert y.grad.isfinite().all()
            assert all(p.grad.isfinite().all() for p in stack.parameters())
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def test_a_changed_weight_is_noticed(backend, device):
    stack = Stack(5, (10,), context=2).to(device)
    y, context = torch.randn(3, 5, device=device), torch.randn(3, 2, device=device)

    def both() -> None:
        x, _ = ops.masked_inverse(y, stack.network, context, elementwise=CLAMPED)
        expected, _ = masked_inverse_reference(y, copy.deepcopy(stack).network, context, elementwise=CLAMPED)
        close(x, expected, scale=30)
        close(stack.network(x, context), copy.deepcopy(stack).network(x, context))

    both()
    stack.layers[0].weight.mul_(1.5)
    both()
    stack.layers[1].bias.add_(0.5)
    both()
    stack.load_state_dict({name: value + 0.1 * (value > 0.1) for name, value in stack.state_dict().items()
                           if "mask" not in name}, strict=False)  # fmt: skip
    both()
    stack.contexts[0].weight.data = torch.randn_like(stack.contexts[0].weight)
    both()
    stack.layers[1].weight = nn.Parameter(torch.randn_like(stack.layers[1].weight))
    both()
    stack.layers[0].weight.data.mul_(0.5)  # goes around the counter
    stack.network.forget()
    both()


def test_what_inference_mode_keeps_serves_training(backend, device):
    stack = Stack(5, (10,), context=2).to(device)
    y, context = torch.randn(3, 5, device=device), torch.randn(3, 2, device=device)
    with torch.inference_mode():
        x, _ = ops.masked_inverse(y, stack.network, context, elementwise=CLAMPED)
        stack.network(x, context)
    compare(stack.network, CLAMPED, y, context, scale=10)
    with torch.inference_mode():
        made_there = Stack(5, (10,), context=2).to(device)
        close(
            ops.masked_inverse(y, made_there.network, context, elementwise=CLAMPED)[0],
            masked_inverse_reference(y, made_there.network, context, elementwise=CLAMPED)[0], scale=30,
        )  # fmt: skip


def test_copies_are_independent(backend, device):
    stack = Stack(5, (10,)).to(device)
    y = torch.randn(3, 5, device=device)
    before = ops.masked_inverse(y, stack.network, elementwise=CLAMPED)[0]
    twin = copy.deepcopy(stack)
    with torch.no_grad():
        twin.layers[0].weight.zero_()
    assert torch.equal(ops.masked_inverse(y, stack.network, elementwise=CLAMPED)[0], before)
    assert not torch.equal(ops.masked_inverse(y, twin.network, elementwise=CLAMPED)[0], before)


def test_a_network_can_be_pickled():
    network = Stack(4, (6,)).network
    y = torch.randn(2, 4)
    x, _ = ops.masked_inverse(y, network, elementwise=CLAMPED)
    assert torch.equal(ops.masked_inverse(y, pickle.loads(pickle.dumps(network)), elementwise=CLAMPED)[0], x)


def test_functional_call_is_seen(backend, device):
    stack = Stack(4, (6,)).to(device)
    y = torch.randn(2, 4, device=device)

    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack

        def forward(self, y: Tensor) -> Tensor:
            return ops.masked_inverse(y, self.stack.network, elementwise=CLAMPED)[0]

    before = Inverse()(y)
    zeros = {name: torch.zeros_like(value) for name, value in Inverse().named_parameters()}
    assert torch.equal(torch.func.functional_call(Inverse(), zeros, (y,)), y)
    assert torch.equal(Inverse()(y), before)


def test_batches_of_any_shape(backend, device):
    stack = Stack(4, (6,), context=2).to(device)
    y, context = torch.randn(2, 3, 4, device=device), torch.randn(2, 3, 2, device=device)
    x, ladj = ops.masked_inverse(y, stack.network, context, elementwise=CLAMPED)
    flat = ops.masked_inverse(y.reshape(6, 4), stack.network, context.reshape(6, 2), elementwise=CLAMPED)
    assert torch.equal(x, flat[0].reshape(2, 3, 4))
    assert torch.equal(ladj, flat[1].reshape(2, 3))
    single, single_ladj = ops.masked_inverse(y[0, 0], stack.network, context[0, 0], elementwise=CLAMPED)
    assert torch.equal(single, x[0, 0])
    assert single_ladj.shape == ()
    strided = y.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.masked_inverse(strided, stack.network, context, elementwise=CLAMPED)[0], x)
    empty = ops.masked_inverse(y[:0], stack.network, context[:0], elementwise=CLAMPED)
    assert empty[0].shape == (0, 3, 4)
    assert empty[1].shape == (0, 3)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("elementwise", [CLAMPED, SPLINES["linear tails"]])
def test_compiles_in_one_graph(backend, device, with_gradient, elementwise):
    per_input = elementwise.layout[0]
    stack = Stack(4, (8, 8), per_input=per_input, context=2, residual=True).to(device).requires_grad_(with_gradient)
    plan_of(stack.network, elementwise)
    y, context = (torch.randn(3, n, device=device).requires_grad_(with_gradient) for n in (4, 2))

    def invert(y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return ops.masked_inverse(y * 2, stack.network, context, elementwise=elementwise)

    # The compiler's own code for what is around the sweep takes long to make, and is not what is tested.
    x, ladj = torch.compile(invert, fullgraph=True, backend="aot_eager")(y, context)
    expected = invert(y, context)
    close(x, expected[0], scale=10)
    close(ladj, expected[1], scale=10)
    if with_gradient:
        inputs = (y, context, *stack.network.parameters())
        actual, wanted = (
            torch.autograd.grad(a.square().sum() + b.sum(), inputs) for a, b in ((x, ladj), expected)
        )  # fmt: skip
        for a, b in zip(actual, wanted, strict=True):
            close(a, b, scale=30)


def test_functorch_takes_the_reference(backend, device):
    stack = Stack(4, (8,)).to(device).requires_grad_(False)
    y = torch.randn(3, 4, device=device)
    x, ladj = ops.masked_inverse(y, stack.network, elementwise=CLAMPED)
    per_row = torch.vmap(lambda row: ops.masked_inverse(row, stack.network, elementwise=CLAMPED))(y)
    close(per_row[0], x, scale=30)
    close(per_row[1], ladj, scale=30)


def program_of(stack: Stack, elementwise: Any, name: str, device: torch.device) -> tuple[Tensor, ...]:
    """The packed weights, the constants of the inverse, and the program on the host and on the device."""
    plan, tensors = plan_of(stack.network, elementwise), Tensors(stack.network.parameters(), torch.float32, keep=True)
    constants = (plan.constants(tensors),) if name == "inverse" else ()
    return (plan.weights(name, tensors), *constants, *plan.code(name, device))


def test_raw_operators_pass_opcheck(backend, device, namespace):
    library = getattr(torch.ops, namespace)
    stack = Stack(4, (8,)).to(device).requires_grad_(False)
    y = torch.randn(3, 4, device=device)
    affine = (y, *program_of(stack, CLAMPED, "inverse", device), 4, 1, 1.0, 0.0, 0.0)
    opcheck(library.masked_affine_inverse.default, affine)
    plan = plan_of(stack.network, CLAMPED)
    width = 4 * 5 + sum(stack.network.nodes[index].units for index, _ in plan.slopes)
    samples, outputs = torch.randn(3, width, device=device), plan.programs["backward"].outputs
    backward = (samples, *program_of(stack, CLAMPED, "backward", device), outputs)
    opcheck(library.masked_backward.default, backward)
    stack = Stack(4, (8,), per_input=16).to(device).requires_grad_(False)
    settings = (None, 5, 0, [-3.0, 3.0, -1.0, 4.0], [1e-3] * 3, 0, 1.0, 1.0, 1.0)
    splines = (y, *program_of(stack, SPLINES["bounded"], "inverse", device), 4, *settings)
    opcheck(library.masked_spline_inverse.default, splines)


def test_raw_operators_check_what_would_reach_memory(backend, device, namespace):
    operator = getattr(torch.ops, namespace).masked_affine_inverse
    stack = Stack(4, (8,)).to(device).requires_grad_(False)
    y = torch.randn(3, 4, device=device)
    good = (y, *program_of(stack, CLAMPED, "inverse", device), 4, 1, 1.0, 0.0, 0.0)
    expected = operator(*good)[0]
    for position, value, sentence in (
        (0, y[:, :3].contiguous(), "program names a row, weight, constant or column that is not there"),
        (0, y.bfloat16(), "samples has a dtype"),
        (1, good[1][:-1], "program names a row, weight, constant"),
        (1, good[1].double(), "weights has shape"),
        (2, good[2][:-1], "program names a row, weight, constant"),
        (3, good[3][:-1], "device_program has shape"),
        (5, 5, "program has 4 outputs, but expected 5"),
        (6, 9, "activation is 9"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            operator(*good[:position], value, *good[position + 1 :])
    refused = 0
    for field in range(len(good[3])):
        for value in (-(1 << 40), 1 << 40):
            code = good[3].clone()
            code[field] = value
            bad = (*good[:3], code, code.to(device), *good[5:])
            try:
                x = operator(*bad)[0]
            except RuntimeError:
                refused += 1
            else:  # numbers that an instruction has no use for may be anything
                assert torch.equal(x, expected)
    assert refused > 1.5 * len(good[3])


@pytest.mark.parametrize(
    ("y", "context", "error", "sentence"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 2), TypeError, "y has dtype torch.int64"),
        (torch.zeros(2, 5), torch.zeros(2, 2), ValueError, r"y has shape \(2, 5\), but expected \(\*batch, 4\)"),
        (torch.zeros(2, 4), None, ValueError, "context is None, but the network has 2 context features"),
        (torch.zeros(2, 4), torch.zeros(3, 2), ValueError, r"context has shape \(3, 2\), but expected \(2, 2\)"),
        (torch.zeros(2, 4), torch.zeros(2, 2, device="meta"), ValueError, "context is on meta"),
    ],
)
def test_bad_arguments_get_one_sentence(y, context, error, sentence):
    with pytest.raises(error, match=sentence):
        ops.masked_inverse(y, Stack(4, (8,), context=2).network, context, elementwise=CLAMPED)


def test_bad_networks_get_one_sentence():
    with pytest.raises(ValueError, match="features and context_features are 0 and 0"):
        MaskedNetwork(0)
    network = MaskedNetwork(3)
    with pytest.raises(ValueError, match="context_features is 0, but a node reads the context"):
        _ = network.context
    with pytest.raises(ValueError, match=r"layer has a weight of shape \(2, 4\) and columns \(0, 4\)"):
        network.linear(network.x, nn.Linear(4, 2))
    with pytest.raises(ValueError, match="activation is 'swish'"):
        network.activation(network.x, "swish")
    with pytest.raises(ValueError, match="parameter is 0.1, but activation 'relu' has none"):
        network.activation(network.x, "relu", 0.1)
    with pytest.raises(ValueError, match="node is 7, but the network has 1 nodes so far"):
        network.add(network.x, 7)
    h = network.linear(network.x, Layer(torch.ones(4, 3)))
    with pytest.raises(ValueError, match="node 0 has 3 units and node 1 has 4"):
        network.add(network.x, h)
    with pytest.raises(ValueError, match="norm has 5 features, but node 1 has 4 units"):
        network.normalize(h, nn.BatchNorm1d(5))
    with pytest.raises(ValueError, match="network has 4 outputs for 3 features, but expected 2 for each"):
        plan_of(network, CLAMPED)
    network.normalize(h, nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="a batch normalization is in training"):
        network.parameters()
    alone = MaskedNetwork(1, 2)
    alone.linear(alone.context, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the last node of network does not depend on x"):
        plan_of(alone, CLAMPED)


def test_bad_maps_get_one_sentence():
    with pytest.raises(ValueError, match="activation is 'expo'"):
        MaskedAffine("expo")
    with pytest.raises(ValueError, match="limit is None"):
        MaskedAffine("tanh")
    with pytest.raises(ValueError, match="bins"):
        MaskedSpline(1)
    with pytest.raises(ValueError, match="tails has 'lineal'"):
        MaskedSpline(3, tails="lineal")


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    stack = Stack(40, (90, 90), residual=True).to(device).requires_grad_(False)
    y = torch.randn(64, 40, device=device)
    ops.masked_inverse(y, stack.network, elementwise=CLAMPED)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, ladj = ops.masked_inverse(y, stack.network, elementwise=CLAMPED)
    y.normal_()
    graph.replay()
    expected = ops.masked_inverse(y, stack.network, elementwise=CLAMPED)
    assert torch.equal(x, expected[0])
    assert torch.equal(ladj, expected[1])


def test_the_reference_serves_where_there_are_no_kernels(monkeypatch):
    stack = Stack(4, (8,))
    y = torch.randn(3, 4)
    expected = ops.masked_inverse(y, stack.network, elementwise=CLAMPED)
    monkeypatch.setattr(_native, "_kernels", {})
    x, ladj = ops.masked_inverse(y, stack.network, elementwise=CLAMPED)
    close(x, expected[0], scale=30)
    close(ladj, expected[1], scale=30)
