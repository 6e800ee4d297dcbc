"""What the autoregressive models share: p(x) = prod_i p(t_i | t_0 .. t_{i-1}) over the tokens of a picture in raster
order, trained and evaluated in one pass over all tokens, and sampled token by token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from pygen import _native, ops
from pygen.autoregressive.arguments import CheckedModel, check_levels, check_tensor
from pygen.autoregressive.incremental import ConversionError, Incremental, incremental
from pygen.autoregressive.progress import Progress, Target
from pygen.autoregressive.sampling import Sampling, sequence_log_prob
from pygen.autoregressive.state import PrefixState, State
from pygen.model import Density, Stage, refuse_steps
from pygen.ops.kept import Kept
from pygen.ops.noise import TOKEN_STREAM, philox_uniform_reference, signed_seed

_CONVERTED: Kept[dict[tuple[int, ...], Incremental]] = Kept(devices=("cpu", "cuda"), whole=True)
_MOST_LENGTHS = 8  # for which a network is kept converted


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model that is in `train()`, as in `eval()` for a while."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class AutoregressiveModel(CheckedModel):
    """An exact probability of discrete pictures, and samples token by token.

    A token is an element of the picture, a grey level of one colour of one pixel, unless a model says otherwise. Tokens
    are numbered in the order in which they are drawn: i = (row * width + column) * channels + channel.

    A recipe defines `forward`, or `logits` where the network's output has another layout. Where the network is made of
    masked convolutions, it samples through `incremental`, which computes each activation once; where not, it defines
    `start`.
    """

    density = Density.EXACT
    convolutional: ClassVar[bool] = False  # whether `incremental` can convert it
    logistics: ClassVar[bool] = False  # whether `forward` gives the parameters of mixtures in the place of logits
    uniform_word: ClassVar[int] = 0  # of the noise of a token: the one that its value grows with

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The network: (n, channels * levels, height, width), the logits of the levels of each colour side by side; or
        (n, length, levels), those of each token.

        x: (n, channels, height, width), quantized, in [-1, 1]. condition: int64 (n,) labels, or None.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def logits(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """(n, length, vocabulary) unnormalized log-probabilities of each token given those before it, all at once."""
        x = self.check_pictures(x)
        out: Tensor = self(x, self.check_condition(condition, len(x)))
        if out.dim() == 3:
            return out
        by_colour = torch.unflatten(out, 1, (self.config.shape[0], -1))
        return by_colour.permute(0, 3, 4, 1, 2).flatten(1, 3)

    def token_logits(self, tokens: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """`logits` of the picture of int64 tokens (n, length)."""
        return self.logits(self.pictures(self.check_tokens(tokens)), condition=condition)

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens of pictures (n, channels, height, width) in [-1, 1], int64 (n, length)."""
        self.refuse_nan(x)
        return self.quantize(x).movedim(1, -1).flatten(1)

    def lay_out(self, values: Tensor) -> Tensor:
        """One number for each token, (n, length), as pictures (n, channels, height, width)."""
        colours, height, width = self.config.shape
        return torch.unflatten(values, 1, (height, width, colours)).movedim(-1, 1).contiguous()

    def pictures(self, tokens: Tensor) -> Tensor:
        """The pictures (n, channels, height, width) in [-1, 1] of int64 tokens (n, length)."""
        return self.dequantize(self.lay_out(tokens)).to(next(self.parameters()).dtype)

    def quantize(self, x: Tensor) -> Tensor:
        # NaN as an index would be out of range, which on a GPU ends the process.
        return super().quantize(x.nan_to_num(0.0))

    def dequantize(self, k: Tensor) -> Tensor:
        """x = 2 k / (levels - 1) - 1 of integer values k, as float32, or float64 where the parameters are."""
        if next(self.parameters()).dtype == torch.float64:
            return k.double() * (2 / (self.config.levels - 1)) - 1
        return super().dequantize(k)

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood in nats per token."""
        self.check_player(player)
        x = self.check_batch(x)
        return -self.log_prob(x, condition=condition).mean() / self.length

    def log_prob(
        self, x: Tensor, *, condition: Tensor | None = None, ids: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """log P(x | condition) in nats, (n,); exact, so `ids` and `seed` change nothing. See `GenerativeModel`.

        As `loss`, it is with dropout in `train()`. NaN in a picture is a ValueError where the host can see it, and
        elsewhere makes the picture's log-probability NaN.
        """
        x = self.check_pictures(x)
        return self.nan_of_nan(x, self.token_log_prob(self.tokens(x), condition=condition))

    def token_log_prob(self, tokens: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """log P(tokens | condition) in nats, (n,), of int64 tokens (n, length)."""
        return sequence_log_prob(self.token_logits(tokens, condition=condition), tokens)

    @torch.no_grad()
    def start(
        self, n: int, *, condition: Tensor | None = None, guidance: float | None = None, length: int | None = None
    ) -> State:
        """A state of n rows that no token has been fed to.

        condition: int64 (n,) labels, for a conditional model.
        guidance: w >= 0, for logits c + w (c - u) with c those of the label and u those without one, each normalized
            (Ho & Salimans 2022, arXiv:2207.12598, eq. 6); only of models that are trained with labels withheld, whose
            configuration says what None is.
        length: tokens of a sample, where that is not the model's own to say.

        ValueError: n is negative, labels that do not fit, guidance that the model has not learned, or another length
        than the model's.
        """
        self.check_start(n, guidance, length)
        condition = self.check_condition(condition, n)
        converted = self.converted()
        return PrefixState(self, n, condition) if converted is None else converted.start(n, condition=condition)

    def converted(self, length: int | None = None) -> Incremental | None:
        """The network as a program that computes each activation once, made anew when a parameter has changed; None
        where there is none for this network and device. Of 16-bit parameters it computes in float32.

        length: of a sequence, where that is not the model's own to say.
        """
        parameters = [*self.parameters(), *self.buffers()]
        if not self.convolutional or _native.kernels_for(parameters[0]) is None:
            return None
        if self.config.shape[1:] == (1, 1) and length in (None, self.length):
            return None  # of a single pixel there is nothing to keep
        shape = self.config.shape if length is None or length == self.length else (1, 1, length)
        with torch.no_grad():
            by_shape = _CONVERTED.get(self, parameters, dict[tuple[int, ...], Incremental])
            if shape not in by_shape:
                if len(by_shape) == _MOST_LENGTHS:
                    by_shape.pop(next(iter(by_shape)))
                condition = None if self.config.classes is None else torch.zeros(1, dtype=torch.int64)
                network = self
                narrow = parameters[0].dtype in (torch.float16, torch.bfloat16)
                if narrow or self.device.type != "cpu":
                    # Following a network takes many small operations, and their results, which no GPU is quick at.
                    network = copy.deepcopy(self).cpu()
                if narrow:
                    network = network.float()  # the arithmetic of the loop
                try:
                    # That these networks are causal, and convert, is for the tests: verifying takes some passes.
                    by_shape[shape] = incremental(
                        network, shape, levels=self.config.levels, condition=condition, logistics=self.logistics,
                        values=network.dequantize(torch.arange(self.config.levels)), verify=False, device=self.device,
                    )  # fmt: skip
                except ConversionError as error:
                    if all(bool(parameter.isfinite().all()) for parameter in parameters):
                        raise
                    # Where a mask multiplies NaN, nothing is masked.
                    raise RuntimeError(
                        f"{type(self).__name__} cannot be followed token by token; the parameters are not finite"
                    ) from error
        return by_shape[shape]

    @torch.no_grad()
    def step(self, token: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Feed tokens, and get the logits of what comes after each; the state is changed in place, and returned.

        As in `eval()`, whatever the mode: dropout would differ from token to token.

        token: int64 (rows,), or (rows, block) for several at once; None, at position 0, for the logits of the first.

        Returns logits (rows, vocabulary), or (rows, block, vocabulary).

        TypeError: token is not int64. ValueError: it has another shape, or goes beyond the last but one token; or it is
        None, but tokens have been fed; or it has a value that is none, where the host can see it.
        """
        if token is not None:
            check_levels("token", token, self.vocabulary)
        with evaluating(self):
            return state.advance(token), state

    def sample(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        guidance: float | None = None,
        progress: Target = False,
    ) -> Tensor:
        """Draw n pictures, (n, channels, height, width) in [-1, 1]; see `GenerativeModel.sample`.

        As in `eval()`, whatever the mode, as is all that draws.

        temperature, top_k, top_p, min_p, typical_p: of each token's distribution, as in `ops.sample_logits`.
        guidance: as in `start`.
        progress: True for a line on stderr, or a function called with how many tokens are drawn, of how many.

        RuntimeError: logits are NaN or infinite, which those of finite parameters are not.
        """
        refuse_steps(self, steps)
        return self.sample_with_log_prob(
            n, ids=ids, condition=condition, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, typical_p=typical_p, guidance=guidance, progress=progress,
        )[0]  # fmt: skip

    @torch.no_grad()
    def sample_with_log_prob(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        guidance: float | None = None,
        progress: Target = False,
    ) -> tuple[Tensor, Tensor]:
        """`sample`, and the log-probability in nats with which each picture was drawn, (n,), gathered while drawing:
        its `log_prob`, unless temperature, filters or guidance changed the distribution."""
        tokens, log_prob = self.sample_tokens(
            n, ids=ids, condition=condition, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, typical_p=typical_p, guidance=guidance, progress=progress,
        )  # fmt: skip
        return self.pictures(tokens), log_prob

    @torch.no_grad()
    def sample_tokens(
        self,
        n: int,
        *,
        length: int | None = None,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        guidance: float | None = None,
        progress: Target = False,
    ) -> tuple[Tensor, Tensor]:
        """The tokens of `sample`, int64 (n, length), and the log-probability (n,) with which each row was drawn.

        length: as in `start`. The others are as for `sample`.
        """
        self.check_start(n, None, length)
        how = self.resolve_sampling(
            n, ids, condition, seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            typical_p=typical_p, guidance=guidance,
        )  # fmt: skip
        length = self.length if length is None else length
        tokens = torch.zeros(len(how.ids), length, dtype=torch.int64, device=how.ids.device)
        return tokens, self.fill(tokens, None, how, progress)

    @torch.no_grad()
    def complete(
        self,
        x: Tensor,
        known: Tensor,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        guidance: float | None = None,
        progress: Target = False,
    ) -> Tensor:
        """Draw the rest of half-given pictures, in raster order, each token given all before it.

        What is known but comes later in raster order has no influence on what is drawn before it. The rest is what
        `sample` would draw, under the same seed and number, had it drawn what is known.

        x: (n, channels, height, width) in [-1, 1], and anything where it is not known. known: bool, broadcastable to x;
            True is kept, rounded to the levels. The others are as for `sample`.
        """
        x = self.check_pictures(x)
        check_tensor("known", known)
        if known.dtype != torch.bool:
            raise TypeError(f"known has dtype {known.dtype}, but expected torch.bool")
        try:
            known = known.to(x.device).expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"known has shape {tuple(known.shape)}, but expected one that broadcasts to {tuple(x.shape)}"
            ) from None
        if bool((x.isnan() & known).any()):  # completing waits for the device in any case
            raise ValueError("x is NaN where it is known, but expected values in [-1, 1]")
        x = x.nan_to_num(0.0)
        how = self.resolve_sampling(
            len(x), ids, condition, seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            typical_p=typical_p, guidance=guidance,
        )  # fmt: skip
        tokens = self.tokens(x)
        self.fill(tokens, self.known_tokens(known), how, progress)
        return torch.where(known, self.dequantize(self.quantize(x)).to(x.dtype), self.pictures(tokens))

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
        """Z, the picture after each pixel, X. Z holds the uniform numbers that the tokens are drawn with, as 2 u - 1;
        each pixel in turn changes from its number in Z to its value in X."""
        refuse_steps(self, steps)
        how = self.resolve_sampling(n, ids, condition, seed)
        _, height, width = self.config.shape
        z = self._uniforms(how.ids, seed)
        tokens = torch.zeros(len(how.ids), self.length, dtype=torch.int64, device=how.ids.device)
        drawn = torch.zeros_like(tokens, dtype=torch.bool)
        per_pixel = self.length // (height * width)
        stages = [Stage("Z", z)]

        def show(done: int, _: int) -> None:
            drawn[:, :done] = True
            pixel = done // per_pixel - 1
            if done % per_pixel == 0:
                values = torch.where(self.lay_out(drawn), self.pictures(tokens), z)
                stages.append(Stage(f"row {pixel // width + 1}, column {pixel % width + 1}", values))

        self._step_through(tokens, None, how, show)
        return [*stages[:-1], Stage("X", stages[-1].values)]

    def network_passes(self, steps: int | None = None) -> int:
        """One for each token, though with a cache every pass is over one token alone."""
        return self.length

    def known_tokens(self, known: Tensor) -> Tensor:
        """Which tokens are known, bool (n, length), where it is known which elements are, bool (n, channels, height,
        width)."""
        return known.movedim(1, -1).flatten(1)

    def draw(self, logits: Tensor, state: State, how: Sampling, position: int) -> tuple[Tensor, Tensor]:
        """Token number `position` of each sample, int64 (n,), and its log-probability (n,), from logits (n,
        vocabulary) that the state just gave; see `ops.sample_logits`."""
        return ops.sample_logits(logits, seed=how.seed, sample_ids=how.ids, position=position, **how.filters)

    def fill(self, tokens: Tensor, known: Tensor | None, how: Sampling, progress: Target) -> Tensor:
        """Draw into `tokens` (n, length), in place, what is not `known`, bool (n, length); the log-probabilities of
        what was drawn, (n,). RuntimeError where logits were no distribution."""
        converted = None if self.logistics and how.filtered else self.converted(tokens.shape[1])
        if converted is not None and not how.guidance:
            with Progress(progress, tokens.shape[1]) as report:
                filled, log_prob = converted.fill(
                    tokens, known, ids=how.ids, condition=how.condition, seed=how.seed,
                    progress=(lambda done, _: report(done)) if progress else False,
                    **({} if self.logistics else how.filters),
                )  # fmt: skip
            tokens.copy_(filled)
            return log_prob
        return self._step_through(tokens, known, how, progress)

    def _step_through(self, tokens: Tensor, known: Tensor | None, how: Sampling, progress: Target) -> Tensor:
        """`fill`, step by step."""
        with Progress(progress, tokens.shape[1]) as report, evaluating(self):
            total = self._draw_tokens(tokens, known, how, report)
        broken = total.isnan()
        if broken.any():
            raise RuntimeError(
                f"sample {int(how.ids[broken][0])} met logits that are no distribution; the parameters are not finite"
            )
        return total.to(next(self.parameters()).dtype)

    def _draw_tokens(
        self, tokens: Tensor, known: Tensor | None, how: Sampling, report: Callable[[int], None]
    ) -> Tensor:
        """`fill`, step by step; NaN marks the rows whose logits were no distribution."""
        total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        # Tokens that every sample knows are fed as blocks.
        length = tokens.shape[1]
        given = [False] * length if known is None else known.all(0).tolist()
        state = self.start(len(tokens), condition=how.condition, guidance=how.guidance, length=length)
        for position in range(length):
            if not given[position]:
                logits = state.advance(tokens[:, state.position : position] if position else None)
                token, log_prob = self.draw(logits[:, -1] if position else logits, state, how, position)
                total += log_prob if known is None else torch.where(known[:, position], 0.0, log_prob)
                # A row without a distribution goes on with some token, and is reported at the end.
                token = token.clamp_min(0)
                tokens[:, position] = token if known is None else token.where(~known[:, position], tokens[:, position])
            report(position + 1)
        return total

    def _uniforms(self, ids: Tensor, seed: int) -> Tensor:
        """2 u - 1 of the numbers u in [0, 1) that the tokens are drawn with, laid out as pictures."""
        position = torch.arange(self.length, device=ids.device)
        seeds = ids.new_tensor(signed_seed(seed))
        u = philox_uniform_reference(seeds, ids[:, None], TOKEN_STREAM, position, ids.new_tensor(self.uniform_word))
        return (2 * self.lay_out(u) - 1).to(next(self.parameters()).dtype)
