"""The VAE behind the contract: bounds, posterior, addressed samples, compilation, errors."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from sklearn.datasets import load_digits

from pygen import ops
from pygen.model import Density
from pygen.vae import VAE, Posterior, VAEConfig, discretized_logistic_log_prob
from pygen.vae.likelihood import discretized_logistic_draw
from pygen.vae.vae import LOG_VARIANCE_RANGE, PIXEL_DRAW, POSTERIOR_DRAW, standard_normal_log_prob


def vae(**fields):
    torch.manual_seed(0)
    model = VAE(VAEConfig(**{"width": 4, "latent": 3, "embedding": 5} | fields))
    # Away from the zeros that a fresh network starts from.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(model, n=6):
    generator = torch.Generator().manual_seed(1)
    x = model.dequantize(torch.randint(model.config.levels, (n, *model.config.shape), generator=generator))
    condition = None if model.config.classes is None else torch.arange(n) % model.config.classes
    return x, condition


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 5, 7)])
@pytest.mark.parametrize("classes", [None, 3])
def test_shapes(shape, classes):
    model = vae(shape=shape, classes=classes)
    x, condition = batch(model)
    assert model.sample(4).shape == (4, *shape)
    assert model.sample(0).shape == (0, *shape)
    assert not model.sample(1).requires_grad
    assert model.log_prob(x, condition=condition).shape == (6,)
    assert model.encode(x, condition=condition).shape == (6, 3)
    assert model.decode(torch.zeros(6, 3), condition=condition).shape == (6, *shape)
    loss = model.loss(x, condition=condition)
    assert loss.shape == ()
    assert loss.isfinite()


@pytest.mark.parametrize("pixels", ["mean", "draw"])
def test_a_sample_is_its_number_in_any_batch_and_order(pixels):
    model = vae(pixels=pixels)
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


def test_log_prob_depends_on_seed_and_id_and_not_on_the_batch():
    model = vae()
    x, condition = batch(model)
    ids = torch.tensor([5, 1, 9, 100, 0, 3])
    for samples in (1, 3):
        bound = model.log_prob(x, condition=condition, ids=ids, seed=2, importance_samples=samples)
        order = torch.tensor([3, 5, 0, 1, 4, 2])
        again = model.log_prob(x[order], condition=condition[order], ids=ids[order], seed=2, importance_samples=samples)
        torch.testing.assert_close(again, bound[order], rtol=1e-5, atol=1e-4)
        other = model.log_prob(x, condition=condition, ids=ids, seed=3, importance_samples=samples)
        assert not torch.allclose(other, bound, atol=1e-2)


def test_trajectory_goes_from_z_to_the_sample():
    model = vae(pixels="mean")
    z, x = model.trajectory(3, seed=2)
    assert (z.label, x.label) == ("Z", "X")
    assert z.values.shape == (3, 3)
    torch.testing.assert_close(model.decode(z.values, condition=torch.arange(3)), x.values)
    drawn = vae(pixels="draw")
    first, last = drawn.trajectory(3, seed=2)
    assert torch.equal(first.values, z.values)
    assert torch.equal(last.values, drawn.sample(3, seed=2))
    assert model.network_passes() == 1


def test_drawn_samples_are_quantized_and_average_to_the_likelihood():
    model = vae(classes=None, levels=5)
    z = model.trajectory(1)[0].values
    assert torch.equal(model.dequantize(model.quantize(model.sample(3))), model.sample(3))
    # One prior point with many pixel draws: the prior's stream is held while the pixels' ids run.
    mean, log_scale = (value.detach() for value in model.likelihood(z))
    count = 20000
    uniform = ops.uniform(torch.arange(count), model.config.shape, seed=0, draw=PIXEL_DRAW)
    torch.testing.assert_close(
        model.sample(1)[0], discretized_logistic_draw(uniform[0], mean[0], log_scale[0], levels=5)
    )
    drawn = discretized_logistic_draw(uniform, mean, log_scale, levels=5)
    values = model.dequantize(torch.arange(5)).reshape(5, 1, 1, 1)
    probability = discretized_logistic_log_prob(values, mean, log_scale, levels=5).exp()
    # Five standard errors of a mean of values in [-1, 1].
    assert ((probability * values).sum(0) - drawn.mean(0)).abs().max() < 5 / math.sqrt(count)


def test_players_density_and_latents():
    model = vae()
    assert model.density is Density.LOWER_BOUND
    assert {id(p) for p in model.players()["model"]} == {id(p) for p in model.parameters()}
    x, condition = batch(model)
    assert torch.equal(model.encode(x, condition=condition), model.posterior(x, condition=condition).mean)
    picture = model.decode(torch.full((2, 3), 3.0), condition=condition[:2])
    assert picture.abs().max() <= 1


def test_kl_is_the_expected_log_ratio():
    posterior = Posterior(torch.tensor([[0.7, -1.1]]), torch.tensor([[-1.0, 0.4]]))
    generator = torch.Generator().manual_seed(0)
    z = posterior.draw(torch.randn(400_000, 2, generator=generator))
    ratio = posterior.log_prob(z) - standard_normal_log_prob(z)
    assert abs(ratio.mean() - posterior.kl().sum()) < 5 * ratio.std() / math.sqrt(400_000)
    assert posterior.kl().shape == (1, 2)


def test_kl_near_the_prior_keeps_its_digits():
    # To second order KL(N(0, e^lv) || N(0, 1)) = lv^2 / 4, far below float32's rounding of e^lv - 1.
    posterior = Posterior(torch.zeros(1, 1), torch.full((1, 1), 2.0**-9))
    assert posterior.kl().item() == pytest.approx(2.0**-20, rel=2e-3)


def test_gaussian_log_prob_is_torch_distributions():
    mean, log_variance, z = torch.randn(3, 4, 5).unbind()
    expected = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(z).sum(1)
    torch.testing.assert_close(Posterior(mean, log_variance).log_prob(z), expected)
    torch.testing.assert_close(standard_normal_log_prob(z), torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1))


def test_log_variance_is_clamped():
    model = vae()
    x, condition = batch(model)
    with torch.no_grad():
        model.encoder.exit.bias[3:] = torch.tensor([1e4, -1e4, 0.0])
    log_variance = model.posterior(x, condition=condition).log_variance
    assert log_variance[:, 0].unique().item() == LOG_VARIANCE_RANGE[1]
    assert log_variance[:, 1].unique().item() == LOG_VARIANCE_RANGE[0]
    assert model.log_prob(x, condition=condition, importance_samples=2).isfinite().all()


@pytest.mark.parametrize(("beta", "free_bits"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.3), (2.0, 0.1)])
def test_loss_is_the_negative_bound_per_dimension(beta, free_bits):
    model = vae(beta=beta, free_bits=free_bits)
    x, condition = batch(model)
    torch.manual_seed(5)
    loss = model.loss(x, condition=condition)
    torch.manual_seed(5)
    posterior = model.posterior(x, condition=condition)
    z = posterior.draw(torch.randn(6, 3))
    mean, log_scale = model.likelihood(z, condition=condition)
    nats = -discretized_logistic_log_prob(x, mean, log_scale, levels=17).sum((1, 2, 3)).mean()
    per_dimension = posterior.kl().mean(0)
    assert (per_dimension < 0.3).any()
    assert (per_dimension > 0.1).any()
    kl = sum(max(free_bits, value) for value in per_dimension.tolist())
    assert loss.item() == pytest.approx((nats.item() + beta * kl) / 64, rel=1e-5)


def test_pictures_are_taken_at_the_nearest_level():
    model = vae()
    x, condition = batch(model)
    close = x + (torch.rand_like(x) - 0.5) * 0.9 * 2 / 16
    posterior = model.posterior(x, condition=condition)
    embedded = model.embedding(condition)
    assert torch.equal(
        model._log_likelihood(close, posterior.mean, embedded), model._log_likelihood(x, posterior.mean, embedded)
    )


@pytest.fixture(scope="module")
def trained():
    """A tiny VAE after a few steps, so that its posterior is neither the prior nor exact; and its losses."""
    digits = load_digits()
    x = torch.tensor(digits.images[:512], dtype=torch.float32)[:, None] / 8 - 1
    condition = torch.tensor(digits.target[:512])
    torch.manual_seed(0)
    model = VAE(VAEConfig(width=8, latent=4))
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    values = []
    for step in range(60):
        rows = torch.arange(64) + 64 * (step % 8)
        loss = model.loss(x[rows], condition=condition[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return model, x[:16], condition[:16], values


def test_a_few_steps_on_digits_lower_the_loss(trained):
    values = trained[3]
    assert sum(values[-5:]) / 5 < 0.85 * sum(values[:5]) / 5


def many_bounds(model, x, condition, importance_samples):
    # Each picture under 32 ids: 32 independent estimates of its bound.
    x, condition = x[:8].repeat_interleave(32, 0), condition[:8].repeat_interleave(32)
    with torch.no_grad():
        return model.log_prob(x, condition=condition, importance_samples=importance_samples).reshape(-1, 32)


def test_more_importance_samples_tighten_the_bound(trained):
    model, x, condition, _ = trained
    bounds = [many_bounds(model, x, condition, k) for k in (1, 4, 16)]
    # The same pictures under the same ids: what counts is the spread of the difference, picture by picture.
    for looser, tighter in itertools.pairwise(bounds):
        gain = tighter.mean(1) - looser.mean(1)
        error = ((tighter - looser).var(1) / looser.shape[1]).mean().div(len(gain)).sqrt()
        assert gain.mean() > 3 * error


def test_importance_weighted_bound_is_the_log_mean_of_the_weights(trained):
    model, x, condition, _ = trained
    posterior = model.posterior(x, condition=condition)
    weights = []
    for draw in range(3):
        z = posterior.draw(ops.noise(torch.arange(16), (4,), seed=7, draw=POSTERIOR_DRAW + draw))
        mean, log_scale = model.likelihood(z, condition=condition)
        log_likelihood = discretized_logistic_log_prob(x, mean, log_scale, levels=17).sum((1, 2, 3))
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
        encoder = torch.distributions.Normal(posterior.mean, (posterior.log_variance / 2).exp()).log_prob(z).sum(1)
        weights.append((log_likelihood + prior - encoder).double())
    expected = torch.stack(weights).exp().mean(0).log().float()
    bound = model.log_prob(x, condition=condition, seed=7, importance_samples=3)
    torch.testing.assert_close(bound, expected, rtol=1e-5, atol=1e-3)
    elbo = model.log_prob(x, condition=condition, seed=7)
    z = posterior.draw(ops.noise(torch.arange(16), (4,), seed=7, draw=POSTERIOR_DRAW))
    log_likelihood = weights[0].float() + posterior.log_prob(z) - standard_normal_log_prob(z)
    torch.testing.assert_close(elbo, log_likelihood - posterior.kl().sum(1), rtol=1e-5, atol=1e-3)


def test_the_bound_approaches_the_integral_over_z():
    # With a latent of one dimension p(x) is an integral that a fine grid computes.
    model = vae(latent=1, shape=(1, 3, 3), classes=None, levels=3)
    x, _ = batch(model, 4)
    z = torch.linspace(-9, 9, 4001)[:, None]
    with torch.no_grad():
        mean, log_scale = model.likelihood(z)
        log_likelihood = discretized_logistic_log_prob(x[:, None], mean, log_scale, levels=3).flatten(2).sum(2)
        exact = (log_likelihood + standard_normal_log_prob(z)).logsumexp(1) + math.log(18 / 4000)
        elbo = model.log_prob(x.repeat(500, 1, 1, 1)).reshape(500, 4).mean(0)
        iwae = model.log_prob(x, importance_samples=1000)
    assert (elbo < exact + 0.01).all()
    torch.testing.assert_close(iwae, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = vae().to(dtype)
    x, condition = batch(model)
    loss = model.loss(x, condition=condition)
    loss.backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == model.log_prob(x, condition=condition).dtype == wide
    assert model.sample(2).isfinite().all()


def test_loss_under_bf16_autocast_is_close_to_float32():
    model = vae()
    x, condition = batch(model)
    torch.manual_seed(0)
    exact = model.loss(x, condition=condition)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(x, condition=condition)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_loss_passes_through_compile():
    model = vae()
    x, condition = batch(model)
    torch.manual_seed(0)
    expected = model.loss(x, condition=condition)
    torch.manual_seed(0)
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(x, condition=condition)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for gradient, want in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(gradient, want)


def test_log_prob_and_sample_pass_through_compile():
    model = vae()
    x, condition = batch(model)
    ids = torch.arange(6)
    log_prob = torch.compile(model.log_prob, fullgraph=True)
    torch.testing.assert_close(
        log_prob(x, condition=condition, ids=ids, seed=1), model.log_prob(x, condition=condition, ids=ids, seed=1)
    )
    sample = torch.compile(model.sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        sample(6, ids=ids, condition=condition, seed=1), model.sample(6, ids=ids, condition=condition, seed=1)
    )


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_apart(copier):
    model = vae(pixels="mean")
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
    model = vae(beta=0.5, pixels="mean")
    assert VAEConfig(**model.config_dict()) == model.config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent": 0}, "latent is 0, but expected a positive number"),
        ({"beta": -1.0}, "beta is -1.0, but expected a finite number that is not negative"),
        ({"free_bits": float("inf")}, "free_bits is inf, but expected"),
        ({"pixels": "median"}, "pixels is 'median', but expected one of mean, draw"),
        ({"levels": 1}, "levels is 1"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**fields)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x, y: m.loss(x, player="generator", condition=y), ValueError, "player is 'generator', but expected"),
        (
            lambda m, x, y: m.loss(x[0], condition=y),
            ValueError,
            r"x has shape \(1, 8, 8\), but expected \(n, 1, 8, 8\)",
        ),
        (lambda m, x, y: m.log_prob(x.long(), condition=y), TypeError, r"x has dtype torch.int64"),
        (lambda m, x, y: m.log_prob(x), ValueError, "condition is None, but VAE was built for 10"),
        (lambda m, x, y: m.log_prob(x, condition=y, importance_samples=0), ValueError, "importance_samples is 0"),
        (lambda m, x, y: m.encode(x, condition=y[:2]), ValueError, r"condition has shape \(2,\)"),
        (lambda m, x, y: m.decode(torch.zeros(2, 5), condition=y[:2]), ValueError, r"z has shape \(2, 5\)"),
        (lambda m, x, y: m.sample(2, ids=torch.arange(3)), ValueError, r"ids has shape \(3,\)"),
        (lambda m, x, y: m.sample(2, steps=4), ValueError, "steps is 4, but VAE always takes 1"),
    ],
)
def test_bad_input_is_named_in_one_sentence(call, error, message):
    model = vae()
    with pytest.raises(error, match=message) as caught:
        call(model, *batch(model))
    assert "\n" not in str(caught.value)
