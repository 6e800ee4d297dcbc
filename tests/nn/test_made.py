"""The masked network: what each output may read, and what is kept of its weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pygen.nn.made import DEGREES, MADE, MaskedLinear
from pygen.ops.masked_units import ACTIVATIONS


def stirred(made: MADE) -> MADE:
    """With weights everywhere, so that whatever an output could read it does read."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(0.1, 1)
    return made


def jacobian(made: MADE, context: Tensor | None = None) -> Tensor:
    """(features, per_input, features)"""
    x = torch.rand(1, made.features)
    whole = torch.autograd.functional.jacobian(lambda v: made(v, context), x)
    return whole.reshape(made.features, -1, made.features)


@given(
    features=st.integers(1, 6), width=st.integers(1, 12), blocks=st.integers(0, 3), residual=st.booleans(),
    degrees=st.sampled_from(DEGREES), per_input=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_an_output_reads_only_what_comes_before_it(features, width, blocks, residual, degrees, per_input, data):
    order = data.draw(st.one_of(st.none(), st.permutations(range(features))))
    made = stirred(MADE(features, width=width, blocks=blocks, residual=residual, degrees=degrees, order=order,
                        per_input=per_input, activation="softplus", seed=3))  # fmt: skip
    sequence = list(range(features)) if order is None else list(order)
    reads = jacobian(made)[sequence][:, :, sequence].abs().amax(1)
    assert torch.equal(reads.triu(), torch.zeros_like(reads))


@pytest.mark.parametrize("residual", [False, True])
def test_with_enough_units_it_reads_all_that_comes_before_it(residual):
    made = stirred(MADE(5, width=8, residual=residual, activation="softplus"))
    reads = jacobian(made).abs().amin(1) > 0
    assert torch.equal(reads, torch.ones(5, 5, dtype=torch.bool).tril(-1))


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("features", [1, 4])
def test_every_output_reads_the_context(features, degrees):
    made = stirred(MADE(features, width=24, context=2, degrees=degrees, activation="softplus"))
    x = torch.rand(1, features)
    reads = torch.autograd.functional.jacobian(lambda c: made(x, c), torch.rand(1, 2))
    assert (reads != 0).all()


def test_starts_at_zero_and_trains():
    made = MADE(4, width=20, context=3)
    x, context = torch.randn(6, 4), torch.randn(6, 3)
    assert torch.equal(made(x, context), torch.zeros(6, 8))
    optimizer = torch.optim.Adam(made.parameters(), 0.02)
    target = torch.stack((context[:, 0], x[:, 0], x[:, 1], x[:, 2]), 1)
    for _ in range(150):
        loss = (made(x, context)[:, ::2] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * target.square().mean()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("classes", [None, 3])
def test_equals_its_layers_one_after_another(residual, classes):
    made = stirred(MADE(4, width=6, residual=residual, context=0 if classes else 2, classes=classes, activation="elu"))
    x = torch.randn(5, 4)
    context = torch.randint(3, (5,)) if classes else torch.randn(5, 2)
    features = torch.eye(3)[context] if classes else context
    h = made.first(x) + made.contexts[0](features)
    layers = list(made.layers)
    for position, layer in enumerate(layers[:: 2 if residual else 1]):
        t = layer(nn.functional.elu(h)) + made.contexts[1 + position](features)
        h = h + layers[2 * position + 1](nn.functional.elu(t)) if residual else t
    torch.testing.assert_close(made(x, context), made.last(nn.functional.elu(h)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_gradients(activation):
    made = stirred(MADE(3, width=4, activation=activation)).double()
    x = torch.randn(2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(made, (x,))


@torch.no_grad()
def test_kept_weights_follow_the_parameters():
    made = stirred(MADE(4, width=6)).eval()
    x = torch.randn(3, 4)
    first = made(x)
    assert torch.equal(made(x), first)
    made.last.weight.mul_(2)
    assert not torch.equal(made(x), first)
    made.first.weight.data.mul_(2)
    torch.testing.assert_close(made.eval()(x), copy.deepcopy(made)(x))


def test_checkpoints_hold_parameters_only():
    made, other = stirred(MADE(4, width=6, degrees="random")), MADE(4, width=6, degrees="random")
    assert not any("mask" in name for name in made.state_dict())
    other.load_state_dict(made.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(other(x), made(x))
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), made(x))


def test_compiles_in_one_graph():
    made = stirred(MADE(4, width=6, context=2))
    x, context = torch.randn(3, 4), torch.randn(3, 2)
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x, context), made(x, context))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"features": 0}, "features is 0"),
        ({"width": 0}, "width is 0"),
        ({"blocks": -1}, "blocks is -1"),
        ({"per_input": 0}, "per_input is 0"),
        ({"context": -2}, "context is -2"),
        ({"classes": 0}, "classes is 0"),
        ({"context": 2, "classes": 3}, "context is 2 and classes is 3"),
        ({"degrees": "odd"}, "degrees is 'odd'"),
        ({"order": [0, 1, 1, 3]}, r"order is \[0, 1, 1, 3\], but expected each of 0 to 3 once"),
        ({"activation": "swish"}, "activation is 'swish'"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MADE(**{"features": 4, **arguments})


def test_bad_inputs_get_one_sentence():
    with pytest.raises(ValueError, match="context is given, but the network was built for none"):
        MADE(4)(torch.zeros(1, 4), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="context is None, but the network was built for one"):
        MADE(4, classes=3)(torch.zeros(1, 4))
    with pytest.raises(TypeError, match="context has dtype torch.float32, but expected int64 labels"):
        MADE(4, classes=3)(torch.zeros(1, 4), torch.zeros(1))
    with pytest.raises(ValueError, match=r"mask has shape \(4,\) and dtype torch.float32"):
        MaskedLinear(torch.ones(4))
