"""The contract that the five families share, on every recipe of every family through the registry."""

from __future__ import annotations

import copy
import inspect

import autoregressive_cases
import flow_cases
import pytest
import torch

from pygen.model import Density, DensityUnavailable, GenerativeModel, Stage
from pygen.workbench.families import FAMILIES, build

DENSITIES = {
    "gan": Density.IMPLICIT,
    "vae": Density.LOWER_BOUND,
    "flow": Density.EXACT,
    "diffusion": Density.LOWER_BOUND,
    "autoregressive": Density.EXACT,
}
SHAPE, LEVELS, CLASSES = (1, 8, 8), 17, 10
SMALL = {"flow": flow_cases.SMALL_RECIPES, "autoregressive": autoregressive_cases.SMALL_RECIPES}
RECIPES = [(family, recipe) for family, recipes in FAMILIES.items() for recipe in recipes]


def small(family: str, recipe: str, **config: object) -> GenerativeModel:
    torch.manual_seed(0)
    return build(family, recipe, **SMALL.get(family, {}).get(recipe, {}), **config).eval()


@pytest.fixture(params=RECIPES, ids="-".join, scope="module")
def named(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def model(named: tuple[str, str]) -> GenerativeModel:
    return small(*named, shape=SHAPE, levels=LEVELS, classes=CLASSES)


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randint(0, LEVELS, (6, *SHAPE)) * (2 / (LEVELS - 1)) - 1


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 9])


def steps_of(model: GenerativeModel) -> int | None:
    """Few steps where they can be chosen, to keep the tests quick."""
    return 3 if type(model).__name__ == "Diffusion" else None


def test_the_registry_has_the_five_families():
    assert set(FAMILIES) == set(DENSITIES)


def test_density(named, model):
    assert model.density is DENSITIES[named[0]]


def test_samples_are_pictures(model):
    x = model.sample(3, steps=steps_of(model))
    assert x.shape == (3, *SHAPE)
    assert x.dtype == torch.float32
    assert not x.requires_grad
    assert x.isfinite().all()
    assert x.abs().max() <= 1


def test_a_sample_is_the_same_in_any_batch(model):
    steps = steps_of(model)
    ids = torch.tensor([7, 2, 2**40 + 1, 3])
    together = model.sample(4, ids=ids, seed=5, steps=steps)
    for order in (torch.tensor([2, 0, 3, 1]), torch.tensor([1])):
        again = model.sample(len(order), ids=ids[order], seed=5, steps=steps)
        torch.testing.assert_close(again, together[order], rtol=1e-4, atol=1e-4)
    other = model.sample(4, ids=ids, seed=6, steps=steps)
    assert not torch.allclose(other, together, atol=1e-3)


def test_the_condition_defaults_to_the_classes_in_turn(model):
    ids = torch.tensor([3, 14])
    given = model.sample(2, ids=ids, condition=torch.tensor([3, 4]), steps=steps_of(model))
    assert torch.equal(given, model.sample(2, ids=ids, steps=steps_of(model)))


def test_sampling_leaves_the_generator_and_the_mode_alone(model):
    before = torch.get_rng_state()
    mode = model.training
    model.sample(2, steps=steps_of(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training == mode


def test_log_prob(model, pictures, labels):
    if model.density is Density.IMPLICIT:
        with pytest.raises(DensityUnavailable, match="no density.*evaluate"):
            model.log_prob(pictures, condition=labels)
        return
    nats = model.log_prob(pictures, condition=labels)
    assert nats.shape == (6,)
    assert nats.isfinite().all()
    assert (nats < 0).all(), "the probability of a picture of discrete values is below 1"
    again = model.log_prob(pictures, condition=labels)
    assert torch.equal(nats, again), "the noise of a bound is addressed, so it repeats"
    alone = model.log_prob(pictures[2:3], condition=labels[2:3], ids=torch.tensor([2]))
    torch.testing.assert_close(alone, nats[2:3], rtol=1e-4, atol=1e-2)


def test_trajectory_ends_in_the_sample(model):
    steps = steps_of(model)
    stages = model.trajectory(2, seed=1, steps=steps)
    assert all(isinstance(stage, Stage) and len(stage.values) == 2 and stage.label for stage in stages)
    assert len(stages) >= 2
    torch.testing.assert_close(stages[-1].values, model.sample(2, seed=1, steps=steps), rtol=1e-4, atol=1e-4)


def test_every_player_descends_on_its_own_parameters(model, pictures, labels):
    model = copy.deepcopy(model).train()
    groups = model.players()
    owned = [id(parameter) for group in groups.values() for parameter in group]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(parameter) for parameter in model.parameters()}
    for player, group in groups.items():
        model.zero_grad()
        loss = model.loss(pictures, player=player, condition=labels)
        assert loss.shape == ()
        loss.backward()
        assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in group)
        others = [p for name, other in groups.items() if name != player for p in other]
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in others)


def test_steps_are_refused_where_they_cannot_be_chosen(model):
    if steps_of(model) is None:
        with pytest.raises(ValueError, match="steps is 4"):
            model.sample(1, steps=4)
        assert model.network_passes() >= 1
    else:
        assert model.network_passes(4) == 4
        with pytest.raises(ValueError, match="steps is 0"):
            model.sample(1, steps=0)


def test_wrong_input_gets_one_sentence(model, pictures, labels):
    with pytest.raises(ValueError, match=r"condition has shape \(2,\), but expected \(3,\)"):
        model.sample(3, condition=labels[:2])
    with pytest.raises(ValueError, match=r"ids has shape \(2,\), but expected \(3,\)"):
        model.sample(3, ids=torch.arange(2))
    player = next(iter(model.players()))
    with pytest.raises(ValueError, match="x has shape"):
        model.loss(pictures[:, :, :4], player=player, condition=labels)
    with pytest.raises(ValueError, match="condition is None"):
        model.loss(pictures, player=player)
    with pytest.raises(ValueError, match="player is 'nobody'"):
        model.loss(pictures, player="nobody", condition=labels)
    if model.density is not Density.IMPLICIT:
        with pytest.raises(ValueError, match="x has shape"):
            model.log_prob(pictures[:, :, :4], condition=labels)
    with pytest.raises(ValueError, match="label 12, but expected labels from 0 to 9"):
        model.loss(pictures, player=player, condition=labels + 3)
    with pytest.raises(ValueError, match="n is 0|n is -1"):
        model.sample(-1)


def test_signatures_are_those_of_the_contract(model):
    for name in ("sample", "log_prob", "trajectory", "loss", "encode", "decode"):
        ours = inspect.signature(getattr(GenerativeModel, name)).parameters
        theirs = inspect.signature(getattr(type(model), name)).parameters
        for parameter in ours:
            assert parameter in theirs, f"{type(model).__name__}.{name} has no {parameter}"
        extra = [p for n, p in theirs.items() if n not in ours]
        assert all(p.default is not inspect.Parameter.empty for p in extra)


def test_without_labels(named):
    model = small(*named, shape=SHAPE, levels=LEVELS, classes=None)
    assert model.sample(2, steps=steps_of(model)).shape == (2, *SHAPE)
    with pytest.raises(ValueError, match="without classes"):
        model.sample(2, condition=torch.tensor([0, 1]))


def test_colour_pictures(named):
    model = small(*named, shape=(3, 8, 8), levels=8, classes=None)
    player = next(iter(model.players()))
    assert model.loss(torch.zeros(2, 3, 8, 8), player=player).isfinite()
    assert model.sample(1, steps=steps_of(model)).shape == (1, 3, 8, 8)
