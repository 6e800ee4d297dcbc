"""A converted network: draws, completes and scores samples, and goes step by step."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from pygen.autoregressive.incremental.encoding import Encoded
from pygen.autoregressive.incremental.schedule import Geometry
from pygen.autoregressive.incremental.tracing import Tape
from pygen.autoregressive.mixture_state import MixtureState
from pygen.autoregressive.progress import Progress, Target
from pygen.autoregressive.state import State
from pygen.ops.incremental import incremental_advance

_MOST_CONDITIONS = 1024  # whose results are kept
_BETWEEN_MARKS, _MOST_MARKS = 8, 4  # a mark costs about as much as a step of a network whose activations it copies


class Incremental:
    """What `incremental(model)` returns. Tokens are int64 (n, length), levels in the order in which they are drawn.

    length: elements of a sample. vocabulary: values that an element can have. outputs: numbers that it is drawn from,
    a logit for each value or a mixture's parameters.
    """

    def __init__(
        self, encoded: Encoded, tape: Tape, shape: tuple[int, ...], geometry: Geometry, values: Tensor,
        condition_shape: tuple[int, ...] | None, logistics: int, traced_on: torch.device, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.program, self.fixed = encoded.program, encoded.fixed
        self.weights = encoded.weights.to(device)
        self.shape, self.geometry, self.logistics, self.dtype = shape, geometry, logistics, dtype
        self.traced_on, self.device = traced_on, device
        self.values = values.to(device)
        self._condition_shape, self._tape = condition_shape, tape
        self._known_conditions: dict[Any, Tensor] = {}

    @property
    def length(self) -> int:
        return self.geometry.length

    @property
    def levels(self) -> int:
        return len(self.values)

    @property
    def vocabulary(self) -> int:
        return self.levels

    @property
    def outputs(self) -> int:
        return self.program.vocabulary

    def pictures(self, tokens: Tensor) -> Tensor:
        """(n, *shape) values of tokens (n, length)."""
        g = self.geometry
        levels = tokens.to(self.device).unflatten(1, (g.height, g.width, g.channels)).movedim(-1, 1)
        values = self.values if self.values.dtype == torch.int64 else self.values.to(self.dtype)
        return values[levels].reshape(-1, *self.shape)

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens (n, length) of the nearest values to x (n, *shape); -1 for NaN."""
        if tuple(x.shape[1:]) != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"x has shape {tuple(x.shape)}, but expected (n, {expected})")
        g = self.geometry
        flat = x.to(self.device).reshape(-1, g.channels, g.height, g.width).movedim(1, -1).flatten(1)
        order = self.values.argsort()
        ascending = self.values[order].to(flat.dtype)
        middles = (ascending[1:] + ascending[:-1]) / 2
        return order[torch.bucketize(flat.contiguous(), middles)].where(~flat.isnan(), -1)

    def sample(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int | Tensor = 0,
        progress: Target = False,
        **filters: Any,
    ) -> tuple[Tensor, Tensor]:
        """Draw n samples: x (n, *shape), and log P of each in nats, (n,).

        ids: int64 (n,), whose draws these are; 0 .. n - 1 if None. condition: (n, ...).
        filters: temperature, top_k, top_p, min_p, typical_p and ties, as in `ops.sample_logits`.
        progress: True for a line on stderr, or a function called with how many elements are drawn, of how many.

        ValueError: n is negative, or a condition or a filter does not fit. RuntimeError: the network gave what is no
        distribution.
        """
        _check_count(n)
        tokens = torch.zeros(n, self.length, dtype=torch.int64, device=self.device)
        tokens, log_prob = self.fill(
            tokens, ids=ids, condition=condition, seed=seed, progress=progress, **filters
        )  # fmt: skip
        return self.pictures(tokens), log_prob

    def complete(self, x: Tensor, known: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Draw what is not known of x (n, *shape), each element given all before it; see `sample` for the options.

        known: bool, broadcastable to x; True is kept. Returns x and log P of what was drawn.

        TypeError: known is not bool. ValueError: x or known has another shape, or something known is NaN.
        """
        tokens, g = self.tokens(x), self.geometry
        if known.dtype != torch.bool:
            raise TypeError(f"known has dtype {known.dtype}, but expected torch.bool")
        try:
            kept = known.to(self.device).expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"known has shape {tuple(known.shape)}, but expected one that broadcasts to {tuple(x.shape)}"
            ) from None
        in_order = kept.reshape(-1, g.channels, g.height, g.width).movedim(1, -1).flatten(1)
        if (in_order & (tokens < 0)).any():
            raise ValueError("x has NaN where it is known, but expected numbers")
        tokens, log_prob = self.fill(tokens.clamp_min(0), in_order, **options)
        return torch.where(kept, x.to(self.device), self.pictures(tokens)), log_prob

    @torch.no_grad()
    def fill(
        self,
        tokens: Tensor,
        known: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int | Tensor = 0,
        progress: Target = False,
        **filters: Any,
    ) -> tuple[Tensor, Tensor]:
        """As `complete`, on tokens (n, length); the tokens, and log P of those drawn."""
        self._check_tokens(tokens)
        tokens = tokens.to(self.device, copy=True).contiguous()
        n = len(tokens)
        if known is not None:
            if known.dtype != torch.bool:
                raise TypeError(f"known has dtype {known.dtype}, but expected torch.bool")
            if known.shape not in ((n, self.length), (1, self.length), (self.length,)):
                raise ValueError(f"known has shape {tuple(known.shape)}, but expected ({n}, {self.length})")
            known = known.to(self.device).expand(n, self.length).contiguous()
        if ids is None:
            ids = torch.arange(n, device=self.device)
        with Progress(progress, self.length) as report:
            log_prob = self._advance(
                tokens, condition, "draw", known, ids=ids.to(self.device), seed=seed,
                report=report if progress else None, **filters,
            )[0]  # fmt: skip
        total = log_prob.double().sum(1)
        broken = (tokens < 0).any(1)
        if broken.any():
            raise RuntimeError(
                f"sample {int(ids.to(self.device)[broken][0])} met logits that are no distribution; the parameters are "
                "not finite"
            )
        return tokens, total.to(self.dtype)

    @torch.no_grad()
    def log_prob(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """log P(x | condition) in nats, (n,), of the nearest samples to x (n, *shape)."""
        log_prob, _ = self._advance(self.tokens(x), condition, "score", None)
        return log_prob.double().sum(1).to(self.dtype)

    @torch.no_grad()
    def logits(self, tokens: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """What each element would be drawn from, given those before it: (n, length, outputs)."""
        self._check_tokens(tokens)
        return self._advance(tokens.to(self.device).contiguous(), condition, "follow", None, with_logits=True)[1]

    def start(self, n: int, *, condition: Tensor | None = None) -> State:
        """A state of n samples that no token has been fed to; its logits are of the levels, also of a mixture."""
        _check_count(n)
        state = IncrementalState(self, n, self.condition(condition, n))
        if not self.logistics:
            return state
        return MixtureState(state, self.geometry.channels, self.values.to(self.dtype))

    def step(self, token: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Feed tokens, and get the logits of what comes after each; see `pygen.autoregressive.Stepper`."""
        return state.advance(token), state

    @torch.no_grad()
    def condition(self, condition: Tensor | None, n: int) -> Tensor:
        """What the network makes of conditions (n, ...): (n, program.conditions).

        ValueError: there is one and the network takes none, or the other way round, or it has another shape.
        """
        made = torch.zeros(n, self.program.conditions, dtype=self.dtype, device=self.device)
        if (condition is None) != (self._condition_shape is None):
            raise ValueError(
                "condition is None, but the network was converted with one" if condition is None else
                "condition was given, but the network was converted without one"
            )  # fmt: skip
        if condition is None or self._condition_shape is None:
            return made
        if tuple(condition.shape) != (n, *self._condition_shape):
            expected = ", ".join(map(str, (n, *self._condition_shape)))
            raise ValueError(f"condition has shape {tuple(condition.shape)}, but expected ({expected})")
        kinds, member = torch.unique(condition, dim=0, return_inverse=True)
        rows = [self._one_condition(kind[None]) for kind in kinds]
        return torch.stack(rows)[member] if rows else made

    def _one_condition(self, condition: Tensor) -> Tensor:
        """Of one sample; those of labels are kept, because there are few."""
        key = tuple(condition.flatten().tolist()) if condition.dtype == torch.int64 else None
        if key is not None and key in self._known_conditions:
            return self._known_conditions[key]
        values = self._tape.replay(condition.to(self.traced_on))
        made = torch.zeros(self.program.conditions, dtype=self.dtype)
        for node, place in self.fixed:
            grid = node.arrangement.to_grid(_squeezed(values[node.value], node.arrangement.shape).cpu())
            stored = torch.zeros(*grid.shape[1:], place.stride, dtype=self.dtype)
            stored[..., torch.from_numpy(place.position)] = grid.permute(1, 2, 0).to(self.dtype)
            made[place.start : place.start + place.size] = stored.flatten()
        made = made.to(self.device)
        if key is not None:
            if len(self._known_conditions) == _MOST_CONDITIONS:
                self._known_conditions.pop(next(iter(self._known_conditions)))
            self._known_conditions[key] = made
        return made

    def _advance(
        self, tokens: Tensor, condition: Tensor | None, mode: str, known: Tensor | None, *, ids: Tensor | None = None,
        seed: int | Tensor = 0, with_logits: bool = False, report: Progress | None = None, **filters: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """All steps: log-probabilities (n, length) and logits; tokens are changed in place."""
        n = len(tokens)
        if ids is None:
            ids = torch.zeros(n, dtype=torch.int64, device=self.device)
        state = torch.zeros(n, self.program.state, dtype=self.dtype, device=self.device)
        conditions = self.condition(condition, n)
        cuts = [0, self.length]
        if report is not None or self.device.type == "cuda":  # where a launch of seconds would be in others' way
            part = max(self.geometry.row if self.geometry.height > 1 else 0, -(-self.length // 100))
            cuts = [*range(0, self.length, part), self.length]
        found = []
        for begin, end in itertools.pairwise(cuts):
            found.append(self.advance(
                state, tokens, conditions, begin, end, mode, known=known, sample_ids=ids, seed=seed,
                with_logits=with_logits, **filters,
            ))  # fmt: skip
            if report is not None:
                report(end)
        return torch.cat([each[0] for each in found], 1), torch.cat([each[1] for each in found], 1)

    def advance(
        self, state: Tensor, tokens: Tensor, conditions: Tensor, begin: int, end: int, mode: str, *, sample_ids: Tensor,
        seed: int | Tensor = 0, **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Steps begin .. end of the program; see `ops.incremental_advance`."""
        return incremental_advance(
            state, tokens, self.weights, self.program, conditions, self.values.to(self.dtype), begin=begin, end=end,
            mode=mode, logistics=self.logistics, sample_ids=sample_ids, seed=seed, **options,
        )  # fmt: skip

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens has dtype {tokens.dtype}, but expected torch.int64")
        if tokens.dim() != 2 or tokens.shape[1] != self.length:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, but expected (n, {self.length})")


def _check_count(n: int) -> None:
    if n < 0:
        raise ValueError(f"n is {n}, but expected a number of samples that is not negative")


def _squeezed(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A value of the tape in the shape of its field, where broadcasting gave it dimensions of one."""
    return value.reshape(shape) if value.numel() == torch.Size(shape).numel() else value.expand(shape)


class IncrementalState(State):
    """The activations that later elements read, and the tokens that they came from.

    Rows of activations are overwritten once nothing reads them, so what a crop takes back is computed anew, to the same
    bits: from the first token on, and where tokens have been taken back before, from one of the last few marks, copies
    of all activations.
    """

    def __init__(self, converted: Incremental, rows: int, conditions: Tensor) -> None:
        super().__init__(rows, converted.length)
        self.converted, self.conditions = converted, conditions
        self.numbers = torch.zeros(rows, converted.program.state, dtype=converted.dtype, device=converted.device)
        self.tokens = torch.zeros(rows, converted.length, dtype=torch.int64, device=converted.device)
        self._run = 0  # steps that have been run
        self._marked = False  # whether marks are set
        self._marks: list[tuple[int, Tensor]] = []  # steps that had been run, and the numbers then

    def first(self) -> Tensor:
        return self._until(1)[:, 0]

    def feed(self, tokens: Tensor) -> Tensor:
        end = self.position + tokens.shape[1]
        self.tokens[:, self.position : end] = tokens
        return self._until(end + 1, tokens.shape[1])

    def select(self, index: Tensor) -> None:
        index = index.to(self.converted.device)
        self.numbers, self.tokens, self.conditions = (
            each[index] for each in (self.numbers, self.tokens, self.conditions)
        )  # fmt: skip
        self._marks = [(run, numbers[index]) for run, numbers in self._marks]

    def forget(self, position: int) -> None:
        if position < self.position:
            self._marked = True
            # Step t takes in element t - 1.
            self._marks = [mark for mark in self._marks if mark[0] <= position + 1]
            self._run = 0
            if self._marks:
                self._run, numbers = self._marks[-1]
                self.numbers = numbers.clone()

    @torch.no_grad()
    def _until(self, end: int, block: int = 1) -> Tensor:
        """Run the steps before `end` that have not been run; the logits of the last `block` ones."""
        begin = end - block
        self._mark()
        ids = torch.zeros(self.rows, dtype=torch.int64, device=self.converted.device)
        for first, last, wanted in ((self._run, begin, False), (begin, end, True)):
            if first < last:
                _, logits = self.converted.advance(
                    self.numbers, self.tokens, self.conditions, first, last, "follow", sample_ids=ids,
                    with_logits=wanted,
                )  # fmt: skip
        self._run = end
        return logits

    def _mark(self) -> None:
        if self._marked and self._run >= (self._marks[-1][0] if self._marks else 0) + _BETWEEN_MARKS:
            self._marks = [*self._marks[1 - _MOST_MARKS :], (self._run, self.numbers.clone())]
