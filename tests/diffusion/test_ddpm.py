"""Diffusion: exact where the best denoiser is known in closed form, and true to the contract where it is trained."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from pygen.diffusion import Diffusion, DiffusionConfig
from pygen.diffusion.schedule import cosine_log_snr, time_shares
from pygen.model import Density


def small(**changes) -> Diffusion:
    """A tiny model whose layers all have an effect: as it starts, many are zero."""
    settings = {"shape": (1, 6, 5), "levels": 5, "classes": 3, "timesteps": 20, "width": 8, "sample_steps": 6}
    torch.manual_seed(0)
    model = Diffusion(DiffusionConfig(**(settings | changes)))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def pictures(model: Diffusion, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return model.dequantize(torch.randint(model.config.levels, (n, *model.config.shape), generator=generator))


def labels(n: int) -> Tensor:
    return torch.arange(n) % 3


class Perfect(Diffusion):
    """A model whose prediction is the true mean of x_0 given x_t, so that no training error is left."""

    def mean_given(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def predict(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        _, alpha, sigma, c0, c1, *_ = self._at(t)
        return (self.mean_given(x, alpha, sigma) - c0 * x) / c1


class Gaussian(Perfect):
    """Every value is N(0.3, 0.15^2), not quantized."""

    def mean_given(self, x, alpha, sigma):
        gain = alpha * 0.15**2 / (alpha.square() * 0.15**2 + sigma.square())
        return 0.3 + gain * (x - alpha * 0.3)


class Dice(Perfect):
    """Every value is one of the five levels, independently, with these probabilities."""

    probabilities = torch.tensor([0.4, 0.05, 0.1, 0.15, 0.3])

    def mean_given(self, x, alpha, sigma):
        values = torch.linspace(-1, 1, 5)
        exponent = -0.5 * ((x[..., None] - alpha[..., None] * values) / sigma[..., None]).square()
        return (exponent + self.probabilities.log()).softmax(-1) @ values

    def draw(self, n: int) -> Tensor:
        k = torch.multinomial(self.probabilities, n * self.config.dimensions, replacement=True)
        return self.dequantize(k).view(n, *self.config.shape)


def analytic(kind: type[Perfect], **changes) -> Perfect:
    settings = {"shape": (1, 4, 4), "levels": 5, "classes": None, "timesteps": 500, "width": 4, "sample_steps": 1}
    return kind(DiffusionConfig(**(settings | changes)))


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 100), ("ddpm", 200)])
def test_a_gaussian_target_comes_out_with_its_mean_and_deviation(prediction, sampler, steps):
    x = analytic(Gaussian, levels=256, prediction=prediction, sampler=sampler).sample(1000, steps=steps)
    assert x.mean().item() == pytest.approx(0.3, abs=0.006)
    # A chain of finitely many steps loses a little of the spread (DDPM) and its discretization a little more (DDIM).
    assert x.std().item() == pytest.approx(0.15, rel=0.05)
    assert abs(torch.corrcoef(x.flatten(1).T) - torch.eye(16)).max() < 0.15


def test_one_step_gives_the_mean_and_more_steps_approach_the_spread():
    model = analytic(Gaussian, levels=256)
    spread = [model.sample(500, steps=steps).std().item() for steps in (1, 2, 8, 32, 128)]
    assert spread[0] < 0.01
    error = [abs(value - 0.15) for value in spread]
    assert error == sorted(error, reverse=True)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_mixture_comes_out_with_its_weights(sampler):
    model = analytic(Dice, sampler=sampler)
    x = model.sample(800, steps=250, seed=3)
    frequency = torch.bincount(model.quantize(x).flatten(), minlength=5) / x.numel()
    assert (frequency - model.probabilities).abs().max() < 0.02
    assert (x - model.dequantize(model.quantize(x))).abs().mean() < 0.01


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_the_bound_is_below_the_true_log_probability_and_close(schedule, prediction):
    torch.manual_seed(0)
    gaps = []
    for timesteps in (100, 800):
        settings = {"timesteps": timesteps, "bound_draws": timesteps, "schedule": schedule, "prediction": prediction}
        model = analytic(Dice, **settings)
        x = model.draw(300)
        truth = model.probabilities.log()[model.quantize(x)].flatten(1).sum(1)
        gap = (truth - model.log_prob(x)) / 16 / math.log(2)
        error = gap.std().item() / math.sqrt(len(gap))
        assert gap.mean().item() > -3 * error
        gaps.append(gap.mean().item())
    # What is left is the steps' length, and falls with it.
    assert gaps[1] < gaps[0] / 4
    assert gaps[1] < 0.05


def test_a_chain_that_stops_short_of_noise_pays_for_it(monkeypatch):
    # At lambda_T = 2 most of x_T is still the picture, and the standard normal is a poor guess of it.
    monkeypatch.setattr(
        "pygen.diffusion.ddpm.log_snr_table", lambda *_: cosine_log_snr(400, lowest=2.0, highest=2 * math.log(18))
    )
    torch.manual_seed(0)
    model = analytic(Dice, timesteps=400, bound_draws=400)
    x = model.draw(300)
    truth = model.probabilities.log()[model.quantize(x)].flatten(1).sum(1).mean()
    gap = (truth - model.log_prob(x).mean()).item() / 16
    # The marginal of x_T is a mixture of normals: its divergence from the standard normal, by the trapezoid rule.
    z = torch.linspace(-4, 4, 4001)
    alpha, sigma = model._times[400, 1:3]
    normals = torch.distributions.Normal(alpha * torch.linspace(-1, 1, 5), sigma)
    density = (normals.log_prob(z[:, None]).exp() * model.probabilities).sum(1)
    ratio = density.log() - torch.distributions.Normal(0.0, 1.0).log_prob(z)
    divergence = torch.trapezoid(density * ratio, z).item()
    assert divergence > 0.1
    assert gap == pytest.approx(divergence, abs=0.03)


def test_the_bound_is_a_bound_for_a_wrong_model_too():
    torch.manual_seed(0)
    model = analytic(Dice, timesteps=100, bound_draws=100)
    x = model.draw(600)
    truth = model.probabilities.log()[model.quantize(x)].flatten(1).sum(1).mean()
    right = model.log_prob(x).mean()
    model.probabilities = torch.tensor([0.1, 0.3, 0.3, 0.2, 0.1])
    wrong = model.log_prob(x).mean()
    assert wrong < right - 1
    assert right < truth + 0.3


def test_few_draws_of_the_sum_are_unbiased():
    torch.manual_seed(0)
    whole, few = (analytic(Dice, timesteps=60, bound_draws=draws) for draws in (60, 4))
    x = whole.draw(1500)
    difference = few.log_prob(x, seed=1) - whole.log_prob(x, seed=2)
    error = difference.std() / math.sqrt(len(x))
    assert difference.mean().abs() < 4 * error
    assert error < 0.5


def test_times_are_drawn_by_their_shares():
    model = small(timesteps=50)
    t = model._times_at(torch.linspace(0, 1, 200_001))
    share = torch.bincount(t, minlength=51)[1:] / len(t)
    assert torch.allclose(share.double(), time_shares(model._log_snr), atol=2e-5)
    assert torch.allclose(share, model._times[1:, -1], atol=2e-5)


def test_bounds_of_chunks_are_those_of_the_whole(monkeypatch):
    model = small(bound_draws=5)
    x = pictures(model, 4)
    whole = model.log_prob(x, condition=labels(4))
    monkeypatch.setattr("pygen.diffusion.ddpm._BOUND_ELEMENTS", 1)
    assert torch.allclose(model.log_prob(x, condition=labels(4)), whole, atol=1e-4)


def test_untrained_it_knows_each_value_alone():
    # The zero network leaves the mean over equally likely levels, and the bound near log(levels) per value.
    model = Diffusion(DiffusionConfig(classes=None, width=8, levels=5, bound_draws=100)).eval()
    bits = -model.log_prob(pictures(model, 64)).mean().item() / 64 / math.log(2)
    assert bits == pytest.approx(math.log2(5), abs=0.03)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sample_is_the_same_in_any_batch_and_order(sampler):
    model = small(sampler=sampler)
    x = model.sample(7, seed=5)
    assert x.shape == (7, 1, 6, 5)
    assert x.dtype == torch.float32
    assert x.abs().max() <= 1
    ids = torch.tensor([6, 2])
    assert torch.allclose(model.sample(2, ids=ids, seed=5), x[ids], atol=1e-5)
    assert torch.equal(model.sample(7, seed=5), x)
    assert (model.sample(7, seed=6) - x).abs().amax((1, 2, 3)).min() > 0.1
    assert torch.allclose(model.sample(2, ids=ids, seed=5, condition=labels(7)[ids]), x[ids], atol=1e-5)
    assert (model.sample(2, ids=ids, seed=5, condition=torch.tensor([1, 1])) - x[ids]).abs().max() > 1e-3


def test_a_bound_is_the_same_in_any_batch_and_order():
    model = small()
    x = pictures(model, 6)
    bound = model.log_prob(x, condition=labels(6), seed=2)
    ids = torch.tensor([5, 1])
    again = model.log_prob(x[ids], condition=labels(6)[ids], ids=ids, seed=2)
    assert bound.shape == (6,)
    assert torch.allclose(again, bound[ids], atol=1e-3)
    assert (model.log_prob(x, condition=labels(6), seed=3) - bound).abs().min() > 1e-3


def test_any_number_of_steps_starts_from_the_same_noise():
    model = small()
    first = model.trajectory(3, steps=1)
    for steps in (2, 7, 19, 20):
        stages = model.trajectory(3, steps=steps)
        assert model.network_passes(steps) == steps
        assert torch.equal(stages[0].values, first[0].values)
        assert torch.equal(stages[-1].values, model.sample(3, steps=steps))
        assert [stages[0].label, stages[-1].label] == ["Z", "X"]
        assert len(stages) <= 12
        assert len({stage.label for stage in stages}) == len(stages)
    assert model.network_passes() == 6
    assert torch.equal(model.sample(3, steps=6), model.sample(3))


@pytest.mark.parametrize(("sampler", "eta", "same"), [("ddim", 0.0, True), ("ddim", 1.0, False), ("ddpm", 0.0, False)])
def test_only_eta_zero_is_a_function_of_the_prior_point(sampler, eta, same):
    model = small(sampler=sampler, eta=eta)
    z, x = (model.trajectory(4)[i].values for i in (0, -1))
    decoded = model.decode(z, condition=labels(4))
    assert torch.allclose(decoded, x, atol=1e-5) is same


def test_ddim_with_eta_one_is_ddpm():
    one, other = small(sampler="ddpm"), small(sampler="ddim", eta=1.0)
    assert torch.equal(one.sample(3), other.sample(3))


def test_the_sampler_may_be_changed_after_training():
    model = small()
    x = model.sample(3)
    model.sampler = "ddpm"
    assert torch.equal(model.sample(3), small(sampler="ddpm").sample(3))
    model.sampler = "ddim"
    assert torch.equal(model.sample(3), x)
    model.sampler = "euler"
    with pytest.raises(ValueError, match="sampler is 'euler', but expected one of ddim, ddpm"):
        model.sample(3)


def test_v_and_epsilon_are_one_model():
    v, epsilon = small(), small(prediction="epsilon")
    epsilon.load_state_dict(v.state_dict())
    assert torch.allclose(v.sample(3), epsilon.sample(3), atol=1e-3)
    x = pictures(v, 3)
    assert torch.allclose(v.log_prob(x, condition=labels(3)), epsilon.log_prob(x, condition=labels(3)), rtol=1e-4)


def test_encode_then_decode_comes_back():
    model = small(timesteps=1000, levels=17)
    x = pictures(model, 4)
    errors = []
    for steps in (10, 50, 250):
        z = model.encode(x, condition=labels(4), steps=steps)
        errors.append((model.decode(z, condition=labels(4), steps=steps) - x).abs().mean().item())
    assert z.shape == x.shape
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.01


def test_loss_falls():
    torch.manual_seed(0)
    model = Diffusion(DiffusionConfig(shape=(1, 6, 5), levels=5, classes=2, timesteps=100, width=8))
    # Two pictures, one a class: all there is to learn is which.
    x = pictures(model, 2)[torch.arange(32) % 2]
    label = torch.arange(32) % 2
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = model.loss(x, condition=label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    assert (model.sample(8, condition=label[:8]) - x[:8]).abs().mean() < 0.2


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_the_loss_is_the_squared_error_and_the_bound(prediction):
    # With every time of the chain in the batch once, the loss's second part is the bound's sum, in nats per value.
    model = small(shape=(1, 8, 8), classes=None, timesteps=64, bound_draws=64, prediction=prediction)
    x = pictures(model, 1).expand(64, -1, -1, -1)
    torch.manual_seed(1)
    both = sum(model.loss(x) for _ in range(12)) / 12
    alone = copy.deepcopy(model)
    object.__setattr__(alone.config, "bound_weight", 0.0)
    torch.manual_seed(1)
    simple = sum(alone.loss(x) for _ in range(12)) / 12
    bound = -torch.stack([model.log_prob(x[:1], seed=seed)[0] for seed in range(12)]).mean() / 64
    assert (both - simple).item() == pytest.approx(bound.item(), rel=0.15)
    assert simple > 0


def test_autocast_costs_no_more_than_the_network_s_rounding():
    model = small(levels=256, classes=None, shape=(1, 8, 8))
    x = pictures(model, 32)
    losses, bounds = [], []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model.loss(x).item())
            bounds.append(model.log_prob(x).mean().item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert bounds[1] == pytest.approx(bounds[0], rel=0.02)


def test_the_contract():
    model = small()
    assert model.density is Density.LOWER_BOUND
    assert list(model.players()) == ["model"]
    assert len(model.players()["model"]) == len(list(model.parameters()))
    assert type(model.config)(**model.config_dict()) == model.config
    assert copy.deepcopy(model).sample(2).equal(model.sample(2))
    assert all(name.startswith("network.") for name in model.state_dict())


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 9, 7), (3, 32, 32), (2, 5, 12)])
def test_pictures_of_any_shape(shape):
    model = small(shape=shape, classes=None, timesteps=4, sample_steps=2, bound_draws=2)
    x = pictures(model, 2)
    assert model.loss(x).isfinite()
    assert model.log_prob(x).isfinite().all()
    assert model.sample(2).shape == (2, *shape)


def test_an_empty_batch_is_an_empty_batch():
    model = small()
    x = pictures(model, 0)
    assert model.sample(0).shape == (0, 1, 6, 5)
    assert model.log_prob(x, condition=labels(0)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample(2, steps=0), "steps is 0, but expected 1 to 20"),
        (lambda m: m.sample(2, steps=21), "steps is 21, but expected 1 to 20"),
        (lambda m: m.network_passes(21), "steps is 21, but expected 1 to 20"),
        (lambda m: m.loss(torch.zeros(3)), r"x has shape \(3,\), but expected \(n, 1, 6, 5\)"),
        (lambda m: m.log_prob(torch.zeros(2, 1, 5, 6)), r"x has shape \(2, 1, 5, 6\), but expected \(n, 1, 6, 5\)"),
        (lambda m: m.encode(torch.zeros(1, 6, 5)), r"x has shape \(1, 6, 5\), but expected \(n, 1, 6, 5\)"),
        (lambda m: m.decode(torch.zeros(1, 6, 5)), r"z has shape \(1, 6, 5\), but expected \(n, 1, 6, 5\)"),
        (lambda m: m.loss(torch.zeros(2, 1, 6, 5)), "condition is None, but Diffusion was built for 3 classes"),
        (lambda m: m.sample(2, ids=torch.arange(3)), r"ids has shape \(3,\), but expected \(2,\)"),
        (lambda m: m.loss(pictures(m, 2), player="critic", condition=labels(2)), "player is 'critic', but expected"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(small())
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_no_pictures():
    with pytest.raises(TypeError, match=r"x has dtype torch.int64, but expected a floating-point"):
        small().loss(torch.zeros(2, 1, 6, 5, dtype=torch.int64), condition=labels(2))


def test_double_pictures_are_taken():
    model = small(bound_draws=3)
    x, label = pictures(model, 2), labels(2)
    double = x.double()
    assert torch.equal(model.log_prob(double, condition=label), model.log_prob(x, condition=label))
    assert model.loss(double, condition=label).dtype == torch.float32
    z = model.encode(double, condition=label)
    assert torch.equal(z, model.encode(x, condition=label))
    assert torch.equal(model.decode(z.double(), condition=label), model.decode(z, condition=label))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"schedule": "sigmoid"}, "schedule is 'sigmoid', but expected one of cosine, linear"),
        ({"prediction": "x"}, "prediction is 'x', but expected one of v, epsilon"),
        ({"sampler": "euler"}, "sampler is 'euler', but expected one of ddim, ddpm"),
        ({"timesteps": 1, "sample_steps": 1}, "timesteps is 1, but expected at least 2"),
        ({"sample_steps": 0}, "sample_steps is 0, but expected 1 to timesteps=4000"),
        ({"timesteps": 10}, "sample_steps is 64, but expected 1 to timesteps=10"),
        ({"eta": 1.5}, r"eta is 1.5, but expected a number in \[0, 1\]"),
        ({"bound_draws": 0}, "bound_draws is 0, but expected at least 1"),
        ({"bound_weight": -1.0}, "bound_weight is -1.0, but expected a number >= 0"),
        ({"levels": 1}, "levels is 1, but expected at least 2"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**setting)


@pytest.mark.parametrize("levels", [5, 256])
def test_loss_log_prob_and_one_step_compile_whole(levels):
    model = small(shape=(1, 4, 4), levels=levels, bound_draws=1, sampler="ddpm", attention=False)
    x, label, ids = pictures(model, 3), labels(3), torch.arange(3)
    times, table = model.steps_down(5)

    def step(z: Tensor, index: Tensor) -> Tensor:
        return model.step(z, index, times, table, label, seed=4, ids=ids)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for index in (0, 3):
        expected = model.step(x, index, times, table, label, seed=4, ids=ids)
        assert torch.allclose(compiled(x, torch.tensor(index)), expected, atol=1e-5)

    bound = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    assert torch.allclose(bound(x, condition=label), model.log_prob(x, condition=label), atol=1e-3)

    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    loss(x, condition=label).backward()
    assert model.network.head.weight.grad.abs().sum() > 0
