"""Every recipe of the flow family: exact change of variables, round trips, addressed noise, memory, compilation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from flow_cases import SMALL_RECIPES
from torch import Tensor

from pygen import ops
from pygen.flows import PictureFlow
from pygen.flows.memory import MODES
from pygen.model import Density
from pygen.workbench.families import FAMILIES, build

TINY = (1, 4, 4)


@pytest.fixture(params=FAMILIES["flow"])
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


def shaken(recipe: str, *, scatter: float = 0.1, **options: Any) -> PictureFlow:
    """A small model in float64 none of whose layers is the identity that it starts as."""
    torch.manual_seed(0)
    settings = {"shape": TINY, "levels": 5, "classes": 3, **SMALL_RECIPES[recipe], **options}
    model = build("flow", recipe, **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scatter * torch.randn_like(parameter))
    return model


def pictures(model: PictureFlow, n: int) -> Tensor:
    return model.dequantize(torch.randint(model.config.levels, (n, *model.config.shape))).double()


@pytest.mark.parametrize("options", [{}, {"margin": 0.1}, {"margin": None}, {"shape": (3, 4, 4)}, {"classes": None}])
def test_ladj_is_that_of_the_jacobian(recipe, options):
    model = shaken(recipe, **options)
    v = torch.rand(1, *model.config.shape, dtype=torch.float64)
    label = None if model.config.classes is None else torch.tensor([2])
    z, ladj = model.flow.transform(v, label)
    jacobian = torch.autograd.functional.jacobian(lambda v: model.flow.encode(v, label).flatten(), v)
    slogdet = torch.linalg.slogdet(jacobian.reshape(z.numel(), z.numel())).logabsdet
    torch.testing.assert_close(ladj[0], slogdet)
    assert z.shape == v.shape
    back, minus = model.flow.transform.inverse(z, label)
    torch.testing.assert_close(back, v)
    torch.testing.assert_close(minus, -ladj)


def test_log_prob_is_the_density_in_the_cell_times_its_volume(recipe):
    model = shaken(recipe)
    x, ids, labels = pictures(model, 3), torch.tensor([4, 9, 2]), torch.tensor([0, 1, 2])
    if model.dequantizer is None:
        u, log_q = ops.uniform(ids, TINY, seed=7, dtype=torch.float64), torch.zeros(3)
    else:
        u, log_q = model.dequantizer.sample_and_log_prob(3, context=x, ids=ids, seed=7)
        assert ((u > 0) & (u < 1)).all()
    v = (torch.round((x + 1) * 2) + u) / 5
    expected = model.flow.log_prob(v, labels) - log_q - 16 * math.log(5)
    torch.testing.assert_close(model.log_prob(x, condition=labels, ids=ids, seed=7), expected)
    assert model.density is Density.EXACT
    assert not model.discrete


def test_loss_is_the_mean_negative_log_likelihood_per_dimension(recipe):
    model = shaken(recipe, scatter=0.05)
    # Black pictures, whose density changes across the cell: the noise must fill it.
    x, labels = torch.full((8, *TINY), -1.0, dtype=torch.float64), torch.arange(8) % 3
    torch.manual_seed(3)
    losses = torch.stack([model.loss(x, condition=labels).detach() for _ in range(40)])
    nats = torch.stack([-model.log_prob(x, condition=labels, seed=s).detach().mean() / 16 for s in range(40)])
    assert abs(losses.mean() - nats.mean()) < 5 * (losses.var() / 40 + nats.var() / 40).sqrt()


def test_decode_undoes_encode(recipe):
    model = shaken(recipe)
    x, labels = pictures(model, 5), torch.arange(5) % 3
    with torch.no_grad():
        assert torch.equal(model.decode(model.encode(x, condition=labels), condition=labels), x.float())


def test_a_sample_is_its_number_whatever_the_batch(recipe):
    model = shaken(recipe)
    whole = model.sample(12, seed=5)
    ids = torch.tensor([7, 0, 11])
    assert torch.equal(model.sample(3, ids=ids, seed=5), whole[ids])
    assert torch.equal(model.sample(3, ids=ids, condition=ids % 3, seed=5), whole[ids])
    assert not torch.equal(model.sample(12, seed=6), whole)
    assert torch.equal(model.dequantize(model.quantize(whole)), whole)


def test_the_class_changes_samples_and_densities(recipe):
    model = shaken(recipe, scatter=0.3)
    ids, labels = torch.arange(6), torch.arange(6) % 3
    x = pictures(model, 6)
    assert not torch.equal(
        model.sample(6, ids=ids, condition=labels), model.sample(6, ids=ids, condition=(labels + 1) % 3)
    )
    one, other = model.log_prob(x, condition=labels), model.log_prob(x, condition=(labels + 1) % 3)
    assert not torch.isclose(one, other).any()


def test_trajectory_goes_from_the_prior_to_the_sample(recipe):
    model = shaken(recipe)
    ids = torch.tensor([3, 8])
    stages = model.trajectory(2, ids=ids, seed=1)
    assert (stages[0].label, stages[-1].label) == ("Z", "X")
    assert torch.equal(stages[0].values, model.flow.base.sample(2, ids=ids, seed=1))
    assert torch.equal(stages[-1].values, model.sample(2, ids=ids, seed=1))
    assert all(stage.values.shape == (2, *TINY) for stage in stages)


@pytest.mark.parametrize("memory", [mode for mode in MODES if mode != "store"])
def test_gradients_are_those_of_store(recipe, memory):
    model = shaken(recipe).train()
    frugal = build("flow", recipe, **{**model.config_dict(), "memory": memory}).double().train()
    frugal.load_state_dict(model.state_dict())
    assert frugal.flow.transform.memory == memory
    x, labels = pictures(model, 6), torch.arange(6) % 3
    gradients = []
    for each in (model, frugal):
        torch.manual_seed(4)
        loss = each.loss(x, condition=labels)
        gradients.append([loss, *torch.autograd.grad(loss, list(each.parameters()), allow_unused=True)])
    for actual, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_loss_compiles_without_a_break(recipe):
    # One graph with its autograd, run by eager kernels: what the code generator makes of it is PyTorch's to test.
    shallow = {name: 1 for name in ("scales", "steps", "couplings") if name in SMALL_RECIPES[recipe]}
    model = shaken(recipe, **shallow).float()
    x, labels = pictures(model, 4).float(), torch.arange(4) % 3
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    losses, gradients = [], []
    for function in (compiled, model.loss):
        torch.manual_seed(1)
        loss = function(x, condition=labels)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(losses[0], losses[1])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_first_batch_starts_what_needs_data(recipe):
    torch.manual_seed(0)
    model = build("flow", recipe, shape=TINY, levels=5, classes=3, **SMALL_RECIPES[recipe]).train()
    x, labels = pictures(model, 32).float(), torch.arange(32) % 3
    first = model.loss(x, condition=labels)
    first.backward()
    assert first.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    twin = copy.deepcopy(model).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.sample(2), model.eval().sample(2))


def test_bad_input_is_named(recipe):
    model = shaken(recipe)
    with pytest.raises(ValueError, match=r"x has shape \(3,\), but expected \(n, 1, 4, 4\)"):
        model.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="condition is None"):
        model.log_prob(torch.zeros(3, *TINY))
    with pytest.raises(ValueError, match=r"z has shape \(3, 1, 8, 4\), but expected \(n, 1, 4, 4\)"):
        model.decode(torch.zeros(3, 1, 8, 4), condition=torch.zeros(3))
    with pytest.raises(ValueError, match="steps is 7"):
        model.sample(2, steps=7)


@pytest.mark.parametrize("name", ["margin", "memory"])
def test_bad_settings_of_every_recipe_are_named(recipe, name):
    value = {"margin": 0.5, "memory": "forget"}[name]
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        build("flow", recipe, **{**SMALL_RECIPES[recipe], name: value})


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("nice", {"couplings": 0}, "couplings is 0"),
        ("nice", {"shape": (1, 1, 1)}, r"shape is \(1, 1, 1\), but expected at least two values"),
        ("nsf", {"bins": 1}, "bins is 1, but expected at least 2"),
        ("nsf", {"bound": 0.0}, "bound is 0.0"),
        ("nsf", {"dropout": 1.0}, "dropout is 1.0"),
        ("nsf", {"shape": (1, 1, 1)}, r"shape is \(1, 1, 1\), but expected at least two values"),
        ("glow", {"steps": 0}, "steps is 0"),
        ("glow", {"width": 0}, "width is 0"),
        ("glow", {"scales": 4}, r"shape is \(1, 4, 4\) with scales 4, but expected .* divisible by 16"),
    ],
)
def test_bad_settings_are_named(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        build("flow", recipe, **{"shape": TINY, **SMALL_RECIPES[recipe], **options})
