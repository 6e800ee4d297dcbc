"""Samples side by side that are known up to different places, and the passes of a model that carry them on.

What the ways to several tokens at once share: a block of tokens, some of them guesses, is fed to the model in one pass,
and its logits say how far each sample is right. A token's draw is addressed by (seed, sample id, position), so what a
pass repeats of the known tokens changes nothing, and a sample does not depend on its batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.autoregressive.arguments import check_count, check_levels, check_tensor
from pygen.autoregressive.state import State, Stepper


@dataclasses.dataclass(frozen=True)
class Samples:
    """Finished samples, and what they took.

    tokens: int64 (n, length). log_prob: float64 (n,), in nats, of the tokens that were drawn, under the (filtered)
    distributions that they were drawn from. passes: calls of the model's `step`, where a sequential loop takes as many
    as there are tokens. draft_passes: of the draft model, where there is one.
    """

    tokens: Tensor
    log_prob: Tensor
    passes: int
    draft_passes: int = 0


class Reader:
    """A model's logits of any run of elements, from a state that is cropped to where the run begins."""

    def __init__(self, model: Stepper, n: int, condition: Tensor | None) -> None:
        self.model = model
        self.state: State = model.start(n, condition=condition)
        self.passes = 0

    def read(self, tokens: Tensor, first: int, end: int) -> Tensor:
        """The logits (n, end - first, vocabulary) of the elements first .. end - 1, each given all tokens before it.

        tokens: (n, length), the same up to number first - 2 as whenever these were read.
        """
        logits = []
        if first == 0:
            self.state.crop(0)
            logits.append(self._step(None)[:, None])
        begin = min(self.state.position, max(first - 1, 0))
        if end > begin + 1:
            self.state.crop(begin)
            logits.append(self._step(tokens[:, begin : end - 1])[:, max(first, 1) - 1 - begin :])
        return torch.cat(logits, dim=1)

    def _step(self, tokens: Tensor | None) -> Tensor:
        self.passes += 1
        logits, self.state = self.model.step(tokens, self.state)
        return logits


def device_of(model: Stepper) -> torch.device:
    """Where a model's parameters live; the CPU for one without any."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


class Frontier:
    """n samples of `length` tokens, of which sample i knows the first done[i]; later tokens are guesses.

    model: whose samples they are. ids: int64 (n,), the numbers of the samples. prefix: int64 (n, p), tokens that are
    given, or None.

    ValueError: n, ids or prefix does not fit. TypeError: n is no int, or one of the others not int64.
    """

    def __init__(self, model: Stepper, n: int, ids: Tensor | None, prefix: Tensor | None) -> None:
        n, length, device = check_count("n", n), model.length, device_of(model)
        if ids is not None:
            check_tensor("ids", ids)
            if ids.dtype != torch.int64:
                raise TypeError(f"ids has dtype {ids.dtype}, but expected torch.int64")
            if ids.shape != (n,):
                raise ValueError(f"ids has shape {tuple(ids.shape)}, but expected ({n},)")
        ids = torch.arange(n, device=device) if ids is None else ids.to(device)
        given = 0
        if prefix is not None:
            check_levels("prefix", prefix, model.vocabulary, wait=True)
            given = prefix.shape[-1] if prefix.dim() else 0
            if prefix.shape != (n, given):
                raise ValueError(f"prefix has shape {tuple(prefix.shape)}, but expected ({n}, {given})")
            if given > length:
                raise ValueError(f"prefix has {given} tokens, but expected at most {length}")
        self.ids = ids
        self.length = length
        self.tokens = torch.zeros(n, length, dtype=torch.int64, device=device)
        self.done = torch.full((n,), given, device=device)
        self.log_prob = torch.zeros(n, dtype=torch.float64, device=device)
        if prefix is not None:
            self.tokens[:, :given] = prefix

    @property
    def first(self) -> int:
        """The first element that some sample does not know; `length` where all know all."""
        return int(self.done.min()) if len(self.done) else self.length

    def places(self, first: int, end: int) -> Tensor:
        """The numbers of the elements first .. end - 1, (end - first,)."""
        return torch.arange(first, end, device=self.tokens.device)

    def draw(self, logits: Tensor, first: int, seed: int, filters: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Tokens int64 (n, b) of the elements first .. first + b - 1 and their log-probabilities (n, b), from logits
        (n, b, vocabulary)."""
        n, b, _ = logits.shape
        token, log_prob = ops.sample_logits(
            logits.flatten(0, 1), seed=seed, sample_ids=self.ids.repeat_interleave(b),
            position=self.places(first, first + b).repeat(n), **filters,
        )  # fmt: skip
        return token.view(n, b), log_prob.view(n, b)

    def draw_at(self, logits: Tensor, place: Tensor, seed: int, filters: dict[str, Any]) -> Tensor:
        """Tokens int64 (n,) of the elements place[i], from logits (n, vocabulary)."""
        return ops.sample_logits(logits, seed=seed, sample_ids=self.ids, position=place, **filters)[0]

    def verify(self, logits: Tensor, first: int, seed: int, filters: dict[str, Any]) -> Tensor:
        """Draw the elements first .. first + b - 1 from logits (n, b, vocabulary), and know those whose guesses before
        were all what is drawn, and one more. Returns what was drawn, (n, b), of which the unknown part is no more than
        a better guess."""
        drawn, log_prob = self.draw(logits, first, seed, filters)
        end = first + drawn.shape[1]
        places = self.places(first, end)
        agrees = (drawn == self.tokens[:, first:end]) | (places < self.done[:, None])
        right = (first + 1 + agrees.int().cumprod(1).sum(1)).clamp(max=end)
        new = (places >= self.done[:, None]) & (places < right[:, None])
        self._know(drawn, log_prob, new, first)
        self.done = torch.maximum(self.done, right)
        return drawn

    def take(self, tokens: Tensor, log_prob: Tensor, counts: Tensor) -> None:
        """Know counts[i] tokens more of sample i, the first of tokens[i] (n, b), with their log-probabilities."""
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        new = offsets < counts[:, None]
        places = (self.done[:, None] + offsets).clamp(max=self.length - 1)
        self._check(tokens, new)
        kept = torch.where(new, tokens, self.tokens.gather(1, places))
        # Backwards, so that where places meet at the end a token that counts is written last.
        for j in reversed(range(tokens.shape[1])):
            self.tokens.scatter_(1, places[:, j : j + 1], kept[:, j : j + 1])
        self.log_prob += torch.where(new, log_prob.double(), 0.0).sum(1)
        self.done = self.done + counts

    def finish(self, passes: int, draft_passes: int = 0) -> Samples:
        return Samples(self.tokens, self.log_prob, passes, draft_passes)

    def _know(self, drawn: Tensor, log_prob: Tensor, new: Tensor, first: int) -> None:
        self._check(drawn, new)
        part = self.tokens[:, first : first + drawn.shape[1]]
        part.copy_(torch.where(new, drawn, part))
        self.log_prob += torch.where(new, log_prob.double(), 0.0).sum(1)

    def _check(self, tokens: Tensor, new: Tensor) -> None:
        broken = ((tokens < 0) & new).any(1)
        if broken.any():
            raise RuntimeError(
                f"sample {int(self.ids[broken][0])} met logits that are no distribution; the parameters are not finite"
            )
