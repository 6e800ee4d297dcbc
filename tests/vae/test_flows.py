"""A VAE with a flow for its posterior, its prior, or both."""

from __future__ import annotations

import math

import pytest
import torch
from flow_cases import Conditioner
from torch import Tensor, nn

from pygen import ops
from pygen.flows import AffineCoupling, Flow, Stack, StandardNormal, Transform
from pygen.vae import VAE, VAEConfig
from pygen.vae.vae import POSTERIOR_DRAW

LATENT = 4


class ReadsEncoder(nn.Module):
    """A conditioner whose context is the encoder's output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT // 2 + 2 * LATENT, 16), nn.Tanh(), nn.Linear(16, LATENT))

    def forward(self, kept: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat((kept, context), dim=1))


def posterior_flow() -> Transform:
    return Stack(AffineCoupling(ReadsEncoder(), flip=k % 2 == 1, activation="tanh", limit=1.0) for k in range(2))


def prior() -> Flow:
    half = LATENT // 2
    return Flow(
        [AffineCoupling(Conditioner(half, half), flip=k % 2 == 1) for k in range(2)],
        StandardNormal(LATENT),
    )


def vae(**flows: object) -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig(shape=(1, 4, 4), width=4, latent=LATENT, embedding=3), **flows)


def pictures(model: VAE, n: int = 8) -> tuple[Tensor, Tensor]:
    return model.dequantize(torch.randint(model.config.levels, (n, 1, 4, 4))), torch.arange(n)


KINDS = {
    "posterior": lambda: {"posterior_flow": posterior_flow()},
    "prior": lambda: {"prior": prior()},
    "both": lambda: {"posterior_flow": posterior_flow(), "prior": prior()},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_flows_learn_with_the_rest(kind):
    model = vae(**KINDS[kind]())
    x, labels = pictures(model)
    loss = model.loss(x, condition=labels)
    loss.backward()
    for part in (model.posterior_flow, model.prior):
        if part is not None:
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert set(model.posterior_flow.parameters() if model.posterior_flow else ()) <= set(model.players()["model"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_elbo_is_made_of_its_three_parts(kind):
    model = vae(**KINDS[kind]()).double()
    x, labels = pictures(model, 3)
    posterior = model.posterior(x, condition=labels)
    start = posterior.draw(ops.noise(torch.arange(3), (LATENT,), seed=2, draw=POSTERIOR_DRAW))
    z, log_q = start, posterior.log_prob(start)
    if model.posterior_flow is not None:
        # Independently: the flow's forward direction at z gives the same determinant with the other sign.
        z, _ = model.posterior_flow.inverse(start, torch.cat(posterior, dim=1))
        back, ladj = model.posterior_flow(z, torch.cat(posterior, dim=1))
        torch.testing.assert_close(back, start, rtol=1e-5, atol=1e-5)
        log_q = log_q + ladj
    log_p = model.prior.log_prob(z) if model.prior else torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    known = model._embed(labels)
    expected = model._log_likelihood(model.check_pictures(x), z, known) + log_p - log_q
    torch.testing.assert_close(
        model.log_prob(x, condition=labels, seed=2).double(), expected.double(), rtol=1e-4, atol=1e-4
    )


def test_more_draws_tighten_the_bound():
    model = vae(**KINDS["both"]())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x, labels = pictures(model, 64)
    with torch.no_grad():
        one = model.log_prob(x, condition=labels % 10).mean()
        many = model.log_prob(x, condition=labels % 10, importance_samples=32).mean()
    assert many > one


def test_samples_come_from_the_prior():
    class Far(nn.Module):
        """A prior a hundred away from the origin."""

        def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x.new_zeros(len(x))

        def sample(self, n: int, *, context=None, ids=None, seed: int = 0) -> Tensor:
            return ids[:, None].double().expand(n, LATENT) + 100

    model = vae(prior=Far())
    path = model.trajectory(3, ids=torch.tensor([5, 6, 7]))
    assert torch.equal(path[0].values[:, 0], torch.tensor([105.0, 106.0, 107.0], dtype=torch.float64))
    flow = vae(**KINDS["prior"]())
    torch.testing.assert_close(
        flow.sample(4, seed=3)[[2, 0]], flow.sample(2, ids=torch.tensor([2, 0]), seed=3, condition=torch.tensor([2, 0]))
    )


def test_an_identity_flow_changes_nothing_but_the_estimate():
    plain, flowing = vae(), vae(posterior_flow=Stack([nn.Identity()][:0]), prior=StandardNormal(LATENT))
    flowing.load_state_dict(plain.state_dict())
    x, labels = pictures(plain, 4)
    torch.testing.assert_close(plain.encode(x, condition=labels), flowing.encode(x, condition=labels))
    with torch.no_grad():
        estimates = torch.stack(
            [
                flowing.log_prob(x, condition=labels, seed=s) - plain.log_prob(x, condition=labels, seed=s)
                for s in range(400)
            ]
        )
    spread = estimates.std(0) / math.sqrt(400) + 1e-6
    # Same draws, so only the KL differs: its estimate has the closed form as its mean.
    assert (estimates.mean(0).abs() < 5 * spread).all()


def test_free_bits_need_a_closed_form():
    with pytest.raises(ValueError, match=r"free_bits is 0.1, but expected 0 with a posterior_flow or a prior"):
        VAE(VAEConfig(shape=(1, 4, 4), latent=LATENT, free_bits=0.1), prior=prior())
