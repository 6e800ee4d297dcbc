"""The GAN behind the contract: players, gradients, penalties, addressed samples, compilation, errors."""

import copy
import dataclasses
import pickle

import pytest
import torch
from sklearn.datasets import load_digits

from pygen.gan import GAN, OBJECTIVES, GANConfig, losses
from pygen.model import Density, DensityUnavailable


def gan(**fields):
    torch.manual_seed(0)
    model = GAN(GANConfig(**{"width": 4, "features": 16, "latent": 6, "embedding": 5} | fields))
    # A fresh network is linear in its last convolutions' zeros; move away from that special point.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batch(model, n=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, *model.config.shape, generator=generator) * 2 - 1
    condition = None if model.config.classes is None else torch.arange(n) % model.config.classes
    return x, condition


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 5, 7)])
@pytest.mark.parametrize("classes", [None, 3])
def test_shapes(shape, classes):
    model = gan(shape=shape, classes=classes)
    pictures = model.sample(4)
    assert pictures.shape == (4, *shape)
    assert pictures.dtype == torch.float32
    assert pictures.abs().max() <= 1
    assert not pictures.requires_grad
    assert model.sample(0).shape == (0, *shape)
    x, condition = batch(model)
    for player in model.players():
        loss = model.loss(x, player=player, condition=condition)
        assert loss.shape == ()
        assert loss.isfinite()


def test_a_sample_is_its_number_in_any_batch_and_order():
    model = gan()
    ids = torch.tensor([7, 2, 2**40, 0, 31])
    labels = torch.tensor([3, 9, 1, 0, 5])
    together = model.sample(5, ids=ids, condition=labels, seed=4)
    order = torch.tensor([4, 0, 3, 1, 2])
    torch.testing.assert_close(
        model.sample(5, ids=ids[order], condition=labels[order], seed=4), together[order], rtol=0, atol=1e-5
    )
    for i in range(5):
        alone = model.sample(1, ids=ids[i : i + 1], condition=labels[i : i + 1], seed=4)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    assert not torch.allclose(model.sample(5, ids=ids, condition=labels, seed=5), together, atol=1e-2)


def test_samples_cycle_through_the_classes_and_depend_on_them():
    model = gan(classes=3)
    ids = torch.tensor([4, 5])
    torch.testing.assert_close(model.sample(2, ids=ids), model.sample(2, ids=ids, condition=torch.tensor([1, 2])))
    assert not torch.allclose(model.sample(2, ids=ids), model.sample(2, ids=ids, condition=torch.tensor([0, 0])))


def test_trajectory_goes_from_z_to_the_sample():
    model = gan()
    z, x = model.trajectory(3, seed=2)
    assert (z.label, x.label) == ("Z", "X")
    assert z.values.shape == (3, 6)
    assert torch.equal(x.values, model.sample(3, seed=2))
    torch.testing.assert_close(model.decode(z.values, condition=torch.arange(3)), x.values)
    assert model.network_passes() == 1


def test_decode_is_differentiable_in_z():
    model = gan()
    z = torch.randn(2, 6, requires_grad=True)
    model.decode(z, condition=torch.tensor([0, 1])).sum().backward()
    assert z.grad.abs().sum() > 0


def test_density():
    model = gan()
    assert model.density is Density.IMPLICIT
    with pytest.raises(DensityUnavailable, match=r"GAN has no density; compare its samples instead"):
        model.log_prob(*batch(model)[:1])
    with pytest.raises(NotImplementedError):
        model.encode(batch(model)[0])


def test_players_partition_the_parameters_in_the_order_of_updates():
    model = gan()
    players = model.players()
    assert list(players) == ["discriminator", "generator"]
    ids = [id(parameter) for parameters in players.values() for parameter in parameters]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("player", ["discriminator", "generator"])
def test_only_the_player_gets_gradients(objective, player):
    model = gan(loss=objective)
    x, condition = batch(model)
    model.loss(x, player=player, condition=condition).backward()
    for name, parameters in model.players().items():
        for parameter in parameters:
            assert (parameter.grad is not None) == (name == player)
    assert sum(parameter.grad.abs().sum() for parameter in model.players()[player]) > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_the_objective_plus_the_weighted_penalties(objective):
    model = gan(loss=objective, r1=0.7, r2=1.3, gp=2.0).double()
    x, condition = batch(model)
    x = x.double()
    torch.manual_seed(3)
    value = model.loss(x, player="discriminator", condition=condition)
    torch.manual_seed(3)
    z, share = torch.randn(6, 6), torch.rand(6, 1, 1, 1)
    fake = model.generator(z.double(), condition).detach()
    penalties = []
    for pictures in (x, fake, x + share * (fake - x)):
        leaf = pictures.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(model.discriminator(leaf, condition).sum(), leaf)
        penalties.append(gradient.flatten(1).norm(dim=1))
    real_score, fake_score = model.discriminator(x, condition), model.discriminator(fake, condition)
    expected = losses.discriminator_loss(objective, real_score, fake_score)
    expected = expected + 0.7 * penalties[0].square().mean() / 2 + 1.3 * penalties[1].square().mean() / 2
    expected = expected + 2.0 * (penalties[2] - 1).square().mean()
    torch.testing.assert_close(value, expected)
    torch.manual_seed(3)
    value = model.loss(x, player="generator", condition=condition)
    torch.testing.assert_close(value, losses.generator_loss(objective, fake_score, real_score))


