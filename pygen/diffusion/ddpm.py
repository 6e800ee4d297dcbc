"""Denoising diffusion: a U-Net undoes the noise of x_t = alpha_t x_0 + sigma_t eps (Ho et al. 2020, arXiv:2006.11239).

One trained model samples with any number of steps, ancestrally (DDPM) or deterministically (DDIM), and bounds log p(x).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from pygen import ops
from pygen.diffusion.levels import LevelMoments, level_log_prob
from pygen.diffusion.schedule import (
    PREDICTIONS,
    SCHEDULES,
    Prediction,
    Schedule,
    alpha_sigma,
    denoising_coefficients,
    inversion_steps,
    log_snr_table,
    sampling_steps,
    time_shares,
)
from pygen.model import Density, GenerativeModel, ModelConfig, Stage
from pygen.nn.unet import UNet, depth_for

Sampler = Literal["ddim", "ddpm"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

# Elements of one network input in `log_prob`: larger batches leave the CPU's caches.
_BOUND_ELEMENTS = 1 << 17


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig(ModelConfig):
    """The noise, the network and the defaults of sampling.

    timesteps: T, the length of the chain; `steps` of sampling may be any number from 1 to T. A longer chain has a
        tighter bound (Nichol & Dhariwal 2021, section 3, take 4000 too) and costs nothing else.
    schedule: "cosine" (starts at the levels' spacing, see `schedule.log_snr_table`) or "linear" (Ho et al. 2020).
    prediction: what the model output means and what the squared error of the loss is measured in: "v" or "epsilon".
    sampler: "ddim" with noise `eta` in [0, 1], or "ddpm" (ancestral, the same as eta = 1).
    sample_steps: network passes of `sample` where the caller does not choose.
    bound_draws: time steps drawn for each picture's bound; T or more takes every step once.
    bound_weight: how much of the bound, in nats per value, is added to the squared error in the loss.
    width, multipliers, blocks, attention, dropout: of the U-Net (`pygen.nn.unet.UNet`); `multipliers` is cut to the
        resolutions that leave the smaller side at least 4.
    """

    timesteps: int = 4000
    schedule: Schedule = "cosine"
    prediction: Prediction = "v"
    sampler: Sampler = "ddim"
    eta: float = 0.0
    sample_steps: int = 64
    bound_draws: int = 32
    bound_weight: float = 1.0
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 1
    attention: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("schedule", SCHEDULES), ("prediction", PREDICTIONS), ("sampler", SAMPLERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but expected one of {', '.join(allowed)}")
        if self.timesteps < 2:
            raise ValueError(f"timesteps is {self.timesteps}, but expected at least 2")
        if not 1 <= self.sample_steps <= self.timesteps:
            raise ValueError(f"sample_steps is {self.sample_steps}, but expected 1 to timesteps={self.timesteps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}, but expected a number in [0, 1]")
        if self.bound_draws < 1:
            raise ValueError(f"bound_draws is {self.bound_draws}, but expected at least 1")
        if self.bound_weight < 0:
            raise ValueError(f"bound_weight is {self.bound_weight}, but expected a number >= 0")
        object.__setattr__(self, "multipliers", tuple(self.multipliers))


class Diffusion(GenerativeModel):
    """A denoising diffusion model behind the contract of the five families.

    The network does not start from nothing: `levels.LevelMoments` says what each noisy value alone tells of its grey
    level, mean m and deviation d, and the network's output r corrects it from the context: x_0 is predicted as m + d r.
    With `prediction` that x_0 is turned into the model output e (v or epsilon), so the two differ in the loss alone.

    Samples are the last predicted x_0, clamped to [-1, 1] and not rounded to the levels.
    """

    density: ClassVar[Density] = Density.LOWER_BOUND
    config: DiffusionConfig
    _times: Tensor
    _reached: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        channels, height, width = config.shape
        self.network = UNet(
            2 * channels,
            channels,
            width=config.width,
            multipliers=config.multipliers[: depth_for(height, width)],
            blocks=config.blocks,
            classes=config.classes,
            attention=config.attention,
            dropout=config.dropout,
        )
        self.moments = LevelMoments(config.levels)
        self.sampler, self.eta = config.sampler, config.eta
        self._log_snr = log_snr_table(config.schedule, config.timesteps, config.levels)
        self._tables: dict[tuple[str, int, float, torch.device], tuple[Tensor, Tensor]] = {}
        log_snr = self._log_snr[1:]
        drop = torch.cat((log_snr.new_zeros(1), 0.5 * (log_snr[:-1].exp() - log_snr[1:].exp())))
        denoising = denoising_coefficients(log_snr, config.prediction)
        shares = time_shares(self._log_snr)
        rows = torch.stack((log_snr, *alpha_sigma(log_snr), *denoising, drop, shares), 1)
        # Row t; the clean picture, row 0, has an infinite ratio and is never given to the network.
        self.register_buffer("_times", torch.cat((torch.full((1, 7), torch.nan), rows.float())), persistent=False)
        self.register_buffer("_reached", shares.cumsum(0)[:-1].float(), persistent=False)

    def predict(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The model output e, v or epsilon as configured, of the shape of x.

        x: (n, channels, height, width) at times t, int64 (n,) in 1 .. T. condition: int64 (n,) labels or None.
        """
        log_snr, alpha, sigma, c0, c1, *_ = self._at(t)
        mean, deviation = self.moments(x, alpha, sigma)
        correction = self.network(torch.cat((x, mean), 1), log_snr.flatten(), condition)
        output: Tensor = (mean + deviation * correction.to(x.dtype) - c0 * x) / c1
        return output

    def step(
        self,
        x: Tensor,
        index: int | Tensor,
        times: Tensor,
        table: Tensor,
        condition: Tensor | None = None,
        *,
        seed: int | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """x after step `index` (an int or a 0-dim int64 tensor) of a table of `steps_down` or `steps_up`.

        seed, ids: the address of the noise of a table that has some; row i of the table draws number i.
        """
        # `times[index]` would make torch.compile read the tensor.
        time = times.index_select(0, index.reshape(1)) if isinstance(index, Tensor) else times[index]
        output = self.predict(x, time.expand(len(x)), condition)
        return ops.diffusion_step(x, output, table, step=index, seed=seed, sample_ids=ids, clip=1.0)

    def steps_down(self, steps: int | None = None, *, eta: float | None = None) -> tuple[Tensor, Tensor]:
        """Network times, int64 (steps,), and coefficients, float32 (steps, 6), from noise to picture.

        eta: noise in [0, 1]; by default that of `self.sampler` and `self.eta`. Raises ValueError unless
        1 <= steps <= T.
        """
        steps = self.network_passes(steps)
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}, but expected one of {', '.join(SAMPLERS)}")
        if eta is None:
            eta = 1.0 if self.sampler == "ddpm" else self.eta
        key = ("down", steps, eta, self.device)
        if key not in self._tables:
            self._keep(key, sampling_steps(self._log_snr, steps, prediction=self.config.prediction, eta=eta))
        return self._tables[key]

    def steps_up(self, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """Network times and coefficients, as those of `steps_down`, from picture to noise without randomness."""
        steps = self.network_passes(steps)
        key = ("up", steps, 0.0, self.device)
        if key not in self._tables:
            self._keep(key, inversion_steps(self._log_snr, steps, prediction=self.config.prediction))
        return self._tables[key]

    def network_passes(self, steps: int | None = None) -> int:
        """`steps`, or the configured `sample_steps`; ValueError unless 1 <= steps <= T."""
        if steps is None:
            return self.config.sample_steps
        if not 1 <= steps <= self.config.timesteps:
            raise ValueError(f"steps is {steps}, but expected 1 to {self.config.timesteps}, the model's timesteps")
        return steps

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> Tensor:
        """n pictures (n, channels, height, width) in [-1, 1], not rounded to the levels, by `steps` network passes."""
        x = torch.empty(0)
        for x in self._walk(n, ids, condition, seed, steps):  # noqa: B007
            pass
        return x

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
        """Z, the noisy pictures x_t after at most ten steps evenly spread among all, and X."""
        total = self.network_passes(steps)
        shown = {total * stop // 11 for stop in range(1, 11)} - {0, total}
        stages = []
        for index, x in enumerate(self._walk(n, ids, condition, seed, steps)):
            if index == 0:
                stages.append(Stage("Z", x))
            elif index == total:
                stages.append(Stage("X", x))
            elif index in shown:
                stages.append(Stage(f"step {index} of {total}", x))
        return stages

    @torch.no_grad()
    def encode(self, x: Tensor, *, condition: Tensor | None = None, steps: int | None = None) -> Tensor:
        """The prior point from which `decode` comes back near x: DDIM run upwards (Song et al. 2021, section 4.3).

        A picture is a cell of values and its whole cell flows from a region of the prior; this is the middle of it. The
        way back differs from x by the discretization, the less the more steps.
        """
        z, condition = self._checked(x, condition)
        times, table = self.steps_up(steps)
        for index in range(len(times)):
            z = self.step(z, index, times, table, condition)
        return z

    @torch.no_grad()
    def decode(self, z: Tensor, *, condition: Tensor | None = None, steps: int | None = None) -> Tensor:
        """The picture of prior points z (n, channels, height, width): DDIM with eta = 0, whatever the sampler."""
        if z.ndim != 4 or tuple(z.shape[1:]) != self.config.shape:
            raise ValueError(f"z has shape {tuple(z.shape)}, but expected (n, {str(self.config.shape)[1:]}")
        x, condition = self._checked(z.to(self._times.dtype), condition)
        times, table = self.steps_down(steps, eta=0.0)
        for index in range(len(times)):
            x = self.step(x, index, times, table, condition)
        return x

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """Mean squared error of the model output plus `bound_weight` times the bound in nats per value.

        The first is L_simple of Ho et al. 2020, eq. 14, in v or epsilon; the second the same sum of Kullback-Leibler
        terms as in `log_prob`. One time per picture, spread over the batch (Kingma et al. 2021, app. I.1), drawn by
        `schedule.time_shares` and weighted for it.
        """
        self.check_player(player)
        x, condition = self._checked(x, condition)
        n = len(x)
        spread = (torch.randperm(n, device=x.device) + torch.rand(n, device=x.device)) / n
        t = self._times_at(spread)
        _, alpha, sigma, _, c1, drop, share = self._at(t)
        noise = torch.randn_like(x)
        target = alpha * noise - sigma * x if self.config.prediction == "v" else noise
        error = (self.predict(alpha * x + sigma * noise, t, condition) - target).square()
        return (error * (1 / self.config.timesteps + self.config.bound_weight * drop * c1.square()) / share).mean()

    def log_prob(
        self, x: Tensor, *, condition: Tensor | None = None, ids: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """A lower bound on log p(x | condition) of quantized pictures in nats, (n,), unbiased over the addressed noise.

        The bound is that of the ancestral chain of all T steps (Ho et al. 2020, eq. 5; Kingma et al. 2021, eq. 13):

            log p(x | x_1) - sum over t = 2 .. T of (snr_(t-1) - snr_t) / 2 |x - x_0(x_t)|^2 - KL(q(x_T | x) || N(0, 1))

        with the predicted x_0 clamped as in sampling and `levels.level_log_prob` for the decoder. Of the sum,
        `config.bound_draws` terms are drawn and weighted, one from each of as many stretches of time that
        `schedule.time_shares` makes equal.
        """
        x, condition = self._checked(x, condition)
        n, config = len(x), self.config
        ids = self.resolve_ids(n, ids)
        first = torch.ones(n, dtype=torch.int64, device=x.device)
        _, alpha, sigma, *_ = self._at(first)
        noisy = alpha * x + sigma * ops.noise(ids, config.shape, seed=seed, draw=0)
        bound = level_log_prob(noisy, alpha, sigma, self.quantize(x), config.levels).flatten(1).sum(1)

        log_snr, alpha, *_ = self._at(first * config.timesteps)
        excess = alpha.square() * (x.square() - 1) - torch.nn.functional.logsigmoid(-log_snr)
        bound = bound - 0.5 * excess.flatten(1).sum(1)

        draws = min(config.bound_draws, config.timesteps)
        if draws == config.timesteps:
            t = torch.arange(1, draws + 1, device=x.device).expand(n, -1)
        else:
            offset = ops.uniform(ids, (draws,), seed=seed)
            t = self._times_at((torch.arange(draws, device=x.device) + offset) / draws)
        together = max(1, _BOUND_ELEMENTS // max(1, x.numel()))
        for start in range(0, draws, together):
            chunk = range(start, min(start + together, draws))
            noise = torch.cat([ops.noise(ids, config.shape, seed=seed, draw=1 + draw) for draw in chunk])
            pictures = x.repeat(len(chunk), 1, 1, 1)
            labels = None if condition is None else condition.repeat(len(chunk))
            times = t[:, start : chunk.stop].t().flatten()
            _, alpha, sigma, c0, c1, drop, share = self._at(times)
            if draws < config.timesteps:
                drop = drop / (draws * share)
            noisy = alpha * pictures + sigma * noise
            denoised = (c0 * noisy + c1 * self.predict(noisy, times, labels)).clamp(-1, 1)
            divergence = (drop * (pictures - denoised).square()).flatten(1).sum(1)
            bound = bound - divergence.view(len(chunk), n).sum(0)
        return bound

    def _walk(
        self, n: int, ids: Tensor | None, condition: Tensor | None, seed: int, steps: int | None
    ) -> Iterator[Tensor]:
        """The noise x_T, then x after each step."""
        times, table = self.steps_down(steps)
        ids = self.resolve_ids(n, ids)
        condition = self.resolve_condition(ids, condition)
        # Steps draw numbers 0 .. T-1, so that x_T is the same for any number of steps.
        x = ops.noise(ids, self.config.shape, seed=seed, draw=self.config.timesteps)
        yield x
        for index in range(len(times)):
            x = self.step(x, index, times, table, condition, seed=seed, ids=ids)
            yield x

    def _at(self, t: Tensor) -> tuple[Tensor, ...]:
        """lambda, alpha, sigma, c0, c1, half the drop of the ratio from t - 1, share of draws: (n, 1, 1, 1) each."""
        return self._times[t][:, :, None, None, None].unbind(1)

    def _times_at(self, quantile: Tensor) -> Tensor:
        """The times below which a share `quantile` in [0, 1] of the draws falls, int64 in 1 .. T, of its shape."""
        return 1 + torch.searchsorted(self._reached, quantile, right=True)

    def _keep(self, key: tuple[str, int, float, torch.device], steps: tuple[Tensor, Tensor]) -> None:
        times, table = steps
        self._tables[key] = (times.to(self.device), table.to(self.device))

    def _checked(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.check_pictures(x)
        return x, self.check_condition(condition, len(x))
