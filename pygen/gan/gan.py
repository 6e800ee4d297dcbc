"""A small class-conditional GAN: x = G(z, y), z ~ N(0, I), trained against D(x, y) (Goodfellow et al. 2014).

By default the relativistic objective with R1 and R2 on every step, under which training converges locally
(Huang et al. 2024, arXiv:2501.05441, section 2): L_D = E softplus(D(G(z)) - D(x)) + r1 R1 + r2 R2.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.gan import losses
from pygen.gan.losses import OBJECTIVES, Objective, Penalties
from pygen.model import Density, GenerativeModel, ModelConfig, Stage, refuse_steps
from pygen.nn.residual import ResidualDecoder, ResidualEncoder, activate, widen


@dataclasses.dataclass(frozen=True, kw_only=True)
class GANConfig(ModelConfig):
    """A GAN and its objective.

    latent: dimensions of z. width: channels of both networks at full size. blocks: residual blocks at each size.
    embedding: length of the generator's class vector. features: length of the discriminator's last hidden vector.
    loss: the objective, one of `pygen.gan.OBJECTIVES`.
    r1, r2: weights of the zero-centred gradient penalties on real and on generated pictures (gamma in the papers);
        None takes the objective's own: 0.1 and 0.1 for "relativistic", 0.1 and 0 for "non_saturating", else 0.
    gp: weight of the one-centred penalty between the two; None takes 10 for "wgan_gp", else 0.
    """

    latent: int = 32
    width: int = 32
    blocks: int = 1
    embedding: int = 32
    features: int = 128
    loss: Objective = "relativistic"
    r1: float | None = None
    r2: float | None = None
    gp: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latent", "width", "blocks", "embedding", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but expected a positive number")
        if self.loss not in OBJECTIVES:
            raise ValueError(f"loss is {self.loss!r}, but expected one of {', '.join(OBJECTIVES)}")
        for name in Penalties._fields:
            weight = getattr(self, name)
            if weight is not None and not 0 <= weight < float("inf"):
                raise ValueError(f"{name} is {weight}, but expected a finite number that is not negative, or None")

    @property
    def penalties(self) -> Penalties:
        """The weights in force."""
        defaults = losses.default_penalties(self.loss)
        chosen = {name: getattr(self, name) for name in Penalties._fields}
        return defaults._replace(**{name: weight for name, weight in chosen.items() if weight is not None})


class Generator(nn.Module):
    """G(z, y): z (n, latent) and labels (n,) to pictures (n, channels, height, width) in [-1, 1]."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.embedding = None if config.classes is None else nn.Embedding(config.classes, config.embedding)
        features = config.latent + (0 if config.classes is None else config.embedding)
        self.body = ResidualDecoder(
            features, config.shape, width=config.width, condition=features, blocks=config.blocks
        )

    def forward(self, z: Tensor, condition: Tensor | None) -> Tensor:
        z = z.to(self.body.entry.weight.dtype)
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(condition)], dim=1)
        return self.body(z, z).tanh()  # type: ignore[no-any-return]


class Discriminator(nn.Module):
    """D(x, y): pictures (n, channels, height, width) and labels (n,) to scores (n,).

    The score is (w + v_y) . phi(x) + b, the projection of Miyato and Koyama 2018 (arXiv:1802.05637, eq. 3).
    """

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.body = ResidualEncoder(config.shape, config.features, width=config.width, blocks=config.blocks)
        self.score = nn.Linear(config.features, 1)
        self.embedding = None if config.classes is None else nn.Embedding(config.classes, config.features)
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=config.features**-0.5)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        features = activate(self.body(x))
        score: Tensor = self.score(features).squeeze(1)
        if self.embedding is not None:
            score = score + (self.embedding(condition) * features).sum(1)
        return widen(score)


class GAN(GenerativeModel):
    """A generator and a discriminator with one of the objectives of `pygen.gan.losses`.

    Every objective, with and without gradient penalties, passes through torch.compile(fullgraph=True).
    """

    density: ClassVar[Density] = Density.IMPLICIT
    PLAYERS: ClassVar[tuple[str, ...]] = ("discriminator", "generator")
    config: GANConfig

    def __init__(self, config: GANConfig) -> None:
        super().__init__(config)
        self.generator = Generator(config)
        self.discriminator = Discriminator(config)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {name: list(self.get_submodule(name).parameters()) for name in self.PLAYERS}

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """The scalar that `player` descends on; it has a gradient in that player's parameters alone.

        x: (n, channels, height, width) in [-1, 1]. player: "discriminator" or "generator". condition: int64 (n,).
        Raises ValueError for another player and for shapes that do not fit.
        """
        self.check_player(player)
        x = self.check_pictures(x)
        condition = self.check_condition(condition, len(x))
        z = torch.randn(len(x), self.config.latent, device=x.device)
        if player == "generator":
            return self._generator_loss(x, z, condition)
        with torch.no_grad():
            fake = self.generator(z, condition)
        return self._discriminator_loss(x, fake.to(x.dtype), condition)

    def _generator_loss(self, x: Tensor, z: Tensor, condition: Tensor | None) -> Tensor:
        # Detached weights spare the backward pass the discriminator's weight gradients, which nobody would read.
        frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}

        def score(pictures: Tensor) -> Tensor:
            scores: Tensor = torch.func.functional_call(self.discriminator, frozen, (pictures, condition))
            return scores

        fake = score(self.generator(z, condition))
        real = score(x) if self.config.loss == "relativistic" else None
        return losses.generator_loss(self.config.loss, fake, real)

    def _discriminator_loss(self, x: Tensor, fake: Tensor, condition: Tensor | None) -> Tensor:
        weights = self.config.penalties
        scores = []
        total = torch.zeros((), device=x.device)
        for pictures, weight in ((x, weights.r1), (fake, weights.r2)):
            if weight:
                score, gradient = losses.score_and_gradient(lambda p: self.discriminator(p, condition), pictures)
                total = total + weight * losses.zero_centred(gradient)
            else:
                score = self.discriminator(pictures, condition)
            scores.append(score)
        if weights.gp:
            share = torch.rand(len(x), 1, 1, 1, device=x.device)
            between = torch.lerp(x, fake, share.to(x.dtype))
            _, gradient = losses.score_and_gradient(lambda p: self.discriminator(p, condition), between)
            total = total + weights.gp * losses.one_centred(gradient)
        return total + losses.discriminator_loss(self.config.loss, *scores)

    def decode(self, z: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """G(z, condition): z (n, latent) to (n, channels, height, width) in [-1, 1], not quantized."""
        if z.ndim != 2 or z.shape[1] != self.config.latent:
            raise ValueError(f"z has shape {tuple(z.shape)}, but expected (n, {self.config.latent})")
        pictures: Tensor = self.generator(z.to(self.device), self.check_condition(condition, len(z)))
        return pictures

    def sample(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> Tensor:
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
        z = ops.noise(ids, (self.config.latent,), seed=seed)
        return [Stage("Z", z), Stage("X", self.decode(z, condition=condition))]

    def network_passes(self, steps: int | None = None) -> int:
        return 1