def test_penalties_in_force():
    assert GANConfig().penalties == losses.Penalties(r1=0.1, r2=0.1)
    assert GANConfig(r2=0).penalties == losses.Penalties(r1=0.1)
    assert GANConfig(loss="wgan_gp").penalties == losses.Penalties(gp=10.0)
    assert GANConfig(loss="hinge").penalties == losses.Penalties()
    assert GANConfig(loss="minimax", r1=2.5).penalties == losses.Penalties(r1=2.5)


def test_a_few_steps_on_digits_teach_the_discriminator_and_then_the_generator():
    digits = load_digits()
    x = torch.tensor(digits.images[:256], dtype=torch.float32)[:, None] / 8 - 1
    condition = torch.tensor(digits.target[:256])
    model = gan(width=8)
    for player, parameters in model.players().items():
        optimizer = torch.optim.Adam(parameters, 2e-3)
        values = []
        for _ in range(20):
            torch.manual_seed(0)
            loss = model.loss(x, player=player, condition=condition)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = gan().to(dtype)
    x, condition = batch(model)
    for player in model.players():
        loss = model.loss(x, player=player, condition=condition)
        loss.backward()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert model.sample(2).dtype == dtype


def test_loss_under_bf16_autocast_is_close_to_float32():
    model = gan()
    x, condition = batch(model)
    for player in model.players():
        torch.manual_seed(0)
        exact = model.loss(x, player=player, condition=condition)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(x, player=player, condition=condition)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.02)


# Tracing and AOTAutograd decide whether the graph is whole and its gradients right; generating C++ for the
# second-order graph would take minutes and decides nothing.
@pytest.mark.parametrize(
    ("objective", "player"),
    [("relativistic", "discriminator"), ("relativistic", "generator"), ("wgan_gp", "discriminator")],
)
def test_loss_passes_through_compile(objective, player, monkeypatch):
    model = gan(loss=objective)
    x, condition = batch(model)
    noise = {"randn": torch.randn(6, 6), "rand": torch.rand(6, 1, 1, 1)}
    for name, values in noise.items():
        monkeypatch.setattr(torch, name, lambda *size, values=values, **kwargs: values)
    expected = model.loss(x, player=player, condition=condition)
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(x, player=player, condition=condition)
    torch.testing.assert_close(loss, expected)
    parameters = model.players()[player]
    for gradient, want in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


def test_sample_passes_through_compile():
    model = gan()
    ids, condition = torch.arange(4), torch.arange(4)
    compiled = torch.compile(model.sample, fullgraph=True, backend="aot_eager")
    picture = compiled(4, ids=ids, condition=condition, seed=3)
    torch.testing.assert_close(picture, model.sample(4, ids=ids, condition=condition, seed=3))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_apart(copier):
    model = gan()
    twin = copier(model)
    assert twin.config == model.config
    before = model.sample(3)
    assert torch.equal(twin.sample(3), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert torch.equal(model.sample(3), before)
    assert not torch.equal(twin.sample(3), before)


def test_config_round_trips_through_plain_values():
    model = gan(loss="hinge", r1=0.5)
    assert GANConfig(**model.config_dict()) == model.config
    twin = GAN(GANConfig(**model.config_dict()))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.sample(2), model.sample(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "wasserstein"}, "loss is 'wasserstein', but expected one of relativistic, minimax"),
        ({"latent": 0}, "latent is 0, but expected a positive number"),
        ({"blocks": -1}, "blocks is -1, but expected a positive number"),
        ({"r1": -0.1}, "r1 is -0.1, but expected a finite number that is not negative, or None"),
        ({"gp": float("nan")}, "gp is nan, but expected"),
        ({"shape": (1, 0, 8)}, "shape is"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        GANConfig(**fields)
    assert "\n" not in message
    assert dataclasses.is_dataclass(GANConfig)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x, y: m.loss(x, condition=y), ValueError, "player is 'model', but expected 'discriminator' or"),
        (lambda m, x, y: m.loss(x[0], player="generator", condition=y), ValueError, r"x has shape \(1, 8, 8\)"),
        (lambda m, x, y: m.loss(x.long(), player="generator", condition=y), TypeError, r"x has dtype torch.int64"),
        (lambda m, x, y: m.loss(x, player="generator"), ValueError, "condition is None, but GAN was built for 10"),
        (lambda m, x, y: m.loss(x, player="generator", condition=y[:2]), ValueError, r"condition has shape \(2,\)"),
        (lambda m, x, y: m.decode(torch.zeros(2, 5), condition=y[:2]), ValueError, r"z has shape \(2, 5\)"),
        (lambda m, x, y: m.sample(2, ids=torch.arange(3)), ValueError, r"ids has shape \(3,\)"),
        (lambda m, x, y: m.sample(-1), ValueError, "n is -1"),
        (lambda m, x, y: m.sample(2, steps=4), ValueError, "steps is 4, but GAN always takes 1"),
    ],
)
def test_bad_input_is_named_in_one_sentence(call, error, message):
    model = gan()
    with pytest.raises(error, match=message) as caught:
        call(model, *batch(model))
    assert "\n" not in str(caught.value)
