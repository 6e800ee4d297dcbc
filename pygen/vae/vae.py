"""A small class-conditional convolutional VAE with a discretized-logistic likelihood (Kingma and Welling 2014).

ELBO = E_q log p(x | z, y) - KL(q(z | x, y) || p(z)); with k posterior draws, the importance-weighted bound
IWAE_k = E log (1/k) sum_j p(x | z_j, y) p(z_j) / q(z_j | x, y) (Burda et al. 2016, arXiv:1509.00519, eq. 8).
p(z) is N(0, I) or a flow (Chen et al. 2017, arXiv:1611.02731, section 3.2); q is a Gaussian, or a flow of one (Rezende
and Mohamed 2015, arXiv:1505.05770, eq. 15; Kingma et al. 2016, arXiv:1606.04934).
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.model import Density, GenerativeModel, ModelConfig, Stage, refuse_steps
from pygen.nn.residual import ResidualDecoder, ResidualEncoder, widen
from pygen.vae.likelihood import discretized_logistic_draw, discretized_logistic_log_prob

LOG_VARIANCE_RANGE = (-30.0, 20.0)

# Streams of addressed noise: the prior point of a sample, its pixels, and from there on the posterior's draws.
PRIOR_DRAW, PIXEL_DRAW, POSTERIOR_DRAW = 0, 1, 2

Pixels = Literal["mean", "draw"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(ModelConfig):
    """A VAE and its objective.

    latent: dimensions of z. width: channels of both networks at full size. blocks: residual blocks at each size.
    embedding: length of the class vector.
    beta: weight of the KL term in the loss (Higgins et al. 2017); log_prob always has weight 1.
    free_bits: nats per latent dimension that the loss does not charge for (Kingma et al. 2016, arXiv:1606.04934,
        eq. 15 with groups of one); 0 for none.
    pixels: what `sample` shows of the likelihood at z: "draw", a value drawn for every pixel, which is the model that
        `log_prob` bounds; or "mean", the logistic's location clamped to [-1, 1], smoother than any picture of the data.
    """

    latent: int = 16
    width: int = 32
    blocks: int = 1
    embedding: int = 32
    beta: float = 1.0
    free_bits: float = 0.0
    pixels: Pixels = "draw"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latent", "width", "blocks", "embedding"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but expected a positive number")
        for name in ("beta", "free_bits"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, but expected a finite number that is not negative")
        if self.pixels not in get_args(Pixels):
            raise ValueError(f"pixels is {self.pixels!r}, but expected one of {', '.join(get_args(Pixels))}")


class Posterior(NamedTuple):
    """The Gaussian q(z | x): mean and log-variance, each (n, latent), float32."""

    mean: Tensor
    log_variance: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """z = mean + exp(log_variance / 2) noise, (n, latent)."""
        return self.mean + torch.exp(self.log_variance / 2) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z) in nats, (n,); z (n, latent)."""
        square = (z - self.mean).square() * torch.exp(-self.log_variance)
        return -(square + self.log_variance + math.log(2 * math.pi)).sum(1) / 2

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats of each dimension, (n, latent): (mean^2 + e^lv - 1 - lv) / 2."""
        # expm1 - lv and not exp - 1 - lv: near the prior the difference is of the order lv^2.
        return (self.mean.square() + torch.expm1(self.log_variance) - self.log_variance) / 2


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) in nats, (n,); z (n, latent)."""
    return -(z.square() + math.log(2 * math.pi)).sum(1) / 2


class LatentTransform(Protocol):
    """What a flow posterior needs of a transform: `pygen.flows.Transform` has it."""

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


class LatentPrior(Protocol):
    """What a prior of z needs: `pygen.flows.Flow` and `pygen.flows.Base` have it."""

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor: ...

    def sample(self, n: int, *, context: Tensor | None = None, ids: Tensor | None = None, seed: int = 0) -> Tensor: ...


