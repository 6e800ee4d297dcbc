"""TarFlow: an autoregressive flow over the patches of a picture, whose steps are transformers.

A metablock takes the tokens in one order, x_0 ... x_{N-1}, and maps z_0 = x_0, z_t = (x_t - b(x_<t)) e^{-a(x_<t)}; the
next one takes them in the reverse order. log |det dz/dx| = -sum a. (Zhai et al. 2024, arXiv:2412.06329, section 2)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from pygen import _native, ops
from pygen.flows.base import StandardNormal
from pygen.flows.flow import Flow
from pygen.flows.pictures import Logit, PictureFlow, PictureFlowConfig
from pygen.flows.transform import Stack, Transform
from pygen.model import Stage, refuse_steps
from pygen.nn.transformer import CausalTransformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarFlowConfig(PictureFlowConfig):
    """What a TarFlow is made of, how it is trained, and how it samples.

    patch: height and width of the patch that is one token.
    blocks: metablocks. One leaves its first token as it is: at least two transform every value.
    layers, width, heads, dropout: of each metablock's transformer.
    noise_std: standard deviation of the Gaussian noise that makes the pictures continuous, in units of the pictures in
        [-1, 1], which then enter as they are (margin must be None); None for uniform noise in the quantization cell.
    label_dropout: share of the labels that training withholds, so that the model also knows p(x) without one.
    denoise: whether `sample` takes the noise of `noise_std` off again.
    guidance: w >= 0, how far `sample` goes from the prediction without label towards, and beyond, that with it.
    guidance_temperature: what the scores of the attention are divided by in the prediction that guidance goes away
        from; other than 1, guidance also has a meaning without labels.
    memory: with "recompute", backward inverts every block, token by token; "checkpoint" keeps one picture for each
        block instead, and costs one pass over all tokens at once.
    """

    margin: float | None = 0.01
    patch: int = 2
    blocks: int = 4
    layers: int = 1
    width: int = 64
    heads: int = 4
    dropout: float = 0.2
    noise_std: float | None = None
    label_dropout: float = 0.1
    denoise: bool = False
    guidance: float = 0.0
    guidance_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("patch", "blocks")
        check_patch(self.shape, self.patch)
        self.require_probability("dropout", "label_dropout")
        if self.memory == "recompute" and self.dropout > 0:
            raise ValueError(
                f"memory is 'recompute' with dropout {self.dropout}, but expected dropout 0: the inverse, token by "
                "token, cannot draw the same masks; use memory='checkpoint'"
            )
        if self.noise_std is not None and not 0 < self.noise_std < math.inf:
            raise ValueError(f"noise_std is {self.noise_std}, but expected a positive number or None")
        if self.noise_std is not None and self.margin is not None:
            raise ValueError(
                f"margin is {self.margin} with noise_std {self.noise_std}, but expected None: Gaussian noise leaves "
                "the range that the logit takes"
            )
        if not self.guidance_temperature > 0:
            raise ValueError(f"guidance_temperature is {self.guidance_temperature}, but expected a positive number")
        check_sampling(self, self.denoise, self.guidance)

    @property
    def tokens(self) -> int:
        """The number of patches in a picture."""
        return self.shape[1] * self.shape[2] // self.patch**2


def check_patch(shape: tuple[int, int, int], patch: int) -> None:
    """ValueError where pictures of a shape are not two or more patches."""
    _, height, width = shape
    if height % patch or width % patch or height * width < 2 * patch**2:
        raise ValueError(
            f"shape is {shape} with patch {patch}, but expected a height and width divisible by it, and two patches or "
            "more"
        )


def check_sampling(config: TarFlowConfig, denoise: bool, guidance: float) -> None:
    """ValueError for a way of sampling that a model of this configuration does not know."""
    if denoise and config.noise_std is None:
        raise ValueError("denoise is True, but expected False: without noise_std there is no noise to take off")
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance is {guidance}, but expected a number >= 0")
    if guidance > 0 and config.classes is None and config.guidance_temperature == 1:
        raise ValueError(
            f"guidance is {guidance}, but expected 0 without classes: give a guidance_temperature other than 1"
        )
    if guidance > 0 and config.guidance_temperature == 1 and config.label_dropout == 0:
        raise ValueError(
            f"guidance is {guidance} with label_dropout 0, but expected label_dropout > 0: the model never saw a "
            "picture without its label"
        )


class MetaBlock(Transform):
    """One autoregressive step over the patches of a picture, in raster order, or with `flip` against it.

    Pictures (n, channels, height, width) to the same shape; the context is labels, int64 (n,), of which number
    `classes` stands for none. The first token stays as it is. It starts as the identity.

    `forward` is one pass over all tokens. `inverse` goes token by token, with the keys and values of the tokens before
    in a cache: each activation is computed once. Where gradients are wanted the cache is one that keeps the graph.

    ValueError: a shape that is not two or more patches, x of another shape, or what `CausalTransformer` refuses.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        patch: int = 2,
        flip: bool = False,
        layers: int = 2,
        width: int = 64,
        heads: int = 4,
        classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_patch(shape, patch)
        self.shape = shape
        channels, rows, columns = shape[0], shape[1] // patch, shape[2] // patch
        self.grid = rows, columns
        self.patch = channels, patch, patch
        self.flip = flip
        self.classes = classes
        features = channels * patch**2
        self.embed = nn.Linear(features, width)
        # The last token conditions none.
        self.transformer = CausalTransformer(
            rows * columns - 1, width=width, layers=layers, heads=heads, classes=classes, dropout=dropout
        )
        self.propose = nn.Linear(width, 2 * features)
        nn.init.zeros_(self.propose.weight)
        nn.init.zeros_(self.propose.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(x)
        first, moved = tokens[:, :1], tokens[:, 1:]
        a, b = self.propose(self.transformer(self.embed(tokens[:, :-1]), context)).chunk(2, dim=2)
        moved, ladj = ops.affine(moved, a, b, event_dims=2, inverse=True)
        return self._picture(torch.cat((first, moved), dim=1)), ladj

    def inverse(
        self, y: Tensor, context: Tensor | None = None, *, guidance: float = 0.0, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """x and log |det dx/dy|, of the guided map where there is guidance.

        guidance: w, for a + w (a - a') and b + w (b - b') in place of a and b, where a' and b' are predicted without
            the label and with an attention whose scores are divided by `temperature` (Zhai et al. 2024, section 2,
            guidance).
        """
        tokens = self._tokens(y)
        n, length, _ = tokens.shape
        # The prediction that guidance goes away from is n more rows of the same batch.
        rows, heat = (n, None) if guidance == 0 else (2 * n, tokens.new_ones(2 * n))
        if heat is not None:
            heat[n:] = temperature
            if context is not None and self.classes is not None:
                context = torch.cat((context, torch.full_like(context, self.classes)))
        cache = self.transformer.cache(rows, differentiable=_native.wants_gradient(y, *self.parameters()))
        token = tokens[:, :1]
        found, total = [token], tokens.new_zeros(n, dtype=torch.promote_types(tokens.dtype, torch.float32))
        for place in range(1, length):
            embedded = self.embed(token)
            if heat is not None:
                embedded = embedded.repeat(2, 1, 1)
            proposed = self.propose(self.transformer.step(embedded, cache, context, temperature=heat))
            if heat is not None:
                proposed, other = proposed.chunk(2)
                proposed = proposed + guidance * (proposed - other)
            a, b = proposed.chunk(2, dim=2)
            token, ladj = ops.affine(tokens[:, place : place + 1], a, b, event_dims=2)
            found.append(token)
            total = total + ladj
        return self._picture(torch.cat(found, dim=1)), total

    def _tokens(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) as (n, tokens, channels patch^2), in the block's order."""
        if tuple(x.shape[1:]) != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, {expected})")
        (rows, columns), (_, height, width) = self.grid, self.patch
        cells = x.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        tokens: Tensor = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return tokens.flip(1) if self.flip else tokens

    def _picture(self, tokens: Tensor) -> Tensor:
        tokens = tokens.flip(1) if self.flip else tokens
        cells: Tensor = tokens.unflatten(2, self.patch).unflatten(1, self.grid)
        return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def extra_repr(self) -> str:
        return f"patch={self.patch[1]}, flip={self.flip}"


class TarFlow(PictureFlow):
    """An exact density of noisy pictures by one pass of transformers, and samples patch by patch.

    With uniform noise the contract is that of `PictureFlow`. With Gaussian noise y = x + noise_std e, `log_prob` is the
    bound of a model that draws y from the flow and then the level j of each value with a probability proportional to
    N(y; x_j, noise_std^2): log P(k) >= E_q[log p(y) - sum log sum_j N(y; x_j, noise_std^2)], q(y | k) being the noise.
    For noise of some levels' width the last sum is one over their spacing, and the bound that of uniform noise.
    """

    config: TarFlowConfig

    def __init__(self, config: TarFlowConfig | None = None) -> None:
        config = config or TarFlowConfig()
        blocks = [
            MetaBlock(
                config.shape,
                patch=config.patch,
                flip=k % 2 == 1,
                layers=config.layers,
                width=config.width,
                heads=config.heads,
                classes=config.classes,
                dropout=config.dropout,
            )
            for k in range(config.blocks)
        ]
        stack = Stack([Logit(config.margin), *blocks], memory=config.memory)
        super().__init__(config, Flow(stack, StandardNormal(config.shape)))

    @property
    def stack(self) -> Stack:
        """The logit and the metablocks, in the order from data to the prior."""
        return cast("Stack", self.flow.transform)

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood in nats per dimension, with noise, and labels withheld while training, by
        PyTorch's generator."""
        self.check_player(player)
        x = self.check_pictures(x)
        condition = self.check_condition(condition, len(x))
        if condition is not None and self.training:
            withheld = torch.rand(len(x), device=x.device) < self.config.label_dropout
            condition = condition.masked_fill(withheld, self.config.classes or 0)
        v, volume = self._dequantize(x, None, 0)
        return -(self.flow.log_prob(v, condition) + volume).mean() / self.config.dimensions

    @torch.no_grad()
    def decode(self, z: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """The picture of a prior point, rounded to the levels, (n, channels, height, width) in [-1, 1]; neither guided
        nor denoised, so that it undoes `encode`."""
        return super().decode(z, condition=condition)

    @torch.inference_mode()
    def sample(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        denoise: bool | None = None,
    ) -> Tensor:
        """n pictures; see `GenerativeModel.sample`. Rounded to the levels.

        guidance, denoise: as in the configuration, which gives what is left out.

        ValueError: `denoise` without noise_std; guidance that is negative, or away from what the model never learnt.
        """
        return self.trajectory(
            n, ids=ids, condition=condition, seed=seed, steps=steps, guidance=guidance, denoise=denoise
        )[-1].values

    @torch.inference_mode()
    def trajectory(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        denoise: bool | None = None,
    ) -> list[Stage]:
        """Z, the flow's state after each metablock, the noisy picture where it is denoised, and X."""
        refuse_steps(self, steps)
        guidance = self.config.guidance if guidance is None else guidance
        denoise = self.config.denoise if denoise is None else denoise
        check_sampling(self.config, denoise, guidance)
        ids = self.resolve_ids(n, ids)
        condition = self.resolve_condition(ids, condition)
        z = self.flow.base.sample(n, ids=ids, seed=seed)
        stages = [Stage("Z", z), *self._back(z, condition, guidance)]
        v = stages.pop().values
        if denoise:
            stages.append(Stage("noisy", 2 * v - 1))
            v = self._denoised(v, condition)
        return [*stages, Stage("X", self._picture(v))]

    def network_passes(self, steps: int | None = None) -> int:
        """One for each token, though every pass is over one token alone."""
        return self.config.tokens

    def _back(self, z: Tensor, condition: Tensor | None, guidance: float) -> Iterator[Stage]:
        """The states on the way from z; the last is v."""
        for number, transform in reversed(list(enumerate(self.stack, 1))):
            if isinstance(transform, MetaBlock):
                temperature = self.config.guidance_temperature
                z, _ = transform.inverse(z, condition, guidance=guidance, temperature=temperature)
            else:
                z, _ = transform.inverse(z, condition)
            yield Stage(f"{number} {type(transform).__name__}", z)

    def _denoised(self, v: Tensor, condition: Tensor | None) -> Tensor:
        """E[x | y] = y + noise_std^2 grad log p(y), Tweedie's formula (Zhai et al. 2024, section 2, score-based
        denoising), in the coordinates of v."""
        with torch.inference_mode(False), torch.enable_grad():
            noisy = v.clone().requires_grad_()
            labels = None if condition is None else condition.clone()
            (score,) = torch.autograd.grad(self.flow.log_prob(noisy, labels).sum(), noisy)
        return v + (self._noise_levels() / self.config.levels) ** 2 * score

    def _dequantize(self, x: Tensor, ids: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        if self.config.noise_std is None:
            return super()._dequantize(x, ids, seed)
        levels, spread = self.config.levels, self._noise_levels()
        noise = torch.randn_like(x) if ids is None else ops.noise(ids, self.config.shape, seed=seed, dtype=x.dtype)
        noisy = self.quantize(x) + spread * noise  # level j is at j
        distance = (noisy.unsqueeze(-1) - torch.arange(levels, device=x.device)) / spread
        near = torch.logsumexp(-0.5 * distance.square(), dim=-1).flatten(1).sum(1)
        constant = self.config.dimensions * (math.log(spread * math.sqrt(2 * math.pi)) - math.log(levels))
        return (noisy + 0.5) / levels, constant - near

    def _noise_levels(self) -> float:
        """noise_std in units of the spacing of the levels."""
        assert self.config.noise_std is not None
        return self.config.noise_std * (self.config.levels - 1) / 2