class VAE(GenerativeModel):
    """A convolutional encoder and decoder around a Gaussian latent, or one that flows make richer.

    posterior_flow: a transform of (n, latent) whose inverse takes a draw of the encoder's Gaussian to z; its context is
        the encoder's output (n, 2 latent), mean and log-variance. An inverse autoregressive flow is the one whose
        inverse is a single pass.
    prior: a flow over (n, latent) in the place of N(0, I).

    Both are modules, trained with the rest. With either, the KL is estimated by the draw instead of in closed form.
    ValueError: free_bits with either, because they are per dimension of a KL that has no dimensions then.
    """

    density: ClassVar[Density] = Density.LOWER_BOUND
    config: VAEConfig
    posterior_flow: LatentTransform | None
    prior: LatentPrior | None

    def __init__(
        self,
        config: VAEConfig,
        *,
        posterior_flow: LatentTransform | None = None,
        prior: LatentPrior | None = None,
    ) -> None:
        super().__init__(config)
        if config.free_bits and (posterior_flow is not None or prior is not None):
            raise ValueError(
                f"free_bits is {config.free_bits}, but expected 0 with a posterior_flow or a prior: their KL is not a "
                "sum over dimensions"
            )
        self.posterior_flow = posterior_flow
        self.prior = prior
        channels, height, width = config.shape
        known = 0 if config.classes is None else config.embedding
        self.embedding = None if config.classes is None else nn.Embedding(config.classes, config.embedding)
        self.encoder = ResidualEncoder(
            config.shape, 2 * config.latent, width=config.width, condition=known, blocks=config.blocks
        )
        features = config.latent + known
        self.decoder = ResidualDecoder(
            features, (2 * channels, height, width), width=config.width, condition=features, blocks=config.blocks
        )
        # A small last layer starts the posterior near the prior, where the first KL is near zero.
        nn.init.normal_(self.encoder.exit.weight, std=1e-2)

    def posterior(self, x: Tensor, *, condition: Tensor | None = None) -> Posterior:
        """q(z | x, condition) of pictures (n, channels, height, width); log-variance clamped to [-30, 20]."""
        x = self.check_pictures(x)
        return self._posterior(x, self._embed(self.check_condition(condition, len(x))))

    def likelihood(self, z: Tensor, *, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Location and log-scale of the logistic of every pixel, each (n, channels, height, width); z (n, latent)."""
        if z.ndim != 2 or z.shape[1] != self.config.latent:
            raise ValueError(f"z has shape {tuple(z.shape)}, but expected (n, {self.config.latent})")
        return self._likelihood(z.to(self.device), self._embed(self.check_condition(condition, len(z))))

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """Negative ELBO in nats per dimension, mean over the batch, with `beta` and `free_bits` applied to its KL.

        x: (n, channels, height, width) in [-1, 1], taken at the nearest level. player: "model". condition: int64 (n,).
        Raises ValueError for another player and for shapes that do not fit.
        """
        self.check_player(player)
        x = self.check_pictures(x)
        known = self._embed(self.check_condition(condition, len(x)))
        posterior = self._posterior(x, known)
        z, log_q = self._draw(posterior, torch.randn_like(posterior.mean))
        if self._closed_form:
            kl = posterior.kl().mean(0).clamp_min(self.config.free_bits).sum()
        else:
            kl = (log_q - self._log_prior(z)).mean()
        return (self.config.beta * kl - self._log_likelihood(x, z, known).mean()) / self.config.dimensions

    def log_prob(
        self,
        x: Tensor,
        *,
        condition: Tensor | None = None,
        ids: Tensor | None = None,
        seed: int = 0,
        importance_samples: int = 1,
    ) -> Tensor:
        """A lower bound on log p(x | condition) in nats, (n,), the same for the same x, ids and seed.

        x: (n, channels, height, width) in [-1, 1], taken at the nearest level. condition: int64 (n,).
        importance_samples: posterior draws; 1 gives the ELBO (its KL in closed form where there are no flows), k > 1
            the bound IWAE_k, tighter in expectation as k grows, at k passes of the decoder.
        Raises ValueError for shapes that do not fit and for importance_samples below 1.
        """
        if importance_samples < 1:
            raise ValueError(f"importance_samples is {importance_samples}, but expected at least 1")
        x = self.check_pictures(x)
        ids = self.resolve_ids(len(x), ids)
        known = self._embed(self.check_condition(condition, len(x)))
        posterior = self._posterior(x, known)
        if importance_samples == 1 and self._closed_form:
            z = posterior.draw(ops.noise(ids, (self.config.latent,), seed=seed, draw=POSTERIOR_DRAW))
            return self._log_likelihood(x, z, known) - posterior.kl().sum(1)
        log_weights = []
        # One draw a pass takes no more memory than the ELBO, and makes the draws of a small k the first of a larger.
        for index in range(importance_samples):
            noise = ops.noise(ids, (self.config.latent,), seed=seed, draw=POSTERIOR_DRAW + index)
            z, log_q = self._draw(posterior, noise)
            log_weights.append(self._log_likelihood(x, z, known) + self._log_prior(z) - log_q)
        return torch.stack(log_weights).logsumexp(0) - math.log(importance_samples)

    def encode(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """The posterior's mean, or where its flow takes the mean of the Gaussian, (n, latent)."""
        posterior = self.posterior(x, condition=condition)
        return self._draw(posterior, torch.zeros_like(posterior.mean))[0]

    def decode(self, z: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """The location of the likelihood, clamped to [-1, 1], (n, channels, height, width); not quantized."""
        return self.likelihood(z, condition=condition)[0].clamp(-1, 1)

    def sample(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> Tensor:
        """As the contract says; `config.pixels` decides whether a picture is a draw of the likelihood or its mean."""
        return self.trajectory(n, ids=ids, condition=condition, seed=seed, steps=steps)[-1].values

    @torch.no_grad()
    def trajectory(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> list[Stage]:
        """Z (n, latent) and X (n, channels, height, width), in one jump."""
        refuse_steps(self, steps)
        ids = self.resolve_ids(n, ids)
        condition = self.resolve_condition(ids, condition)
        if self.prior is None:
            z = ops.noise(ids, (self.config.latent,), seed=seed, draw=PRIOR_DRAW)
        else:
            z = self.prior.sample(n, ids=ids, seed=seed)
        if self.config.pixels == "mean":
            return [Stage("Z", z), Stage("X", self.decode(z, condition=condition))]
        mean, log_scale = self.likelihood(z, condition=condition)
        uniform = ops.uniform(ids, self.config.shape, seed=seed, draw=PIXEL_DRAW)
        picture = discretized_logistic_draw(uniform, mean, log_scale, levels=self.config.levels)
        return [Stage("Z", z), Stage("X", picture)]

    def network_passes(self, steps: int | None = None) -> int:
        return 1

    @property
    def _closed_form(self) -> bool:
        return self.posterior_flow is None and self.prior is None

    def _draw(self, posterior: Posterior, noise: Tensor) -> tuple[Tensor, Tensor]:
        """z from standard normal noise (n, latent), and log q(z | x) (n,)."""
        start = posterior.draw(noise)
        log_q = posterior.log_prob(start)
        if self.posterior_flow is None:
            return start, log_q
        z, ladj = self.posterior_flow.inverse(start, torch.cat(posterior, dim=1))
        return z, log_q - ladj

    def _log_prior(self, z: Tensor) -> Tensor:
        return standard_normal_log_prob(z) if self.prior is None else self.prior.log_prob(z)

    def _embed(self, condition: Tensor | None) -> Tensor | None:
        return None if self.embedding is None else self.embedding(condition)

    def _posterior(self, x: Tensor, known: Tensor | None) -> Posterior:
        mean, log_variance = widen(self.encoder(x, known)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def _likelihood(self, z: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
        z = z.to(self.decoder.entry.weight.dtype)
        z = z if known is None else torch.cat([z, known], dim=1)
        mean, log_scale = widen(self.decoder(z, z)).chunk(2, dim=1)
        return mean, log_scale

    def _log_likelihood(self, x: Tensor, z: Tensor, known: Tensor | None) -> Tensor:
        mean, log_scale = self._likelihood(z, known)
        snapped = self.dequantize(self.quantize(x))
        return discretized_logistic_log_prob(snapped, mean, log_scale, levels=self.config.levels).flatten(1).sum(1)
